"""Pictures side by side with what was said about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from visiontuner.tracking.figures.names import drawable, literally
from visiontuner.tracking.figures.parts import INK, ORANGE

_DPI = 90  # as `to_png` draws: one pixel of a picture is one pixel of the sheet
_TILE, _GAP, _CAPTION = 168, 12, 40
_COLUMNS = 6

Picture = Image.Image | NDArray[np.uint8]
Caption = tuple[str, str, float]
"""True class, predicted class, probability of the predicted one."""


def contact_sheet(pictures: Sequence[Picture], captions: Sequence[Caption]) -> Figure:
    """The most confidently wrong pictures, six in a row, with their true and predicted classes.

    Args:
        pictures: Pillow images, or uint8 arrays of shape (H, W, 3); shown whole, as they are.
        captions: one for each picture.

    Raises:
        ValueError: no pictures, or not one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions")
    said = [
        (drawable(true, 26) or "?", f"→ {drawable(predicted, 19) or '?'} {probability:.0%}")
        for true, predicted, probability in captions
    ]
    return picture_sheet(pictures, said)


def picture_sheet(
    pictures: Sequence[Picture],
    captions: Sequence[tuple[str, str]],
    *,
    tile: int = _TILE,
    columns: int = _COLUMNS,
    title_lines: int = 0,
) -> Figure:
    """Pictures in rows, each with two lines below it.

    Args:
        tile: sides of a picture's place, in pixels.
        title_lines: for how many lines there is room above.
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    caption = _CAPTION if any(second for _, second in captions) else _CAPTION - 15
    width = columns * (tile + _GAP) + _GAP
    above = 18 * title_lines
    height = rows * (tile + caption + _GAP) + _GAP + above
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    sheet = Image.new("RGB", (width, height), "white")
    for index, (picture, (first, second)) in enumerate(zip(pictures, captions, strict=True)):
        left = _GAP + index % columns * (tile + _GAP)
        top = above + _GAP + index // columns * (tile + caption + _GAP)
        small = _fitted(picture, tile)
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


def _fitted(picture: Picture, tile: int) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
