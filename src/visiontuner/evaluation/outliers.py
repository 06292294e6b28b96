"""Which images are unlike the others of their class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
