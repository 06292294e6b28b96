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

Caption = tuple[str, str, float]
"""True class, predicted class, probability of the predicted one."""


def contact_sheet(
    pictures: Sequence[Image.Image | NDArray[np.uint8]], captions: Sequence[Caption]
) -> Figure:
    """The most confidently wrong pictures, six in a row, with their true and predicted classes.

    Args:
        pictures: Pillow images, or uint8 arrays of shape (H, W, 3); shown whole, as they are.
        captions: one for each picture.

    Raises:
        ValueError: no pictures, or not one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions")
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    width = columns * (_TILE + _GAP) + _GAP
    height = rows * (_TILE + _CAPTION + _GAP) + _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    sheet = Image.new("RGB", (width, height), "white")
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        true, predicted = drawable(caption[0], 26) or "?", drawable(caption[1], 19) or "?"
        left = _GAP + index % columns * (_TILE + _GAP)
        top = _GAP + index // columns * (_TILE + _CAPTION + _GAP)
        small = _fitted(picture)
        sheet.paste(small, (left + (_TILE - small.width) // 2, top + _TILE - small.height))
        line = height - top - _TILE - 14
        literally([
            figure.text(left / width, line / height, true, fontsize=8, color=INK),
            figure.text(left / width, (line - 15) / height, fontsize=8, color=ORANGE,
                        s=f"→ {predicted} {caption[2]:.0%}"),
        ])  # fmt: skip
    axes = figure.add_axes((0, 0, 1, 1), zorder=-1)
    axes.imshow(sheet, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    return figure


def _fitted(picture: Image.Image | NDArray[np.uint8]) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
