"""Figures of one trial."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visiontuner.journal import TrialRecord, best_epoch
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREEN,
    ORANGE,
    add_legend,
    as_percent,
    cut,
    describe,
    label_axes,
    panels,
    plot_line,
    whole_steps,
)


def trial_curves(
    trial: TrialRecord, objective: str = "validation_accuracy", *, into: Figure | None = None
) -> Figure:
    """Loss and accuracy of one trial by epoch, training and validation, its best epoch marked.

    Args:
        into: a figure that this function made, to show this trial instead: two thirds of the time.
    """
    title = cut(f"{trial.trial_id}   {describe(trial.configuration)}")
    figure, (left, right) = panels(2, title) if into is None else _emptied(into, title)
    best = trial.best_epoch
    if best is None and trial.epochs:
        found = best_epoch(trial.epochs, objective, "min" if objective.endswith("loss") else "max")
        best = found.step if found else None
    for axes, name in ((left, "loss"), (right, "accuracy")):
        plot_line(axes, *trial.curve(f"train_{name}"), colour=ORANGE, label="Training")
        plot_line(axes, *trial.curve(f"validation_{name}"), colour=BLUE, label="Validation")
        label_axes(axes, "Epoch", name.capitalize())
        whole_steps(axes, [epoch.step for epoch in trial.epochs])
        if best is not None:
            axes.axvline(best, color=GREEN, linewidth=1, linestyle="--", label=f"Best epoch {best}")
    for axes in (left, right):
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))  # tick labels are most of the drawing
    as_percent(right)
    add_legend(left, "upper right")
    return figure


def _emptied(figure: Figure, title: str) -> tuple[Figure, list[Axes]]:
    """The same axes, ticks and labels with nothing drawn in them; these take the time."""
    figure.texts[0].set_text(title)
    for axes in figure.axes:
        for line in [*axes.lines]:
            line.remove()
        legend = axes.get_legend()
        if legend is not None:
            legend.remove()
        axes.relim()
        axes.autoscale(enable=True)
    return figure, figure.axes
