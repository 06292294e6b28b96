"""The curve of a learning rate range test."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from visiontuner.tracking.figures.parts import (
    BLUE,
    GREEN,
    GREY,
    add_legend,
    cut,
    label_axes,
    panels,
    short,
)


def range_test_curve(
    title: str,
    learning_rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    *,
    suggested: tuple[float, float, float] | None,
) -> Figure:
    """Loss over the learning rate on a log scale, every step and smoothed.

    Args:
        suggested: lowest, best and highest learning rate of the suggestion, if there is one.
    """
    figure, (axes,) = panels(1, cut(title))
    axes.plot(learning_rates, losses, color=GREY, linewidth=1, label="Each step")
    axes.plot(learning_rates, smoothed, color=BLUE, linewidth=1.8, label="Smoothed")
    if suggested is not None:
        low, best, high = suggested
        axes.axvspan(low, high, color=GREEN, alpha=0.12, label=f"{short(low)} to {short(high)}")
        axes.axvline(best, color=GREEN, linewidth=1.4, linestyle="--", label=short(best))
    axes.set_xscale("log")
    # A loss that explodes must not flatten the fall.
    first, lowest = smoothed[0], min(smoothed)
    room = max(first - lowest, 0.05 * first)
    axes.set_ylim(lowest - 0.05 * room, max(first, min(max(losses), first + 0.3 * room)))
    label_axes(axes, "Learning rate", "Training loss")
    add_legend(axes)
    return figure
