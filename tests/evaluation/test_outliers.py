import numpy as np

from visiontuner.evaluation.suspects import UNLIKE_ITS_CLASS, class_deviations


def at(degrees: list[float]) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_an_image_far_from_its_own_class_stands_out_however_near_another_is() -> None:
    # Two classes at 0 and at 60 degrees; the last image lies among the other class.
    near = [float(d) for d in range(-10, 11)]
    features = at([*near, *(60 + d for d in near), 60.5])
    labels = np.array([0] * 21 + [1] * 21 + [0])
    found = class_deviations(features * 7, labels, [str(row) for row in range(43)])
    assert (found > UNLIKE_ITS_CLASS).nonzero()[0].tolist() == [42]
    # By hand: its five nearest of class 0 are at 6 to 10 degrees; those at 0 to 10 themselves are
    # less than .003 from each other, so that a deviation is the least one, .01.
    distance = np.mean([1 - np.cos(np.radians(60.5 - d)) for d in (6, 7, 8, 9, 10)])
    assert abs(found[42] - distance / 0.01) < 0.3


def test_copies_and_small_classes_say_nothing() -> None:
    features = at([0.0] * 20 + [90.0] * 6 + [45.0] * 9)
    labels = np.array([0] * 26 + [1] * 9)
    alone = [str(row) for row in range(35)]
    assert not (class_deviations(features, labels, alone)[20:26] > UNLIKE_ITS_CLASS).any()
    # Six copies of one image are no neighbours of each other.
    copies = alone[:20] + ["copy"] * 6 + alone[26:]
    found = class_deviations(features, labels, copies)
    assert (found[20:26] > UNLIKE_ITS_CLASS).all()
    assert np.isnan(found[26:]).all()
