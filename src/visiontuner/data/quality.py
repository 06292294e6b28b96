"""Cheap statistics of single images: sharpness, brightness, shape; and which of them are odd.

What is odd is odd beside the other images too: a data set that is dark or soft throughout (X-rays,
night photographs) has hardly any odd ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

# The shorter side at which sharpness is measured, pixels; smaller images as they are. What is
# sharp there is sharp enough for networks, whose input is 224.
SHARPNESS_SIDE = 128
_TILE = 16
_LEAST_CONTRAST = 6.0  # standard deviation of a tile's gray levels; of less no sharpness is seen
# Both were measured on photographs of dogs and flowers: no sharp one is below both, 77 % are once
# they are blurred by 1.5 of 224 pixels, all once it is 3 pixels (docs/insight.md).
_SHARP_TEXTURE, _SHARP_EDGE = 0.9, 0.3
SHARPEST = 9.0  # no more is told apart; also of images without any contrast
DARK = 90  # of 255; what is darker has hardly a light pixel
LONG = 3.0  # times as long as wide, or as wide as long


def sharpness(image: Image.Image) -> float:
    """How sharp the sharpest parts of an image are; below 1 no part is.

    Texture: the standard deviation of the Laplacian by that of the gray levels, in the sharpest 2 %
    of the tiles of 16 x 16 pixels. Edges: the highest 0.5 % of the Laplacian by the range of the
    gray levels. Each by what it has in sharp photographs; the larger one counts, so that a blurred
    background is no matter.

    Args:
        image: mode RGB, any size.

    Returns:
        A ratio in [0, 9].

    Source: variance of the Laplacian, Pech-Pacheco et al. 2000,
    https://doi.org/10.1109/ICPR.2000.903548
    """
    gray = _gray(image)
    if min(gray.shape) < _TILE + 2:
        return SHARPEST
    inner = gray[1:-1, 1:-1]
    laplacian = 4 * inner - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]
    contrast = _tiles(inner).std(axis=1)
    visible = contrast > _LEAST_CONTRAST
    if not visible.any():
        return SHARPEST
    texture = np.percentile(_tiles(laplacian).std(axis=1)[visible] / contrast[visible], 98)
    low, high = np.percentile(gray, (1, 99))
    edge = np.percentile(np.abs(laplacian), 99.5) / max(float(high - low), 1.0)
    return min(SHARPEST, round(float(max(texture / _SHARP_TEXTURE, edge / _SHARP_EDGE)), 3))


def _gray(image: Image.Image) -> NDArray[np.float32]:
    shorter = min(image.size)
    if shorter > SHARPNESS_SIDE:
        width, height = (max(1, round(n * SHARPNESS_SIDE / shorter)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("L"), dtype=np.float32)


def _tiles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whole tiles of an array of shape (H, W): float32, shape (T, 256)."""
    rows, columns = values.shape[0] // _TILE, values.shape[1] // _TILE
    whole = values[: rows * _TILE, : columns * _TILE]
    split = whole.reshape(rows, _TILE, columns, _TILE).swapaxes(1, 2)
    return split.reshape(-1, _TILE * _TILE)


def brightness(image: Image.Image) -> int:
    """The level in [0, 255] that 5 % of an image's pixels (RGB) reach with any colour."""
    red, green, blue = image.split()
    counts = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    return int(np.searchsorted(np.cumsum(counts), 0.95 * image.width * image.height))


def are_blurred(sharpnesses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Images without a sharp part, less than half as sharp as the middle one, shape (N,)."""
    return _below(sharpnesses, 1.0)


def are_dark(brightnesses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Images with hardly a light pixel, less than half as bright as the middle one, shape (N,)."""
    return _below(brightnesses, DARK)


def _below(values: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
    if not len(values):
        return np.zeros(0, dtype=bool)
    below: NDArray[np.bool_] = values < min(limit, float(np.median(values)) / 2)
    return below
