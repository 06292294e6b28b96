"""Confident learning, on probabilities whose confident joint is counted by hand."""

import numpy as np
import pytest

from visiontuner.evaluation.suspects import find_suspect_labels

SURE = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]


def found(probabilities, labels):
    suspects = find_suspect_labels(np.array(probabilities, dtype=np.float32), np.array(labels))
    return suspects.rows.tolist(), suspects.suggested.tolist(), suspects.scores.tolist()


def test_an_image_that_looks_like_the_other_class_is_named():
    # Class 1 has .9 on average among its images, and the last image of class 0 has more of it.
    rows, suggested, scores = found([*SURE, [0.02, 0.98]], [0, 0, 1, 1, 0])
    assert (rows, suggested) == ([4], [1])
    assert scores == pytest.approx([0.98])


def test_labels_that_agree_are_not_named():
    assert found(SURE, [0, 0, 1, 1]) == ([], [], [])


def test_a_label_with_more_than_five_percent_is_not_named():
    # It counts in the joint (.94 >= .9), but its own label may well be right.
    assert found([*SURE, [0.06, 0.94]], [0, 0, 1, 1, 0]) == ([], [], [])
    assert found([*SURE, [0.04, 0.96]], [0, 0, 1, 1, 0])[0] == [4]


def test_only_as_many_as_the_joint_counts_are_named_the_lowest_first():
    sure = [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]]
    # None of the others has more than its average of .9, so the last one does not count.
    undecided = [0.04, 0.48, 0.48]
    wrong, more_wrong = [0.02, 0.03, 0.95], [0.01, 0.97, 0.02]
    three = np.repeat(sure, 3, axis=0).tolist()
    labels = np.repeat([0, 1, 2], 3).tolist()
    assert found([*three, undecided], [*labels, 0]) == ([], [], [])
    rows, suggested, _ = found([*three, undecided, wrong, more_wrong], [*labels, 0, 0, 0])
    assert (rows, suggested) == ([11, 10], [1, 2])


def test_the_best_of_many_improbable_classes_is_not_named():
    # Of 40 classes the first label's 4 % are the most. Two others count in the joint, one of which
    # has 6 % for its own label: the first one is the second lowest, and yet no suspect.
    probabilities = np.full((4, 40), 0.96 / 39)
    probabilities[0, 0] = 0.04
    probabilities[1:] = 0.9 * np.eye(40)[1] + 0.1 * np.eye(40)[39]
    probabilities[3] = 0.94 * np.eye(40)[1] + 0.06 * np.eye(40)[3]
    assert found(probabilities, [0, 1, 2, 3]) == ([2], [1], [1.0])


def test_a_class_without_images_is_no_obstacle():
    rows, suggested, _ = found([[*p, 0.0] for p in [*SURE, [0.02, 0.98]]], [0, 0, 1, 1, 0])
    assert (rows, suggested) == ([4], [1])


def test_each_label_needs_its_probabilities():
    with pytest.raises(ValueError, match="3 labels"):
        find_suspect_labels(np.array(SURE), np.array([0, 1, 1]))
