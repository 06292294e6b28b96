"""Where the training loss can lie: what a perfect model has, and what guessing gives.

Without label smoothing these are 0 and ln(classes). Smoothing asks for shares of classes instead of
labels, and no model has a loss below their entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class LossBounds(NamedTuple):
    """In nats: of a model that knows every share exactly, and of one that finds all alike."""

    least: float
    guess: float


def loss_bounds(
    num_classes: int, smoothing: float, *, balanced_counts: Sequence[int] | None = None
) -> LossBounds:
    """The bounds of torch's cross-entropy with label smoothing.

    Args:
        smoothing: in [0, 1).
        balanced_counts: training pictures of each class, where the loss weights classes by their
            inverse; torch then weights the smoothed shares too.
    """
    counts = np.ones(num_classes) if balanced_counts is None else np.asarray(balanced_counts, float)
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)
    other = smoothing / num_classes * weights  # asked for of every other class, (C,)
    own = (1 - smoothing) * weights + other  # of a picture's own, (C,)
    total = own + other.sum() - other
    # Of one picture of each class: total x entropy of the shares that it is asked for.
    least = _x_log_x(total) - (_x_log_x(own) + _x_log_x(other).sum() - _x_log_x(other))
    share = counts / (counts * weights).sum()
    return LossBounds(
        max(0.0, float(share @ least)), float(share @ total) * float(np.log(num_classes))
    )


def _x_log_x(values: NDArray[Any]) -> NDArray[Any]:
    """0 where a value is 0."""
    found: NDArray[Any] = values * np.log(np.where(values > 0, values, 1.0))
    return found
