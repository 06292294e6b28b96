import numpy as np
import pytest

from visiontuner.evaluation.scores import ConfusedPair, confident_mistakes, confused_pairs

NAMES = ["cat", "dog", "fox"]


def test_the_surest_mistakes_come_first():
    probabilities = np.array(
        [[0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.5, 0.5, 0.0]]
    )
    found = confident_mistakes(probabilities, np.array([1, 0, 0, 0, 1]), NAMES)
    assert [mistake.index for mistake in found] == [2, 3, 0, 4]
    first = found[0]
    assert (first.true, first.predicted) == ("cat", "dog")
    assert (first.probability, first.true_probability) == (0.8, 0.1)
    assert len(confident_mistakes(probabilities, np.array([1, 0, 0, 0, 1]), NAMES, count=2)) == 2


@pytest.mark.parametrize("count", [0, 3])
def test_without_mistakes_there_are_none(count):
    assert confident_mistakes(np.eye(3)[:count], np.arange(count), NAMES) == []
    assert confused_pairs(np.eye(3, dtype=int), NAMES) == []


def test_confused_pairs_by_hand():
    confusion = np.array([[8, 2, 0], [2, 16, 2], [0, 1, 0]])
    assert confused_pairs(confusion, NAMES) == [
        ConfusedPair(true="cat", predicted="dog", count=2, share=0.2),
        ConfusedPair(true="dog", predicted="cat", count=2, share=0.1),
        ConfusedPair(true="dog", predicted="fox", count=2, share=0.1),
        ConfusedPair(true="fox", predicted="dog", count=1, share=1.0),
    ]
    assert len(confused_pairs(confusion, NAMES, count=1)) == 1
