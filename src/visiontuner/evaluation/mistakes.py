"""Which answers were wrong, and between which classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One wrong answer.

    Args:
        index: the picture's row.
        true, predicted: class names.
        probability: of the predicted class, in [0, 1].
        true_probability: of the true class.
    """

    index: int
    true: str
    predicted: str
    probability: float
    true_probability: float


def confident_mistakes(
    probabilities: NDArray[np.floating],
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    count: int = 24,
) -> list[Mistake]:
    """The wrong answers that were given with the highest probability, highest first.

    Args:
        probabilities: float, shape (N, C), calibrated.
        labels: int, shape (N,), values in [0, C).
        count: at most so many.
    """
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")
    return [
        Mistake(
            index=int(i),
            true=class_names[labels[i]],
            predicted=class_names[predicted[i]],
            probability=float(probabilities[i, predicted[i]]),
            true_probability=float(probabilities[i, labels[i]]),
        )
        for i in wrong[order][:count]
    ]


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Pictures of the class `true` that were taken for `predicted`.

    Args:
        share: of all pictures of the class `true`, in (0, 1].
    """

    true: str
    predicted: str
    count: int
    share: float


def confused_pairs(
    confusion: NDArray[np.integer], class_names: Sequence[str], count: int = 15
) -> list[ConfusedPair]:
    """The most frequent confusions, most frequent first; of equals the larger share, then by name.

    Args:
        confusion: int, shape (C, C); rows are true classes, columns predicted ones.
        count: at most so many.
    """
    support = confusion.sum(axis=1)
    pairs = [
        ConfusedPair(
            true=class_names[true],
            predicted=class_names[predicted],
            count=int(confusion[true, predicted]),
            share=float(confusion[true, predicted] / support[true]),
        )
        for true, predicted in np.argwhere(confusion > 0)
        if true != predicted
    ]
    pairs.sort(key=lambda pair: (-pair.count, -pair.share, pair.true, pair.predicted))
    return pairs[:count]
