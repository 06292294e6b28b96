"""Figures of a whole search; those that need more than the record holds return None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREY,
    INK,
    LABELS,
    ORANGE,
    add_legend,
    as_percent,
    count,
    finite,
    label_axes,
    panels,
    plot_dots,
    plot_line,
    short,
    whole_steps,
)
from visiontuner.tracking.importance import importances


def search_figures(record: SearchRecord) -> dict[str, Figure]:
    """Every figure of a search that its record allows, by file name.

    Those of the searched values leave out a second stage, which searched none.
    """
    searching = record.searching()
    drawn = {
        "all_curves": all_curves(record),
        "best_so_far": best_so_far(record),
        "learning_rate_batch_size": learning_rate_batch_size_map(searching),
        "parallel_coordinates": parallel_coordinates(searching),
        "importance": importance(searching),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def all_curves(record: SearchRecord) -> Figure:
    """The objective and the validation loss of all trials by epoch, the best trial on top."""
    names = list(dict.fromkeys([_shown_objective(record), "validation_loss"]))
    trials, best = list(record.trials.values()), record.best
    figure, both = panels(len(names), count(len(trials), "trial") + _outcome(record))
    for axes, name in zip(both, names, strict=True):
        curves = [finite(*trial.curve(name)) for trial in trials]
        lines = [np.column_stack(curve) for curve in curves if len(curve[0])]
        # 500 opaque lines are one grey block; single ones must still be seen.
        alpha = max(0.15, min(0.9, 12 / max(1, len(lines))))
        axes.add_collection(LineCollection(lines, colors=GREY, linewidths=1, alpha=alpha))
        plot_dots(axes, [line for line in lines if len(line) == 1])
        if best is not None:
            plot_line(axes, *best.curve(name), colour=BLUE, label=f"Best: {best.trial_id}")
        axes.autoscale_view()
        label_axes(axes, "Epoch", LABELS[name])
        whole_steps(axes, [step for curve in curves for step in curve[0]])
        if name != "validation_loss":
            as_percent(axes)
    if best is not None:
        add_legend(both[0], "lower right" if names[0] != "validation_loss" else "upper right")
    return figure


def best_so_far(record: SearchRecord) -> Figure:
    """The objective of each finished trial and the best so far, by minutes since the start."""
    figure, (axes,) = panels(1, "Best so far" + _outcome(record))
    began = float(record.started.get("time", 0.0))
    trials = sorted(_usable(record), key=lambda t: (t.ended or 0.0, t.trial_id))
    spent = np.array([max(0.0, (trial.ended or began) - began) for trial in trials])
    values = np.array([trial.best_value for trial in trials], dtype=float)
    scale, unit = (60.0, "min") if spent.size and spent.max() > 180 else (1.0, "s")
    axes.scatter(spent / scale, values, s=22, color=GREY, edgecolors="none", label="One trial")
    if len(values):
        envelope = np.minimum if record.mode == "min" else np.maximum
        running = envelope.accumulate(values)
        axes.step(
            spent / scale, running, where="post", color=BLUE, linewidth=2, label="Best so far"
        )
        add_legend(axes, "lower right" if record.mode == "max" else "upper right")
    label_axes(axes, f"Time since the start ({unit})", LABELS[record.objective])
    _percent_if_fraction(axes, record)
    return figure


def learning_rate_batch_size_map(record: SearchRecord) -> Figure | None:
    """Every finished trial by learning rate and batch size; None unless both were searched."""
    trials = [
        t for t in _usable(record) if {"learning_rate", "batch_size"} <= t.configuration.keys()
    ]
    if not trials:
        return None
    figure, (axes,) = panels(1, "Learning rate × batch size" + _outcome(record), right=0.93)
    rates = np.array([trial.configuration["learning_rate"] for trial in trials], dtype=float)
    sizes = np.array([trial.configuration["batch_size"] for trial in trials], dtype=float)
    values = np.array([trial.best_value for trial in trials], dtype=float)
    points = axes.scatter(
        rates, sizes, c=values,
        s=70 if len(trials) <= 60 else 36, cmap=_colours(record), norm=_norm(values, record),
        edgecolors="white", linewidths=0.8, zorder=2,
    )  # fmt: skip
    axes.scatter(
        rates[-1], sizes[-1], s=190, facecolors="none", edgecolors=ORANGE,
        linewidths=1.8, label=f"Best: {record.best.trial_id if record.best else ''}", zorder=3,
    )  # fmt: skip
    axes.set_xscale("log")
    _log2_axis(axes, sizes)
    axes.margins(0.08, 0.16)
    label_axes(axes, "Learning rate (log scale)", "Batch size")
    add_legend(axes, "upper right", outside=True)
    _colour_bar(figure, points, axes, record)
    return figure


def parallel_coordinates(record: SearchRecord) -> Figure | None:
    """One line a finished trial through all searched values to its objective; None if none is."""
    trials = _usable(record)
    if not trials:
        return None
    names = sorted(set().union(*(trial.configuration for trial in trials)))
    columns = [_Column.of(n, [trial.configuration.get(n) for trial in trials]) for n in names]
    values = [cast(float, trial.best_value) for trial in trials]
    columns.append(_Column.of(record.objective, values))
    figure, (axes,) = panels(1, "Searched values and the outcome" + _outcome(record), right=0.98)
    heights = np.column_stack([column.heights for column in columns])  # (trials, columns)
    lines = [np.column_stack([np.arange(len(columns)), line]) for line in heights]
    width = 1.6 if len(lines) <= 60 else 0.8
    collection = LineCollection(
        lines, cmap=_colours(record), norm=_norm(values, record), linewidths=width
    )
    collection.set_array(np.asarray(values, dtype=float))
    axes.add_collection(collection)
    axes.plot(*lines[-1].T, color=ORANGE, linewidth=2.4, label=f"Best: {_best_name(record)}")
    for position, column in enumerate(columns):
        _draw_scale(axes, position, column, last=position == len(columns) - 1)
    axes.set(xlim=(-0.35, len(columns) - 0.65), ylim=(-0.06, 1.06), yticks=[])
    axes.set_xticks(range(len(columns)), [LABELS.get(c.name, c.name) for c in columns])
    axes.tick_params(axis="x", length=0, pad=8)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    add_legend(axes, "upper right", outside=True)
    return figure


def importance(record: SearchRecord) -> Figure | None:
    """How much each searched value explains of the objective; None under 8 finished trials."""
    shares = importances(record)
    if not shares:
        return None
    figure, (axes,) = panels(1, "What decided the outcome", left=0.19)
    names = sorted(shares, key=lambda name: shares[name])
    bars = axes.barh(
        [LABELS.get(name, name) for name in names],
        [shares[name] for name in names],
        color=BLUE,
        height=0.55,
    )
    axes.bar_label(bars, fmt="{:.0%}", padding=4, color=INK, fontsize=9)
    axes.set_xlim(0, 1.08)
    axes.set_ylim(-0.7, len(names) - 0.3)
    as_percent(axes, axis="x")
    label_axes(axes, f"Importance for {LABELS[record.objective].lower()} (PED-ANOVA)", "")
    return figure


class _Column:
    """One vertical scale: where each value lies in [0, 1], and a few ticks."""

    def __init__(self, name: str, heights: np.ndarray, ticks: list[tuple[float, str]]) -> None:
        self.name, self.heights, self.ticks = name, heights, ticks

    @classmethod
    def of(cls, name: str, values: Sequence[object]) -> _Column:
        numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
        distinct = sorted(set(values), key=lambda v: (str(type(v)), v))
        if len(numbers) < len(values) or (len(distinct) <= 6 and name != "learning_rate"):
            # A few choices stand evenly apart, as they were offered.
            places = {v: _place(i, len(distinct)) for i, v in enumerate(distinct)}
            ticks = [(places[v], short(v)) for v in distinct]
            return cls(name, np.array([places[v] for v in values]), ticks)
        log = min(numbers) > 0 and max(numbers) / min(numbers) > 20
        scaled = np.log10(numbers) if log else np.array(numbers, dtype=float)
        low, high = float(scaled.min()), float(scaled.max())
        if low == high:
            return cls(name, np.full(len(values), 0.5), [(0.5, short(numbers[0]))])
        ticks = [
            (h, short(10 ** (low + h * (high - low)) if log else low + h * (high - low)))
            for h in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        return cls(name, (scaled - low) / (high - low), ticks)


def _place(index: int, count: int) -> float:
    return 0.5 if count == 1 else index / (count - 1)


def _draw_scale(axes: Axes, position: int, column: _Column, *, last: bool) -> None:
    axes.plot([position, position], [0, 1], color=INK, linewidth=1, zorder=3)
    for height, text in column.ticks:
        axes.annotate(
            text,
            (position, height),
            xytext=(6 if last else -6, 0),
            textcoords="offset points",
            ha="left" if last else "right",
            va="center",
            fontsize=8,
            color=INK,
            zorder=4,
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
        )


def _percent_if_fraction(axes: Axes, record: SearchRecord) -> None:
    if record.objective != "validation_loss":
        as_percent(axes)


def _log2_axis(axes: Axes, sizes: np.ndarray) -> None:
    """Batch sizes on a log scale, labelled with the numbers themselves."""
    axes.set_yscale("log", base=2)
    distinct = np.unique(sizes)
    shown = distinct if len(distinct) <= 8 else 2.0 ** np.arange(
        np.floor(np.log2(distinct[0])), np.ceil(np.log2(distinct[-1])) + 1
    )  # fmt: skip
    axes.set_yticks(shown)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _colour_bar(figure: Figure, points: Any, axes: Axes, record: SearchRecord) -> None:
    bar = figure.colorbar(points, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(LABELS[record.objective], fontsize=9, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5, colors=INK, length=3)
    if record.objective != "validation_loss":
        as_percent(bar.ax)


def _colours(record: SearchRecord) -> str:
    """Yellow is better, whichever way the objective goes."""
    return "viridis" if record.mode == "max" else "viridis_r"


def _norm(values: Sequence[float] | np.ndarray, record: SearchRecord) -> Normalize:
    """Colours over the better nine tenths: one diverged trial must not make all others alike."""
    low, high = np.min(values), np.max(values)
    if len(values) >= 10 and record.mode == "max":
        low = np.quantile(values, 0.1)
    elif len(values) >= 10:
        high = np.quantile(values, 0.9)
    room = 1e-3 if high <= low else 0.0
    return Normalize(low - room, high + room, clip=True)


def _usable(record: SearchRecord) -> list[TrialRecord]:
    """Trials that ended in order with a finite value; the best comes last, so it is on top."""
    return [trial for trial in record.ranking()[::-1] if trial.best_value is not None]


def _shown_objective(record: SearchRecord) -> str:
    return record.objective if record.objective in LABELS else "validation_accuracy"


def _best_name(record: SearchRecord) -> str:
    return record.best.trial_id if record.best else ""


def _outcome(record: SearchRecord) -> str:
    best = record.best
    if best is None or best.best_value is None:
        return ""
    value = f"{best.best_value:.4f}" if record.mode == "min" else f"{best.best_value:.1%}"
    return f"   best {value} ({best.trial_id})"
