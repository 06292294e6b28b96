"""What every figure is made of: colours, names, axes, PNG. Colours are Okabe and Ito's."""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Names of classes as a figure can show them: they come from folders, so they hold anything.


def readable(names: Sequence[str], length: int = 24, noun: str = "class") -> list[str]:
    """Names as the fonts at hand draw them, cut in the middle to `length` characters, none alike.

    A name of which they lack half or more becomes `class 12`, its place in the list; a name that is
    cut as another is has its place behind it.
    """
    shown = [drawable(name, length) or f"{noun} {index}" for index, name in enumerate(names)]
    taken = Counter(shown)
    return [
        text if taken[text] == 1 else f"{_cut_middle(text, length - 6)} ({index})"
        for index, text in enumerate(shown)
    ]


def drawable(name: str, length: int) -> str:
    """What the fonts have of a name, cut to `length` characters; nothing if that is half or less.

    A name that is written from right to left stands between two marks, so that what is written
    around it keeps its order. Nothing of it before matplotlib 3.11, which drew it backwards.
    """
    name = " ".join(name.split())
    leftwards = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in name)
    kept = "".join(letter for letter in name if ord(letter) in _letters())
    if 2 * len(kept) <= len(name) or (leftwards and not _SHAPES_TEXT):
        return ""
    text = _cut_middle(kept, length)
    return f"{_LEFT_TO_RIGHT}{text}{_LEFT_TO_RIGHT}" if leftwards else text


def _cut_middle(text: str, length: int) -> str:
    """Long names differ at their ends more often than in their middle."""
    if len(text) <= length:
        return text
    behind = (length - 1) // 2
    return f"{text[: length - 1 - behind]}…{text[len(text) - behind :]}"


_SHAPES_TEXT = matplotlib.__version_info__ >= (3, 11)
_LEFT_TO_RIGHT = "\u200e"  # takes no room


# For Chinese, Japanese, Korean, the scripts of India and Thailand, and signs; in colour none is
# drawn by matplotlib, so that emoji need one without.
_OTHER_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "IPAexGothic",
    "TakaoGothic",
    "NanumGothic",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Emoji",
    "Symbola",
)


def literally(texts: Iterable[Text]) -> None:
    """A dollar in a name is a dollar and no formula, and letters come from every font at hand."""
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(list(fonts()))


@lru_cache
def fonts() -> tuple[str, ...]:
    """matplotlib's own font, and those of this system that have letters which it lacks."""
    there = {entry.name for entry in fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _OTHER_FONTS if name in there))


@lru_cache
def _letters() -> frozenset[int]:
    maps = (get_font(findfont(name)).get_charmap() for name in fonts())
    return frozenset(code for known in maps for code in known if code >= 32)


BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#B8BCC2", "#33373D"
_DPI = 90
Place = Literal["best", "lower right", "upper right"]
LABELS = {
    "backbone": "Network",
    "validation_accuracy": "Validation accuracy",
    "validation_macro_f1": "Validation macro F1",
    "validation_loss": "Validation loss",
    "learning_rate": "Learning rate",
    "batch_size": "Batch size",
    "weight_decay": "Weight decay",
    "dropout": "Dropout",
    "label_smoothing": "Label smoothing",
    "optimizer": "Optimizer",
    "epochs": "Epochs",
    "backbone_learning_rate_factor": "Backbone learning rate factor",
}


def to_png(figure: Figure) -> bytes:
    """A figure as PNG, about 700 pixels wide."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    # Light compression: a third of the time of the default, a fifth more bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def describe(configuration: dict[str, Any]) -> str:
    """A configuration in a few words: `learning rate 0.0033, batch size 128`."""
    return ", ".join(
        f"{LABELS.get(name, name).lower()} {short(value)}" for name, value in configuration.items()
    )


def panels(
    count: int, title: str, *, left: float = 0.09, right: float = 0.98, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    """`count` axes side by side, laid out by hand: matplotlib's own layouts double the time.

    Args:
        left, right: where the axes begin and end, fractions of the width.
        height: inches; margins for title and labels keep their size.
    """
    figure = Figure(figsize=(8, height), facecolor="white")
    row = figure.subplots(1, count, squeeze=False)[0]
    bottom, top = 0.544 / height, 1 - 0.476 / height
    figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top, wspace=0.24)
    place = (left, 1 - 0.221 / height)
    literally([figure.text(*place, title, fontsize=10.5, color=INK, weight="bold")])
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=8.5, length=3)
        axes.grid(color="#E9EBEE", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(row)


def plot_line(
    axes: Axes, steps: Sequence[float], values: Sequence[float], *, colour: str, label: str
) -> None:
    """A line without its NaN and infinite values; a single epoch is a dot."""
    x, y = finite(steps, values)
    if len(x):
        marker = "o" if len(x) <= 25 else None
        axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=3, label=label)


def finite(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    keep = np.isfinite(y) & (np.abs(y) < 1e30)
    return x[keep], y[keep]


def zoom(axes: Axes, good: np.ndarray, every: np.ndarray) -> int:
    """Limit the y axis to the good values and twice their span on each side, where others lie
    beyond and would flatten them.

    Args:
        good, every: finite values, of any shape.

    Returns:
        How many of `every` lie outside then.
    """
    if not good.size:
        return 0
    bottom, top = bounds(good, every)
    outside = int(np.count_nonzero((every < bottom) | (every > top)))
    if outside:
        room = 0.05 * (top - bottom)
        axes.set_ylim(bottom - room, top + room)
    return outside


def bounds(good: np.ndarray, every: np.ndarray) -> tuple[float, float]:
    """The good values and twice their span on each side, no further than there are values."""
    low, high = float(good.min()), float(good.max())
    span = max(high - low, 0.02 * max(abs(low), abs(high)), 1e-6)
    return max(low - 2 * span, float(every.min())), min(high + 2 * span, float(every.max()))


def plot_dots(axes: Axes, lines: Sequence[np.ndarray]) -> None:
    if lines:
        points = np.concatenate(lines)
        axes.scatter(points[:, 0], points[:, 1], s=10, color=GREY)


def label_axes(axes: Axes, x: str, y: str) -> None:
    literally([
        axes.set_xlabel(x, fontsize=9, color=INK),
        axes.set_ylabel(y, fontsize=9, color=INK),
    ])  # fmt: skip


def add_legend(
    axes: Axes, place: Place = "best", *, outside: bool = False, columns: int = 1
) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    where: dict[str, Any] = {"loc": place}
    if outside:  # above the axes, in the title's line
        where = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderpad": 0.2}
    legend = axes.legend(fontsize=8.5, framealpha=0.85, edgecolor="none", ncols=columns, **where)
    literally(legend.get_texts())


def as_percent(axes: Axes, axis: str = "y") -> None:
    target = axes.yaxis if axis == "y" else axes.xaxis
    low, high = axes.get_ylim() if axis == "y" else axes.get_xlim()
    # 0.5 % apart needs a decimal, 10 % apart does not.
    decimals = 0 if high - low > 0.05 else 1 if high - low > 0.005 else 2
    target.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def whole_steps(axes: Axes, steps: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(steps):
        low, high = min(steps), max(steps)
        room = max(0.5, 0.03 * (high - low))
        axes.set_xlim(low - room, high + room)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def cut(title: str, length: int = 92) -> str:
    return title if len(title) <= length else title[: length - 1] + "…"


def short(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
