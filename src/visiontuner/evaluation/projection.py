"""Features in two dimensions: which images are shown, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visiontuner.model.novelty import balanced_sample

MOST_POINTS = 5_000
_UMAP_FROM = 50  # images; of fewer PCA shows as much
_UMAP_DIMENSIONS = 50  # of PCA before it
_NO_EXTENT = 1e-6  # of features of length 1: a rounding error


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Where images are on the map.

    Args:
        places: float64, shape (N, 2), in [0, 1].
        method: `PCA` or `UMAP`.
        explained: share of the features' variance that two principal components have; None of UMAP.
    """

    places: NDArray[np.float64]
    method: str
    explained: float | None


def choose_points(labels: NDArray[np.int64], marked: Sequence[bool]) -> NDArray[np.int64]:
    """All images, or 5,000 of them: those that are marked, and of each class as many of the others.

    Marked images take half of the places at most.

    Args:
        labels: int64, shape (N,).
        marked: N values.

    Returns:
        Rows, int64, ascending.
    """
    if len(labels) <= MOST_POINTS:
        return np.arange(len(labels))
    named = np.flatnonzero(np.asarray(marked))
    named = named[balanced_sample(labels[named], MOST_POINTS // 2)]
    others = np.setdiff1d(np.arange(len(labels)), named)
    others = others[balanced_sample(labels[others], MOST_POINTS - len(named))]
    return np.sort(np.concatenate([named, others]))


def project(features: NDArray[np.float32]) -> Projection:
    """Two dimensions of features of unit length: UMAP where it is installed, else PCA.

    The same features give the same places.

    Args:
        features: float32, shape (N, D), N >= 3.

    Source: McInnes et al. 2018, https://arxiv.org/abs/1802.03426
    """
    from sklearn.decomposition import PCA  # a second to import

    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    units = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    if float(np.ptp(units, axis=0).max()) < _NO_EXTENT:
        return Projection(places=np.full((len(units), 2), 0.5), method="PCA", explained=None)
    umap = _umap() if len(units) >= _UMAP_FROM else None
    size = min(2 if umap is None else _UMAP_DIMENSIONS, *units.shape)
    pca = PCA(size, svd_solver="randomized", random_state=0)
    places = np.asarray(pca.fit_transform(units), dtype=np.float64)
    if umap is not None:
        return Projection(places=_scaled(umap(places)), method="UMAP", explained=None)
    explained = float(pca.explained_variance_ratio_[:2].sum())
    return Projection(
        places=_scaled(places),
        method="PCA",
        explained=round(explained, 4) if math.isfinite(explained) else None,
    )


def _umap() -> Callable[[NDArray[np.float64]], NDArray[np.float64]] | None:
    """umap-learn's projection of (N, D) to (N, 2); None where it is not installed or broken."""
    try:
        from umap import UMAP
    except (ImportError, AttributeError, OSError):  # numba may not know this numpy
        return None

    def fit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        # One thread, which is what a seed demands; said so that it does not warn.
        reducer = UMAP(n_components=2, random_state=0, n_jobs=1)
        return np.asarray(reducer.fit_transform(rows), dtype=np.float64)

    return fit


def _scaled(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Into [0, 1], each dimension by its own range; one of no extent is in the middle."""
    if places.shape[1] == 1:
        places = np.hstack([places, np.zeros_like(places)])
    low, high = places.min(axis=0), places.max(axis=0)
    varies = high - low > _NO_EXTENT
    extent = np.where(varies, high - low, 1.0)
    scaled: NDArray[np.float64] = np.where(varies, (places - low) / extent, 0.5)
    return scaled
