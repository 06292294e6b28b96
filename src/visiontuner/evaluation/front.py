"""Accuracy against cost: which networks are worth their price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visiontuner.evaluation.intervals import Interval

COSTS = ("ms_one_thread", "megabytes", "dollars_per_million")
"""What the front weighs accuracy against; the less the better."""


@dataclass(frozen=True, kw_only=True)
class NetworkPoint:
    """One network of a search.

    Args:
        accuracy: to expect of the best that was found with it, on other images, corrected for
            having been chosen; a fraction.
        cost: `NetworkCost` as plain values, see `serving/cost.py`.
    """

    backbone: str
    accuracy: Interval
    cost: Mapping[str, Any]

    def to_dict(self, *, on_front: bool) -> dict[str, Any]:
        """Plain JSON values, one row of a table."""
        return {
            "backbone": self.backbone,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            **self.cost,
            "on_front": on_front,
        }


def front(points: Sequence[NetworkPoint]) -> list[NetworkPoint]:
    """The points that no other one beats, in their order.

    One beats another if it is not worse in accuracy and in every cost, and better in one of them.
    """
    return [one for one in points if not any(_beats(other, one) for other in points)]


def _beats(one: NetworkPoint, other: NetworkPoint) -> bool:
    ours, theirs = _all_costs(one), _all_costs(other)
    not_worse = all(a <= b for a, b in zip(ours, theirs, strict=True))
    return not_worse and ours != theirs


def _all_costs(point: NetworkPoint) -> list[float]:
    """All that should be small, the share of wrong answers first."""
    return [1 - point.accuracy.value, *(float(point.cost[name]) for name in COSTS)]


def table(points: Sequence[NetworkPoint]) -> list[dict[str, Any]]:
    """One row a network, the most accurate first."""
    best = {point.backbone for point in front(points)}
    ranked = sorted(points, key=lambda point: -point.accuracy.value)
    return [point.to_dict(on_front=point.backbone in best) for point in ranked]
