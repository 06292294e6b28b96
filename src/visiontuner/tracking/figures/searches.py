"""Figures of a whole search; those that need more than the record holds return None."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from visiontuner.evaluation.compare import SearchProgress, mode_of
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.text import csv_row
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABELS,
    ORANGE,
    add_legend,
    as_percent,
    bounds,
    count,
    cut,
    describe,
    finite,
    label_axes,
    literally,
    panels,
    plot_dots,
    plot_line,
    readable,
    short,
    whole_steps,
    zoom,
)
from visiontuner.workarounds.sklearn import without_package

# Which searched value decided the outcome: PED-ANOVA over the finished trials, by Optuna.
#
# Not fANOVA: its forest needs scikit-learn, whose import alone costs 2 s at the end of a search.


MIN_TRIALS = 8
# A search has tens of trials: the best quarter of 16 is four, the usual tenth is one or two.
_BEST_SHARE = 0.25


def importances(record: SearchRecord) -> dict[str, float]:
    """How much each searched value decides whether a trial is among the best quarter.

    Returns:
        Fractions that sum to 1, by name; empty under 8 finished trials with finite values, or where
        nothing varied.

    Source: Watanabe et al. 2023, https://arxiv.org/abs/2304.10255
    """
    trials = [t for t in record.searching().ranking() if math.isfinite(t.best_value or 0.0)]
    trials = sorted(trials, key=lambda trial: trial.trial_id)
    names = [
        name
        for name in (trials[0].configuration if trials else {})
        if all(name in trial.configuration for trial in trials)
        and len({trial.configuration[name] for trial in trials}) > 1
    ]
    varied = len({trial.best_value for trial in trials}) > 1
    if len(trials) < MIN_TRIALS or not names or not varied:
        return {}
    return _ped_anova(trials, names, record.mode)


def _ped_anova(trials: list[TrialRecord], names: list[str], mode: str) -> dict[str, float]:
    with without_package("sklearn"):
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's own notices
            study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
            domains = {name: _domain([t.configuration[name] for t in trials]) for name in names}
            for trial in trials:
                params: Mapping[str, Any] = {n: trial.configuration[n] for n in names}
                study.add_trial(
                    create_trial(params=dict(params), distributions=domains, value=trial.best_value)
                )
            evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
            shares = get_param_importances(study, evaluator=evaluator)
            return {name: float(share) for name, share in shares.items()}
    finally:
        optuna.logging.set_verbosity(verbosity)


def _domain(values: list[Any]) -> Any:
    """The domain that the values came from, as far as they show it."""

    distinct = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(distinct) <= 6 or not all(isinstance(value, int | float) for value in distinct):
        return CategoricalDistribution(distinct)
    low, high = float(distinct[0]), float(distinct[-1])
    return FloatDistribution(low, high, log=low > 0 and high / low > 20)


# The numbers behind a search's figures, as files: what a chart shows, others can compute with.


def search_numbers(record: SearchRecord) -> dict[str, str]:
    """File name -> text.

    Returns:
        `importance.json`: fractions that sum to 1 by searched value, if there is that figure;
        `learning_rate_batch_size.csv`: a row for each usable trial, best first, if both were
        searched.
    """
    files = {}
    shares, ranking = importances(record), record.ranking()
    if shares:
        content = {
            "objective": record.objective,
            "method": "PED-ANOVA over the best quarter",
            "trials": len(ranking),
            "importance": shares,
        }
        files["importance.json"] = json.dumps(content, indent=1) + "\n"
    names = ["learning_rate", "batch_size"]
    rows = [
        [t.trial_id, *(t.configuration[name] for name in names), t.best_value]
        for t in ranking
        if t.configuration.keys() >= set(names)
    ]
    if rows:
        table = [["trial_id", *names, record.objective], *rows]
        files["learning_rate_batch_size.csv"] = "".join(map(csv_row, table))
    return files


# Figures of one trial.


def trial_curves(trial: TrialRecord, *, into: Figure | None = None) -> Figure:
    """Loss and accuracy of one trial by epoch, training and validation, the kept epoch marked.

    Args:
        into: a figure that this function made, to show this trial instead: two thirds of the time.
    """
    title = cut(f"{trial.trial_id}   {describe(trial.configuration)}")
    figure, (left, right) = panels(2, title) if into is None else _emptied(into, title)
    best = trial.best_epoch
    for axes, name in ((left, "loss"), (right, "accuracy")):
        plot_line(axes, *trial.curve(f"train_{name}"), colour=ORANGE, label="Training")
        plot_line(axes, *trial.curve(f"validation_{name}"), colour=BLUE, label="Validation")
        label_axes(axes, "Epoch", name.capitalize())
        whole_steps(axes, [epoch.step for epoch in trial.epochs])
        if best is not None:
            axes.axvline(best, color=GREEN, linewidth=1, linestyle="--", label=f"Kept: {best}")
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


# Several runs, or several searches, in one figure.


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
        labels = readable([curve.label for curve in drawn], 60, "run")
        for position, curve in enumerate(drawn):
            _plot(axes, position, curve, labels[position])
        values = [finite(curve.steps, curve.values)[1] for curve in drawn]
        outside = _zoom_to_the_better_half(axes, values, mode_of(metric))
        label_axes(axes, "Epoch", _label(metric) + (", of the best half" if outside else ""))
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
    labels = readable([search.name for search in searches], 80, "search")
    for position, search in enumerate(searches):
        numbers = np.arange(1, len(search.best) + 1, dtype=float)
        for axes, x in ((left, search.seconds / scale), (right, numbers)):
            _step(axes, position, x, search, labels[position])
    objective = searches[0].objective if searches else ""
    values = [finite(range(len(s.values)), s.values.tolist())[1] for s in searches]
    trials = [value[None] for each in values for value in each]
    for axes in (left, right):
        _zoom_to_the_better_half(axes, trials, mode_of(objective))
    label_axes(left, f"Time since the start ({unit})", _label(objective))
    label_axes(right, "Trials ended", "")
    left.set_xlim(left=0)
    whole_steps(right, [float(len(s.best)) for s in searches] + [1.0])
    if _is_fraction(objective, [float(v) for s in searches for v in s.best]):
        as_percent(left)
        as_percent(right)
    _legend_below(figure, [left, right], columns=1)
    return figure


def _zoom_to_the_better_half(axes: Axes, curves: Sequence[np.ndarray], mode: str) -> int:
    """Limit the y axis to the curves with the better last values; how many values lie outside."""
    known = sorted((c for c in curves if len(c)), key=lambda c: float(c[-1]), reverse=mode == "max")
    if len(known) < 4:
        return 0
    return zoom(axes, np.concatenate(known[: -(-len(known) // 2)]), np.concatenate(known))


def _plot(axes: Axes, position: int, curve: Curve, label: str) -> None:
    x, y = finite(curve.steps, curve.values)
    # An empty line still takes its place in the legend: the run is there, its curve is not.
    axes.plot(
        x, y, **_style(position), marker="o" if len(x) == 1 else None, markersize=4,
        label=label,
    )  # fmt: skip


def _step(axes: Axes, position: int, x: np.ndarray, search: SearchProgress, label: str) -> None:
    best_x, best = finite(x.tolist(), search.best.tolist())
    single_x, single = finite(x.tolist(), search.values.tolist())
    style = _style(position)
    axes.step(best_x, best, where="post", label=label, **style)
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
        legend = figure.legend(
            handles, labels, loc="lower center", ncols=columns, fontsize=8, frameon=False,
            handlelength=2.6,
        )  # fmt: skip
        literally(legend.get_texts())


# The curve of a learning rate range test.


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
        outside = zoom(axes, _values_of(_best_half(record), name), _values_of(trials, name))
        label_axes(axes, "Epoch", LABELS[name] + (", of the best half" if outside else ""))
        whole_steps(axes, [step for curve in curves for step in curve[0]])
        if name != "validation_loss":
            as_percent(axes)
    if best is not None:
        add_legend(both[0], "lower right" if names[0] != "validation_loss" else "upper right")
    return figure


def _best_half(record: SearchRecord) -> list[TrialRecord]:
    """The better half of the usable trials; all of fewer than four."""
    ranking = record.ranking()
    return ranking if len(ranking) < 4 else ranking[: -(-len(ranking) // 2)]


def _values_of(trials: Sequence[TrialRecord], name: str) -> np.ndarray:
    """The finite values of all trials' curves, shape (N,)."""
    return np.concatenate([finite(*trial.curve(name))[1] for trial in trials] or [np.empty(0)])


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
    good = np.array([trial.best_value for trial in _best_half(record)], dtype=float)
    outside = zoom(axes, good[np.isfinite(good)], values[np.isfinite(values)])
    if outside:
        where = "above" if record.mode == "min" else "below"
        figure.texts[0].set_text(
            f"{figure.texts[0].get_text()}   {count(outside, 'trial')} {where}"
        )
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
    good = np.array([t.best_value for t in _best_half(record) if t.best_value is not None])
    columns.append(_Column.of(record.objective, values, bounds(good, np.array(values))))
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
    def of(
        cls, name: str, values: Sequence[object], within: tuple[float, float] | None = None
    ) -> _Column:
        """Of the values of all trials.

        Args:
            within: the ends of the scale; values beyond stand at the end, which says so.
        """
        numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
        distinct = sorted(set(values), key=lambda v: (str(type(v)), v))
        if len(numbers) < len(values) or (len(distinct) <= 6 and name != "learning_rate"):
            # A few choices stand evenly apart, as they were offered.
            places = {v: _place(i, len(distinct)) for i, v in enumerate(distinct)}
            ticks = [(places[v], short(v)) for v in distinct]
            return cls(name, np.array([places[v] for v in values]), ticks)
        log = within is None and min(numbers) > 0 and max(numbers) / min(numbers) > 20
        scaled = np.log10(numbers) if log else np.array(numbers, dtype=float)
        least, most = float(scaled.min()), float(scaled.max())
        low, high = within or (least, most)
        if low == high:
            return cls(name, np.full(len(values), 0.5), [(0.5, short(numbers[0]))])
        ticks = [
            (h, short(10 ** (low + h * (high - low)) if log else low + h * (high - low)))
            for h in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        ticks[0] = (0.0, f"≤ {ticks[0][1]}" if least < low else ticks[0][1])
        ticks[-1] = (1.0, f"≥ {ticks[-1][1]}" if most > high else ticks[-1][1])
        return cls(name, np.clip((scaled - low) / (high - low), 0, 1), ticks)


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
