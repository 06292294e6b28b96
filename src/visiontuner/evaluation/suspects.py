"""Which labels are probably wrong, and which images are unlike the others of their class.

Labels: confident learning on answers to images that were held out. Outliers: distances of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# On five draws of 5 % swapped labels of flowers5 the precision was .74 with it and .65 without, the
# recall .77 and .83; on dogs24 it changed nothing. docs/insight.md has the other rules.
HIGHEST_SELF_CONFIDENCE = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class SuspectLabels:
    """Labels that are probably wrong, the surest first.

    Args:
        rows: int64, shape (S,), which of the images.
        suggested: int64, shape (S,), the most probable of the other classes.
        scores: float64, shape (S,), in [0, 1], falling: one minus the label's own probability.
    """

    rows: NDArray[np.int64]
    suggested: NDArray[np.int64]
    scores: NDArray[np.float64]


def find_suspect_labels(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer]
) -> SuspectLabels:
    """The images whose labels have the lowest probability, as many as seem to be mislabelled.

    An image seems to be of another class if that class's probability reaches what it has on average
    among the images labelled so, and no class does so with a higher one (the confident joint). As
    many images as that counts are named, those with the lowest probability of their own label; none
    whose label has more than 5 %.

    Args:
        probabilities: shape (N, C), rows sum to 1; each by a model that was not fitted to the
            image.
        labels: shape (N,), values in [0, C).

    Raises:
        ValueError: not one row of probabilities for each label.

    Source: Northcutt et al. 2021, sections 3.1 and 3.2, https://arxiv.org/abs/1911.00068
    """
    if probabilities.ndim != 2 or len(probabilities) != len(labels):
        raise ValueError(f"{len(labels)} labels and probabilities of shape {probabilities.shape}")
    values, every = probabilities.astype(np.float64), np.arange(len(labels))
    own = values[every, labels]
    count = _count_mislabelled(values, own, labels)
    others = values.copy()
    others[every, labels] = -1.0
    suggested = others.argmax(axis=1)
    lowest = np.argsort(own, kind="stable")[:count]
    wrong = (own[lowest] <= HIGHEST_SELF_CONFIDENCE) & (
        own[lowest] < values[lowest, suggested[lowest]]
    )
    rows = lowest[wrong]
    return SuspectLabels(rows=rows, suggested=suggested[rows], scores=1.0 - own[rows])


def _count_mislabelled(
    values: NDArray[np.float64], own: NDArray[np.float64], labels: NDArray[np.integer]
) -> int:
    """The images that count off the diagonal of the confident joint."""
    images = np.bincount(labels, minlength=values.shape[1])
    sums = np.bincount(labels, weights=own, minlength=values.shape[1])
    means = np.where(images > 0, sums / np.maximum(images, 1), np.inf)  # (C,)
    reached = np.where(values >= means, values, -1.0)  # (N, C)
    return int(((reached.max(axis=1) >= 0) & (reached.argmax(axis=1) != labels)).sum())


NEIGHBOURS = 5
# Of 1,680 dogs 25 are above it and of 750 flowers 3; docs/insight.md says what they show.
UNLIKE_ITS_CLASS = 3.5
_FEWEST_IMAGES = 10  # of a class: fewer have no usual distance
_MOST_COMPARED = 2_000  # of a class's images, with which each is compared
_BLOCK = 1024
_LEAST_DEVIATION = 0.01  # of a cosine: in a class of copies a speck of dust would be many of them
_NORMAL = 1.4826  # median absolute deviations of a normal distribution in one standard deviation


def class_deviations(
    features: NDArray[np.float32], labels: NDArray[np.int64], units: Sequence[str]
) -> NDArray[np.float64]:
    """How much farther each image is from its class than the class's images usually are.

    The distance is one minus the mean cosine to the five nearest images of the class that are not
    of the image's own unit. From it the class's median is taken, and the rest is given in robust
    standard deviations (median absolute deviation) of the class.

    Args:
        features: float32, shape (N, D).
        labels: int64, shape (N,).
        units: N names; images of one name are copies, or of one group.

    Returns:
        float64, shape (N,); NaN in classes of fewer than ten images.
    """
    deviations = np.full(len(labels), np.nan)
    names = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)[1]
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < _FEWEST_IMAGES:
            continue
        others = np.sort(rng.permutation(rows)[:_MOST_COMPARED])
        distances = _distances(features, names, rows, others)
        far = distances - np.median(distances)
        deviation = max(_LEAST_DEVIATION, _NORMAL * float(np.median(np.abs(far))))
        deviations[rows] = far / deviation
    return deviations


def _distances(
    features: NDArray[np.float32],
    units: NDArray[np.int64],
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
) -> NDArray[np.float64]:
    """From some images to their nearest among others, float64, shape (R,)."""
    compared = _of_length_one(features[others])
    distances = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        similar = _of_length_one(features[block]) @ compared.T  # (B, O)
        similar[units[block][:, None] == units[others][None]] = -1.0
        nearest = np.partition(similar, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]
        distances[start : start + len(block)] = 1.0 - nearest.mean(axis=1, dtype=np.float64)
    return distances


def _of_length_one(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
