"""Which images are known, on features whose cosines are counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from visiontuner.model.novelty import Novelty, balanced_sample, fit_novelty


def on_circle(degrees: list[float]) -> NDArray[np.float32]:
    """Vectors of different lengths at these angles."""
    angles = np.radians(degrees)
    lengths = np.arange(1, len(angles) + 1)[:, None]
    return (lengths * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


def test_score_is_one_minus_the_mean_cosine_to_the_nearest() -> None:
    images = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    novelty = Novelty(images=images, neighbours=2, threshold=0.5)
    found = novelty.scores(on_circle([0, 60, 180, 270]))
    half, root = 0.5, np.sqrt(3) / 2
    expected = [1 - half, 1 - (half + root) / 2, 1 - half, 1 - 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_sample_holds_as_many_of_each_class_as_there_are() -> None:
    labels = np.repeat([0, 1, 2], [50, 3, 20])
    rows = balanced_sample(labels, 23)
    assert np.bincount(labels[rows]).tolist() == [10, 3, 10]
    assert sorted(set(rows)) == rows.tolist()
    assert len(balanced_sample(labels, 1000)) == 73


def test_no_image_is_judged_by_itself_or_by_its_copy() -> None:
    # 20 pairs of copies, 9 degrees from the next: the nearest five others are two pairs and one.
    features = np.repeat(on_circle(list(np.arange(20) * 9.0)), 2, axis=0)
    labels, everything = np.zeros(40, dtype=np.int64), np.ones(40, dtype=bool)
    units = [str(number // 2) for number in range(40)]
    fitted = fit_novelty(features, labels, known=everything, judged=everything, units=units)
    assert fitted is not None
    # 39 of 40 scores: at the two ends the pairs 9 and 18 degrees away and one of those at 27.
    at_the_end = 1 - np.cos(np.radians([9, 9, 18, 18, 27])).mean()
    assert fitted.threshold == pytest.approx(at_the_end, abs=1e-3)  # float16
    alone = fit_novelty(
        features, labels, known=everything, judged=everything, units=list(map(str, range(40)))
    )
    assert alone is not None
    assert alone.threshold < fitted.threshold


def test_95_of_100_other_images_are_known_and_those_elsewhere_are_not() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        features = rng.normal(1, 1, (400, 64)).astype(np.float32)
        judged = np.arange(400) >= 200
        fitted = fit_novelty(
            features,
            np.zeros(400, dtype=np.int64),
            known=~judged,
            judged=judged,
            units=list(map(str, range(400))),
        )
        assert fitted is not None
        shares.append((fitted.scores(rng.normal(1, 1, (500, 64))) <= fitted.threshold).mean())
        assert (fitted.scores(rng.normal(-1, 1, (50, 64))) > fitted.threshold).all()
    assert np.mean(shares) == pytest.approx(0.95, abs=0.01)


def test_too_few_images_say_nothing() -> None:
    features = on_circle(list(range(19)))
    everything = np.ones(19, dtype=bool)
    fitted = fit_novelty(
        features,
        np.zeros(19, dtype=np.int64),
        known=everything,
        judged=everything,
        units=list(map(str, range(19))),
    )
    assert fitted is None


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    images = np.eye(3, dtype=np.float32)
    novelty = Novelty(images=images, neighbours=2, threshold=0.25)
    path = tmp_path / "novelty.npz"
    path.write_bytes(novelty.content())
    read = Novelty.load(path, novelty.to_dict())
    np.testing.assert_array_equal(read.images, images)
    assert (read.neighbours, read.threshold, read.feature_dim) == (2, 0.25, 3)
    assert read.content() == novelty.content()


@pytest.mark.parametrize(
    ("content", "raw"),
    [
        (b"junk", {"neighbours": 1, "threshold": 0.5}),
        (None, {"neighbours": 9, "threshold": 0.5}),
        (None, {"neighbours": 1, "threshold": float("nan")}),
    ],
)
def test_damaged_novelty_is_refused(
    content: bytes | None, raw: dict[str, float], tmp_path: Path
) -> None:
    whole = Novelty(images=np.eye(3, dtype=np.float32), neighbours=1, threshold=0.5).content()
    (tmp_path / "novelty.npz").write_bytes(content or whole)
    with pytest.raises(ValueError, match=r".+"):
        Novelty.load(tmp_path / "novelty.npz", raw)
