"""Folds of a cross-validation: from the images' contents alone, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Measured by `make bench ARGS="--only choice"`: five heads of small sets lack too much.
TEN_FOLDS_UP_TO = 500
FOLDS_UP_TO = 2000
"""Images of training and validation; above, a hold-out of a tenth says as much."""


def folds_for(images: int) -> int | None:
    """How many folds so many training and validation images get; None for a hold-out."""
    if images > FOLDS_UP_TO:
        return None
    return min(10 if images <= TEN_FOLDS_UP_TO else 5, images)


def assign_folds(
    labels: Sequence[int] | NDArray[np.integer],
    digests: Sequence[str],
    *,
    folds: int,
    groups: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """Deal the images of each class out to the folds in turn, in the order of their contents.

    Args:
        labels: int, shape (N,).
        digests: of the images' contents, N.
        groups: of each image, N: those of one group, such as frames of a video, stay together.

    Returns:
        int64, shape (N,), values in [0, folds).

    Raises:
        ValueError: fewer images or groups than folds.
    """
    wanted = np.asarray(labels, dtype=np.int64)
    order = np.array(sorted(range(len(digests)), key=lambda i: (wanted[i], digests[i])), dtype=int)
    assigned = np.empty(len(wanted), dtype=np.int64)
    if groups is not None:
        assigned[order] = _whole_groups(wanted[order], [groups[i] for i in order], folds)
        return assigned
    if len(wanted) < folds:
        raise ValueError(f"{folds} folds of {len(wanted)} images")
    # A class begins where the one before ended, so that folds are of equal size.
    assigned[order] = np.arange(len(wanted)) % folds
    return assigned


def _whole_groups(
    labels: NDArray[np.int64], groups: Sequence[str], folds: int
) -> NDArray[np.int64]:
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import, seldom needed

    if len(set(groups)) < folds:
        raise ValueError(f"{folds} folds of {len(set(groups))} groups")
    assigned = np.empty(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=folds)
    for fold, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
        assigned[rows] = fold
    return assigned
