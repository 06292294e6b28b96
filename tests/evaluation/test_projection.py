import numpy as np
import pytest

from visiontuner.evaluation.projection import MOST_POINTS, choose_points, project


def test_features_that_vary_in_a_plane_keep_their_distances() -> None:
    # On the unit circle, which normalisation leaves alone, turned into five dimensions.
    angles = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    flat = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0][:2]
    found = project((flat @ turn).astype(np.float32))
    assert (found.method, found.explained) == ("PCA", 1.0)
    assert found.places.min() == 0.0
    assert found.places.max() == 1.0
    # Each dimension has a scale of its own: undo it by the two principal axes.
    centred = flat - flat.mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    extents = np.ptp(along, axis=0)
    wanted = np.linalg.norm(along[:, None] - along[None], axis=2)
    places = found.places * extents
    np.testing.assert_allclose(
        np.linalg.norm(places[:, None] - places[None], axis=2), wanted, atol=1e-5
    )


@pytest.mark.parametrize("features", [np.ones((3, 4)), np.zeros((4, 2)), np.ones((5, 1))])
def test_features_that_do_not_vary_lie_in_the_middle(features: np.ndarray) -> None:
    found = project(features.astype(np.float32))
    np.testing.assert_array_equal(found.places, np.full((len(features), 2), 0.5))


def test_of_many_images_the_marked_and_as_many_of_each_class_are_drawn() -> None:
    labels = np.array([0] * 9_000 + [1] * 600 + [2] * 400)
    marked = np.zeros(len(labels), dtype=bool)
    marked[:100] = True
    rows = choose_points(labels, list(marked))
    assert len(rows) == len(set(rows.tolist())) == MOST_POINTS
    assert set(range(100)) <= set(rows.tolist())
    counts = np.bincount(labels[rows])
    assert counts.tolist() == [4_000, 600, 400]  # the small classes whole
    np.testing.assert_array_equal(choose_points(labels[:50], [False] * 50), np.arange(50))
