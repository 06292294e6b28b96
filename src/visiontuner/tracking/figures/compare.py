"""Several runs, or several searches, in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visiontuner.evaluation.compare import mode_of
from visiontuner.evaluation.progress import SearchProgress
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREEN,
    INK,
    LABELS,
    ORANGE,
    as_percent,
    count,
    cut,
    finite,
    label_axes,
    panels,
    whole_steps,
)

# Okabe and Ito's colours, without the yellow that vanishes on white; then again, dashed.
_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK)
_DASHES = ("-", "--", ":")
MOST_CURVES = len(_COLOURS) * len(_DASHES)


class Curve(NamedTuple):
    """One run's values of one metric by step."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


def learning_curves(curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """The curves of several runs, one panel for each metric; a run keeps its colour.

    Args:
        curves: metric -> its curves, at most `MOST_CURVES`; every panel holds the same runs in the
            same order, an empty curve where a run has none.
    """
    runs = max((len(drawn) for drawn in curves.values()), default=0)
    figure, row = panels(max(1, len(curves)), f"Learning curves of {count(runs, 'run')}")
    _make_room(figure, runs)
    for axes, (metric, drawn) in zip(row, curves.items(), strict=False):
        for position, curve in enumerate(drawn):
            _plot(axes, position, curve)
        label_axes(axes, "Epoch", _label(metric))
        whole_steps(axes, [step for curve in drawn for step in curve.steps])
        if _is_fraction(metric, [value for curve in drawn for value in curve.values]):
            as_percent(axes)
    _legend_below(figure, row)
    return figure


def searches_side_by_side(searches: Sequence[SearchProgress]) -> Figure:
    """The best so far of several searches, by seconds and by trials."""
    figure, (left, right) = panels(2, "Best so far of " + _searches(len(searches)))
    _make_room(figure, len(searches), columns=1)
    longest = max((float(s.seconds.max(initial=0.0)) for s in searches), default=0.0)
    scale, unit = (60.0, "min") if longest > 180 else (1.0, "s")
    for position, search in enumerate(searches):
        numbers = np.arange(1, len(search.best) + 1, dtype=float)
        for axes, x in ((left, search.seconds / scale), (right, numbers)):
            _step(axes, position, x, search)
    objective = searches[0].objective if searches else ""
    label_axes(left, f"Time since the start ({unit})", _label(objective))
    label_axes(right, "Trials ended", "")
    left.set_xlim(left=0)
    whole_steps(right, [float(len(s.best)) for s in searches] + [1.0])
    if _is_fraction(objective, [float(v) for s in searches for v in s.best]):
        as_percent(left)
        as_percent(right)
    _legend_below(figure, [left, right], columns=1)
    return figure


def _plot(axes: Axes, position: int, curve: Curve) -> None:
    x, y = finite(curve.steps, curve.values)
    # An empty line still takes its place in the legend: the run is there, its curve is not.
    axes.plot(
        x, y, **_style(position), marker="o" if len(x) == 1 else None, markersize=4,
        label=cut(curve.label, 60),
    )  # fmt: skip


def _step(axes: Axes, position: int, x: np.ndarray, search: SearchProgress) -> None:
    best_x, best = finite(x.tolist(), search.best.tolist())
    single_x, single = finite(x.tolist(), search.values.tolist())
    style = _style(position)
    axes.step(best_x, best, where="post", label=cut(search.name, 80), **style)
    axes.scatter(single_x, single, s=12, color=style["color"], alpha=0.35, edgecolors="none")


def _style(position: int) -> dict[str, Any]:
    dash = _DASHES[position // len(_COLOURS) % len(_DASHES)]
    return {"color": _COLOURS[position % len(_COLOURS)], "linestyle": dash, "linewidth": 1.6}


def _label(metric: str) -> str:
    return LABELS.get(metric, cut(metric, 40))


def _is_fraction(metric: str, values: Sequence[float]) -> bool:
    """Of other tools' metrics nobody knows the unit: between 0 and 1 and more is better."""
    _, known = finite(range(len(values)), values)
    return mode_of(metric) == "max" and bool(len(known)) and 0 <= known.min() <= known.max() <= 1


def _searches(number: int) -> str:
    return f"{number} search" + ("" if number == 1 else "es")


def _make_room(figure: Figure, entries: int, columns: int = 3) -> None:
    """Taller by the lines of a legend below the axes, so that it hides no curve."""
    width, height = figure.get_size_inches()
    extra = 0.2 * -(-entries // columns) + 0.1  # inches: 8.5 points and some air a line
    figure.set_size_inches(width, height + extra)
    figure.subplots_adjust(
        bottom=(0.16 * height + extra) / (height + extra),
        top=1 - 0.14 * height / (height + extra),
    )
    for text in figure.texts:
        text.set_y(1 - 0.065 * height / (height + extra))


def _legend_below(figure: Figure, row: Sequence[Axes], columns: int = 3) -> None:
    handles, labels = row[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="lower center", ncols=columns, fontsize=8, frameon=False,
            handlelength=2.6,
        )  # fmt: skip
