"""The report's map of the images: what `workflow/image_map.py` wrote -> symbols, legend, data.

Each class has a colour and a shape, up to forty of them a number too; each mark is a shape of its
own, drawn in black. The map is plain SVG, there without a script and in print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from visiontuner.paths import IMAGE_MAP_FILE
from visiontuner.text import shown

MAP_VERSION = 1
WIDTH, HEIGHT = 1000, 640
_MARGIN = 16
_COLOURS = 8  # of report.css, Okabe and Ito's
_NUMBERED_CLASSES = 40
_LONGEST_TEXT = 90
_SPLITS = ("train", "validation", "test")
# Which symbol, and what it stands for.
MARKS = {
    "suspect": "label probably wrong",
    "outlier": "unlike its class",
    "mistake": "test image taken for another class",
    "novel": "test image unlike the training images",
}


@dataclass(frozen=True, kw_only=True)
class LegendRow:
    """A class or a mark: its symbol as SVG, its number on the map, and how many images it has."""

    symbol: Markup
    number: str
    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class SuspectRow:
    """One of the first suspects; `image` is WebP in base64, empty where it cannot be read."""

    image: str
    path: str
    label: str
    suggested: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ImageMap:
    """Everything that the page shows of single images.

    Args:
        summary: how many images, and how they were brought into two dimensions.
        drawing: the inside of an SVG of WIDTH x HEIGHT.
        data: for the script: of each image path, class, split, marks and what is said of it.
        sprite: all images on one sheet, WebP in base64.
        suspects: how many there are; None where nobody has looked for them.
    """

    summary: str
    drawing: Markup
    classes: tuple[LegendRow, ...]
    marks: tuple[LegendRow, ...]
    splits: tuple[str, ...]
    data: Mapping[str, Any]
    sprite: str
    suspects: int | None
    first_suspects: tuple[SuspectRow, ...]


def read_image_map(folder: Path) -> ImageMap | None:
    """The map in a search folder; None if there is none, or one that this version cannot read."""
    try:
        raw = json.loads((folder / IMAGE_MAP_FILE).read_text(encoding="utf-8"))
        return describe_image_map(raw) if raw["version"] == MAP_VERSION else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def describe_image_map(raw: Mapping[str, Any]) -> ImageMap:
    """Put what `image_map.json` holds into symbols and words.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is no image map.
    """
    places = np.array(raw["places"], dtype=np.float64).reshape(len(raw["paths"]), 2)
    labels = np.array(raw["labels"], dtype=np.int64)
    if len(labels) != len(places) or len(raw["splits"]) != len(places):
        raise ValueError("of different lengths")
    names = [_short(name) for name in raw["class_names"]]
    at = _MARGIN + places * (WIDTH - 2 * _MARGIN, HEIGHT - 2 * _MARGIN)
    said = {int(row): dict(of) for row, of in raw["said"].items()}
    suspects = raw["suspects"] or {"count": None, "first": []}
    return ImageMap(
        summary=_summary(raw),
        drawing=_drawing(at, labels, said, len(names)),
        classes=tuple(_class_rows(names, labels)),
        marks=tuple(_mark_rows(said)),
        splits=tuple(split for split in _SPLITS if split in raw["splits"]),
        data={
            "x": at[:, 0].round().astype(int).tolist(),
            "y": at[:, 1].round().astype(int).tolist(),
            "paths": [_short(path) for path in raw["paths"]],
            "classes": names,
            "labels": labels.tolist(),
            "splits": [_SPLITS.index(split) for split in raw["splits"]],
            "marks": [_bits(said.get(row, {})) for row in range(len(labels))],
            "said": {row: _short("; ".join(of.values())) for row, of in said.items()},
            "side": int(raw["side"]),
            "columns": int(raw["columns"]),
        },
        sprite=_base64(raw["sprite"]),
        suspects=suspects["count"],
        first_suspects=tuple(
            SuspectRow(
                image=_base64(one["image"] or ""),
                path=str(one["path"]),
                label=str(one["label"]),
                suggested=str(one["suggested"]),
                score=float(one["score"]),
            )
            for one in suspects["first"]
        ),
    )


def _base64(text: str) -> str:
    if not text.isascii() or not set(text) <= _BASE64:
        raise ValueError("no base64")
    return text


_BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def _short(text: object) -> str:
    """As the page shows it, the middle of a long path left out."""
    whole = shown(str(text))
    half = _LONGEST_TEXT // 2
    return whole if len(whole) <= _LONGEST_TEXT else f"{whole[:half]}…{whole[-half:]}"


def _bits(said: Mapping[str, str]) -> int:
    return sum(1 << bit for bit, mark in enumerate(MARKS) if mark in said)


def _summary(raw: Mapping[str, Any]) -> str:
    drawn, images = len(raw["paths"]), int(raw["images"])
    which = f"All {images:,} images" if drawn == images else (
        f"{drawn:,} of {images:,} images, of each class as many as of the others and those that "
        "are marked first,"
    )  # fmt: skip
    tested = "" if "test" in raw["splits"] else " that the search has seen"
    if raw["method"] == "PCA":
        held = "" if raw["explained"] is None else (
            f", which hold {raw['explained']:.0%} of what their features vary: images that are "
            "apart differ, images that are close may differ in what is not shown"
        )  # fmt: skip
        return f"{which}{tested} by the two principal components of their features{held}."
    return (
        f"{which}{tested} by UMAP of their features: neighbours are alike; how far groups are "
        "apart says little."
    )


# Symbols


def _drawing(
    at: NDArray[np.float64],
    labels: NDArray[np.int64],
    said: Mapping[int, Mapping[str, str]],
    classes: int,
) -> Markup:
    """Points in the order of the images, marks over them, and the number of each class."""
    radius = 4.0 if len(at) <= 1_000 else 3.0
    points = (_symbol(int(label), x, y, radius) for (x, y), label in zip(at, labels, strict=True))
    marks = (
        f'<g data-row="{row}">{"".join(_mark(mark, *at[row]) for mark in MARKS if mark in of)}</g>'
        for row, of in said.items()
    )
    numbers = [
        '<text x="{:.0f}" y="{:.0f}">{}</text>'.format(
            *np.median(at[labels == label], axis=0), label + 1
        )
        for label in range(classes if classes <= _NUMBERED_CLASSES else 0)
        if (labels == label).any()
    ]
    return Markup(
        f'<g class="points">{"".join(points)}</g><g class="marks">{"".join(marks)}</g>'
        f'<g class="numbers">{"".join(numbers)}</g>'
    )


def _symbol(label: int, x: float, y: float, r: float) -> str:
    """Of a class: 32 pairs of a colour and a shape, whose neighbours differ in both."""
    colour, shape = label % _COLOURS, (label + label // _COLOURS) % 4
    if shape == 0:
        return f'<circle class="c{colour}" cx="{x:.0f}" cy="{y:.0f}" r="{r:g}"/>'
    big = 1.4 * r
    path = (
        f"M{x - r:.0f} {y - r:.0f}h{2 * r:g}v{2 * r:g}h-{2 * r:g}z",
        f"M{x:.0f} {y - r:.0f}l{r:g} {2 * r:g}h-{2 * r:g}z",
        f"M{x:.0f} {y - big:.0f}l{big:g} {big:g}-{big:g} {big:g}-{big:g}-{big:g}z",
    )[shape - 1]
    return f'<path class="c{colour}" d="{path}"/>'


def _mark(mark: str, x: float, y: float) -> str:
    path = {
        "suspect": f"M{x - 8:.0f} {y:.0f}a8 8 0 1 0 16 0a8 8 0 1 0-16 0",
        "outlier": f"M{x:.0f} {y - 11:.0f}l9 16h-18z",
        "mistake": f"M{x - 6:.0f} {y - 6:.0f}l12 12m0-12l-12 12",
        "novel": f"M{x - 8:.0f} {y - 8:.0f}h16v16h-16z",
    }[mark]
    return f'<path d="{path}"/>'


def _class_rows(names: Sequence[str], labels: NDArray[np.int64]) -> list[LegendRow]:
    counts = np.bincount(labels, minlength=len(names))
    return [
        LegendRow(
            symbol=Markup(_symbol(label, 8, 8, 5)),
            number=str(label + 1) if len(names) <= _NUMBERED_CLASSES else "",
            name=name,
            count=int(counts[label]),
        )
        for label, name in enumerate(names)
    ]


def _mark_rows(said: Mapping[int, Mapping[str, str]]) -> list[LegendRow]:
    return [
        LegendRow(
            symbol=Markup(f'<g class="marks">{_mark(mark, 11, 12)}</g>'),
            number=str(1 << bit),
            name=meaning,
            count=sum(mark in of for of in said.values()),
        )
        for bit, (mark, meaning) in enumerate(MARKS.items())
        if any(mark in of for of in said.values())
    ]
