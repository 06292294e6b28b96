"""The figure of a drift check: each measure of the reference's images and of those asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from visiontuner.evaluation.drift import CLASSES, FEATURES, Measure, Observations
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    as_percent,
    count,
    literally,
    readable,
)

_COLUMNS = 3
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
    rows = max(1, -(-len(shown) // _COLUMNS))
    figure = Figure(figsize=(8, _ROW_HEIGHT * rows + 0.5), facecolor="white")
    places = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
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
