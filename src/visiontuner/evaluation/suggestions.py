"""Which unlabelled images would teach a classifier most."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

MORE_CANDIDATES = 4
"""Candidates for each image that is chosen: those the model is least sure of."""
_ITERATIONS = 30
_MOST_CANDIDATES = 20_000


def choose_images(
    features: NDArray[np.float32], probabilities: NDArray[np.float64], budget: int
) -> NDArray[np.int64]:
    """Images that a model is unsure of and that differ from each other.

    Of the images with the smallest margin between the two most probable classes, four for each that
    is wanted, k-means makes as many groups as are wanted; an image counts the more, the smaller its
    margin. Of each group the image nearest to its mean is chosen. The same images give the same.

    Args:
        features: float32, shape (N, D).
        probabilities: shape (N, C), rows sum to 1.
        budget: how many to choose; all, if there are fewer.

    Returns:
        int64, shape (min(budget, N),), each once; the smallest margin first.

    Source: Citovsky et al. 2021 (margin, then diversity), https://arxiv.org/abs/2107.14263
    """
    margins = _margins(probabilities)
    most = max(budget, min(MORE_CANDIDATES * budget, _MOST_CANDIDATES))
    candidates = np.argsort(margins, kind="stable")[:most]
    if len(candidates) <= budget:
        return candidates
    chosen = candidates[_spread(features[candidates], 1 - margins[candidates], budget)]
    return chosen[np.argsort(margins[chosen], kind="stable")]


def _margins(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Between the two most probable classes, float64, shape (N,)."""
    highest = np.partition(probabilities, -2, axis=1)[:, -2:]
    margins: NDArray[np.float64] = highest[:, 1] - highest[:, 0]
    return margins


def _spread(
    features: NDArray[np.float32], weights: NDArray[np.float64], number: int
) -> NDArray[np.int64]:
    """Rows nearest to the means of as many groups, int64, shape (number,)."""
    from sklearn.cluster import KMeans  # a second to import, needed by one command
    from sklearn.exceptions import ConvergenceWarning

    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    groups = KMeans(number, n_init=1, max_iter=_ITERATIONS, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than groups
        groups.fit(units, sample_weight=weights)
    distances = groups.transform(units)[np.arange(len(units)), groups.labels_]
    order = np.lexsort((distances, groups.labels_))
    _, first = np.unique(groups.labels_[order], return_index=True)
    rows = order[first]
    # Equal images leave groups empty: the surest of the unsure fill up.
    rest = np.setdiff1d(np.arange(len(units)), rows)[: number - len(rows)]
    return np.concatenate([rows, rest])
