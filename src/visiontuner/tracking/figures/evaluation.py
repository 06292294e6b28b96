"""Figures of an evaluation on the test images, and of a drift check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray
from PIL import Image

from visiontuner.evaluation.drift import CLASSES, FEATURES, Measure, Observations
from visiontuner.evaluation.scores import confused_pairs
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    add_legend,
    as_percent,
    count,
    label_axes,
    literally,
    panels,
    readable,
)

if TYPE_CHECKING:
    from visiontuner.evaluation.calibration import Reliability, RiskCoverage
    from visiontuner.evaluation.report import EvaluationReport
    from visiontuner.evaluation.scores import Threshold

# Images side by side with what was said about them.


_DPI = 90  # as `to_png` draws: one pixel of an image is one pixel of the sheet
_TILE, _GAP, _CAPTION = 168, 12, 40
_COLUMNS = 6

AnyImage = Image.Image | NDArray[np.uint8]
Caption = tuple[str, str, float]
"""True class, predicted class, probability of the predicted one."""


def contact_sheet(
    images: Sequence[AnyImage], captions: Sequence[Caption], class_names: Sequence[str]
) -> Figure:
    """The most confidently wrong images, six in a row, with their true and predicted classes.

    Args:
        images: Pillow images, or uint8 arrays of shape (H, W, 3); shown whole, as they are.
        captions: one for each image.
        class_names: a name that no font here has is `class 12`, its place in them, as in every
            other figure.

    Raises:
        ValueError: no images, or not one caption for each.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions")
    wide, narrow = (
        dict(zip(class_names, readable(class_names, length), strict=True)) for length in (26, 19)
    )
    said = [
        (wide.get(true, true), f"→ {narrow.get(predicted, predicted)} {probability:.0%}")
        for true, predicted, probability in captions
    ]
    return image_sheet(images, said)


def image_sheet(
    images: Sequence[AnyImage],
    captions: Sequence[tuple[str, str]],
    *,
    tile: int = _TILE,
    columns: int = _COLUMNS,
    title_lines: int = 0,
) -> Figure:
    """Images in rows, each with two lines below it.

    Args:
        tile: sides of an image's place, in pixels.
        title_lines: for how many lines there is room above.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    caption = _CAPTION if any(second for _, second in captions) else _CAPTION - 15
    width = columns * (tile + _GAP) + _GAP
    above = 18 * title_lines
    height = rows * (tile + caption + _GAP) + _GAP + above
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    sheet = Image.new("RGB", (width, height), "white")
    for index, (image, (first, second)) in enumerate(zip(images, captions, strict=True)):
        left = _GAP + index % columns * (tile + _GAP)
        top = above + _GAP + index // columns * (tile + caption + _GAP)
        small = _fitted(image, tile)
        sheet.paste(small, (left + (tile - small.width) // 2, top + tile - small.height))
        line = height - top - tile - 14
        literally([
            figure.text(left / width, line / height, first, fontsize=8, color=INK),
            figure.text(left / width, (line - 15) / height, second, fontsize=8, color=ORANGE),
        ])  # fmt: skip
    axes = figure.add_axes((0, 0, 1, 1), zorder=-1)
    axes.imshow(sheet, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    return figure


def _fitted(shown: AnyImage, tile: int) -> Image.Image:
    image = shown if isinstance(shown, Image.Image) else Image.fromarray(shown)
    image = image.convert("RGB")
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


LARGEST_MATRIX = 30
_SHOWN_PAIRS = 20
_SHOWN_CLASSES = 30


def evaluation_figures(
    report: EvaluationReport,
    reliability_before: Reliability,
    reliability_after: Reliability,
    risk_coverage: RiskCoverage,
) -> dict[str, Figure]:
    """Every figure of an evaluation, by file name; all numbers are of test.

    Up to 30 classes there is a confusion matrix, above that the most confused pairs, if any.
    """
    drawn = {
        "reliability": reliability_diagram(report, reliability_before, reliability_after),
        "risk_coverage": risk_coverage_curve(risk_coverage, report.threshold),
        "per_class": per_class(report),
    }
    if len(report.class_names) <= LARGEST_MATRIX:
        drawn["confusion"] = confusion_matrix(report.confusion, report.class_names)
    else:
        drawn["confused_pairs"] = most_confused(report.confusion, report.class_names)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def reliability_diagram(
    report: EvaluationReport, before: Reliability, after: Reliability
) -> Figure:
    """Confidence against accuracy, before and after temperature scaling; a dot's area is its share.

    Source: Guo et al. 2017, figure 1, https://arxiv.org/abs/1706.04599
    """
    figure, both = panels(2, "Can the probabilities be trusted?", height=3.9)
    tables = {
        "Before": (before, report.metrics.get("ece_uncalibrated")),
        f"Temperature {report.temperature:.3g}": (after, report.metrics.get("ece")),
    }
    for axes, (title, (table, error)) in zip(both, tables.items(), strict=True):
        _draw_reliability(axes, table)
        said = f"{title}: calibration error {error.value:.1%}" if error else title
        axes.text(0, 1.02, said, transform=axes.transAxes, fontsize=9, color=INK)
    label_axes(both[0], "Confidence", "Accuracy")
    label_axes(both[1], "Confidence", "")
    add_legend(both[1], "lower right")
    return figure


def risk_coverage_curve(curve: RiskCoverage, threshold: Threshold | None) -> Figure:
    """What share of the answers is wrong if only the most confident count, and the threshold."""
    figure, (axes,) = panels(1, f"Answer less, err less   area {curve.area:.4f}")
    axes.step(curve.coverage, curve.risk, where="pre", color=BLUE, linewidth=1.8)
    highest = float(np.max(curve.risk, initial=0.0))
    if threshold is not None:
        wanted = 1 - threshold.wanted_precision
        axes.axhline(wanted, color=GREY, linewidth=1, linestyle="--",
                     label=f"Wanted: at most {wanted:.1%} wrong")  # fmt: skip
        highest = max(highest, wanted, _draw_threshold(axes, threshold))
        add_legend(axes, "upper right", outside=True)
    axes.set(xlim=(0, 1.02), ylim=(-0.03 * (highest or 1), 1.12 * highest or 1.0))
    as_percent(axes)
    as_percent(axes, axis="x")
    label_axes(axes, "Answered images (coverage)", "Wrong among them (risk)")
    return figure


def confusion_matrix(confusion: NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Counts by true class (rows) and predicted class (columns); colour is the share of the row."""
    names, size = readable(class_names), len(class_names)
    height = max(3.4, min(8.6, 2.4 + 0.235 * size))
    right = _image_counts(int(np.trace(confusion)), int(confusion.sum()))
    figure, (axes,) = panels(1, f"Confusion   {right}", left=0.25, height=height)
    figure.subplots_adjust(bottom=1.75 / height)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    small = 8.5 if size <= 15 else 7
    for row, column in np.argwhere(confusion > 0):
        # Mistakes stand out from what is right.
        wrong, dark = row != column, shares[row, column] > 0.55
        colour = "white" if dark else (ORANGE if wrong else INK)
        axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center",
                  fontsize=small, color=colour, weight="bold" if wrong else "normal")  # fmt: skip
    axes.set_xticks(range(size), names, rotation=90 if size > 8 else 30,
                    ha="center" if size > 8 else "right", fontsize=small)  # fmt: skip
    axes.set_yticks(range(size), names, fontsize=small)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    literally([*axes.get_xticklabels(), *axes.get_yticklabels()])
    label_axes(axes, "Predicted", "True")
    return figure


def most_confused(confusion: NDArray[np.int64], class_names: Sequence[str]) -> Figure | None:
    """The pairs of classes with the most mistakes between them; None without any mistake."""
    pairs = confused_pairs(confusion, readable(class_names), _SHOWN_PAIRS)
    if not pairs:
        return None
    wrong = int(confusion.sum() - np.trace(confusion))
    figure, (axes,) = panels(
        1, f"Most confused   {count(wrong, 'mistake')} in all", left=0.42,
        height=1.3 + 0.25 * len(pairs),
    )  # fmt: skip
    places = range(len(pairs))
    bars = axes.barh(places, [pair.count for pair in pairs], color=BLUE, height=0.6)
    axes.bar_label(
        bars, [f"{p.count} ({p.share:.0%})" for p in pairs], padding=4, color=INK, fontsize=8
    )
    axes.set_yticks(places, [f"{pair.true} → {pair.predicted}" for pair in pairs], fontsize=8)
    literally(axes.get_yticklabels())
    axes.set_xlim(0, 1.15 * max(pair.count for pair in pairs))
    axes.grid(visible=False, axis="y")
    _from_the_top(axes, len(pairs))
    label_axes(axes, "Images of the true class taken for the other (share of the class)", "")
    return figure


def per_class(report: EvaluationReport) -> Figure | None:
    """Recall and precision of the classes with the lowest F1; None without test images."""
    scored = [s for s in report.classes if not math.isnan(s.f1)]
    shown = sorted(scored, key=lambda score: (score.f1, score.name))[:_SHOWN_CLASSES]
    if not shown:
        return None
    names = dict(zip(report.class_names, readable(report.class_names), strict=True))
    some = f"the weakest {len(shown)} of {len(scored)}" if len(shown) < len(scored) else "all"
    figure, (axes,) = panels(
        1, f"Recall and precision of the classes   {some}", left=0.3,
        height=1.3 + 0.23 * len(shown),
    )  # fmt: skip
    places = np.arange(len(shown))
    recall = np.array([score.recall for score in shown])
    precision = np.array([score.precision for score in shown])
    axes.hlines(places, np.fmin(recall, precision), np.fmax(recall, precision), colors=GREY)
    axes.scatter(recall, places, s=34, color=BLUE, label="Recall", zorder=3)
    # Rings, so that equal values show both.
    axes.scatter(precision, places, s=74, facecolors="none", edgecolors=ORANGE, linewidths=1.6,
                 label="Precision", zorder=4)  # fmt: skip
    labels = [f"{names[score.name]}  ({score.support})" for score in shown]
    axes.set_yticks(places, labels, fontsize=8)
    literally(axes.get_yticklabels())
    lowest = float(np.nanmin(np.concatenate([recall, precision, [1.0]])))
    axes.set_xlim(max(-0.02, lowest - 0.06), 1.02)
    _from_the_top(axes, len(shown))
    as_percent(axes, axis="x")
    label_axes(axes, "On test; how many images of the class there are stands in brackets", "")
    add_legend(axes, "upper right", outside=True)
    return figure


def _draw_reliability(axes: Axes, table: Reliability) -> None:
    full = table.count > 0
    confidence, accuracy = table.confidence[full], table.accuracy[full]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="As good as it says")
    axes.vlines(confidence, np.minimum(confidence, accuracy), np.maximum(confidence, accuracy),
                colors=ORANGE, linewidth=1.6, alpha=0.7, label="Gap")  # fmt: skip
    share = table.count[full] / max(1, table.count.sum())
    axes.scatter(confidence, accuracy, s=14 + 420 * share, color=BLUE, alpha=0.85,
                 edgecolors="white", linewidths=0.8, zorder=3)  # fmt: skip
    axes.set(xlim=(0, 1.05), ylim=(-0.04, 1.06))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(0.2))
    as_percent(axes)
    as_percent(axes, axis="x")


def _draw_threshold(axes: Axes, threshold: Threshold) -> float:
    """What the threshold reached on test, with its intervals; returns the highest risk."""
    if threshold.value is None or threshold.precision is None:
        chosen = threshold.value is not None
        said = (
            "No answer on test reached it" if chosen else "No confidence was enough on validation"
        )
        axes.plot([], [], " ", label=said)
        return 0.0
    precision, coverage = threshold.precision, threshold.coverage
    axes.errorbar(
        [coverage.value], [1 - precision.value],
        xerr=[[coverage.value - coverage.low], [coverage.high - coverage.value]],
        yerr=[[precision.high - precision.value], [precision.value - precision.low]],
        fmt="o", color=GREEN, markersize=7, linewidth=1.4, capsize=3, zorder=4,
        label=f"Confidence ≥ {threshold.value:.3f}: {precision.value:.1%} right, "
        f"{coverage.value:.0%} answered",
    )  # fmt: skip
    return 1 - precision.low


def _from_the_top(axes: Axes, rows: int) -> None:
    axes.set_ylim(rows - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _image_counts(right: int, total: int) -> str:
    return f"{right:,} of {count(total, 'image')} right"


# Accuracy against what an answer costs, one point a network.


_MARKERS = "os^vDP*Xh<"


def network_front(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Networks by milliseconds and by size, with intervals; those of the front are joined.

    Args:
        rows: as `evaluation.compare.front_table` makes them.
    """
    figure, both = panels(2, "Networks: accuracy against what an answer costs on this machine")
    names = readable([str(row["backbone"]).removeprefix("timm:") for row in rows])
    costs = {"ms_one_thread": "Milliseconds an image, one thread", "megabytes": "MB"}
    for axes, (column, unit) in zip(both, costs.items(), strict=True):
        front = sorted((row for row in rows if row["on_front"]), key=lambda row: row[column])
        line = [row[column] for row in front], [row["accuracy"] for row in front]
        axes.plot(*line, color=GREEN, linewidth=1, zorder=1)
        for row, name, marker in zip(rows, names, cycle(_MARKERS)):
            _draw_network(axes, row, column, name, marker)
        axes.margins(x=0.15)
        label_axes(axes, unit, "Accuracy to expect" if axes is both[0] else "")
        as_percent(axes)
    low, high = both[1].get_xlim()
    both[1].set_xlim(right=high + 0.7 * (high - low))  # room for the names
    add_legend(both[1], "lower right")
    return figure


def _draw_network(axes: Axes, row: Mapping[str, Any], column: str, name: str, marker: str) -> None:
    value = row["accuracy"]
    axes.errorbar(
        row[column],
        value,
        yerr=[[value - row["accuracy_low"]], [row["accuracy_high"] - value]],
        fmt=marker,
        color=GREEN if row["on_front"] else GREY,
        capsize=3,
        label=name,
        zorder=2,
    )


_DRIFT_COLUMNS = 3
_ROW_HEIGHT = 2.1  # inches
_BINS = 24
_UNITS = {
    "brightness": "Brightness (0 to 255)",
    "contrast": "Contrast (gray levels)",
    "sharpness": "Sharpness (gray levels a pixel)",
    "side": "Shorter side (pixels)",
    "novelty": "Novelty",
    "confidence": "Top probability",
}


class ClassShares(Protocol):
    """What of a class is drawn: its share of the answers before and now."""

    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> float: ...
    @property
    def images(self) -> float: ...


def drift_figure(
    measures: Sequence[Measure],
    classes: Sequence[ClassShares],
    reference: Observations,
    images: Observations,
) -> Figure:
    """A histogram for each continuous measure and bars for the classes; what has moved in orange.

    Args:
        classes: those to draw.
    """
    shown = [one for one in measures if one.name != FEATURES and (one.name != CLASSES or classes)]
    rows = max(1, -(-len(shown) // _DRIFT_COLUMNS))
    figure = Figure(figsize=(8, _ROW_HEIGHT * rows + 0.5), facecolor="white")
    places = figure.subplots(rows, _DRIFT_COLUMNS, squeeze=False).ravel()
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.13, right=0.98, bottom=0.5 / height, top=1 - 0.62 / height, wspace=0.35, hspace=0.75
    )
    literally([figure.text(0.13, 1 - 0.25 / height, _title(measures), fontsize=10.5, color=INK)])
    for axes, measure in zip(places, shown, strict=False):
        _style(axes)
        if measure.name == CLASSES:
            _draw_classes(axes, classes, moved=measure.moved)
        else:
            before, after = (side.values[measure.name] for side in (reference, images))
            _draw_values(axes, before, after, moved=measure.moved)
        name = _UNITS.get(measure.name, measure.name.capitalize())
        literally([axes.set_title(name, fontsize=9, color=INK, loc="left")])
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    legend = [Patch(color=GREY, label="reference"), Patch(color=BLUE, label="images")]
    figure.legend(
        handles=[*legend, Patch(color=ORANGE, label="images, moved")],
        fontsize=8.5, ncols=3, loc="upper right", edgecolor="none",
    )  # fmt: skip
    return figure


def _title(measures: Sequence[Measure]) -> str:
    moved = [measure.name for measure in measures if measure.moved]
    if not moved:
        return f"No drift: none of {count(len(measures), 'measure')} has moved"
    return f"Drift: {', '.join(moved)}"


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8, length=3)


def _draw_values(
    axes: Axes, before: NDArray[np.float64], after: NDArray[np.float64], *, moved: bool
) -> None:
    """Shares of the images; what lies outside of 99 % of all is in the outermost bins."""
    low, high = np.percentile(np.concatenate([before, after]), [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    for values, colour in ((before, GREY), (after, ORANGE if moved else BLUE)):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        shares = counts / len(values)
        axes.stairs(shares, edges, color=colour, linewidth=1.6, fill=colour == GREY)
    as_percent(axes)


def _draw_classes(axes: Axes, classes: Sequence[ClassShares], *, moved: bool) -> None:
    places = np.arange(len(classes))
    axes.barh(places - 0.2, [one.reference for one in classes], 0.38, color=GREY)
    axes.barh(places + 0.2, [one.images for one in classes], 0.38, color=ORANGE if moved else BLUE)
    axes.set_yticks(places)
    literally(axes.set_yticklabels(readable([one.name for one in classes], 12), fontsize=8))
    axes.invert_yaxis()
    as_percent(axes, "x")
