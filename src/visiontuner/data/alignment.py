"""Whether two images show the same, by laying one over the other.

Shift, scale, rotation, another aspect ratio, a mirrored copy, brightness and contrast are fitted;
then small windows are compared, so that a mark on a part of the image changes the others nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from visiontuner.data.images import decode_image

SIDE = 96  # pixels of a thumbnail, whatever the image's aspect ratio: the fit has one of its own
_SEARCH = 48  # pixels on which the first guess is looked for
_LEVELS = (24, 48)  # the sides on which it is made better
_SCALES = (0.8, 0.9, 1.0, 1.11, 1.25)
_FARTHEST = _SEARCH // 3  # pixels of shift
_STARTS = 3  # guesses that are followed up
_STEPS = 8  # of a fit on one level
_WINDOWS = 8  # by 8 of them
_FLAT = 4.0  # levels of standard deviation under which a window shows nothing
_FEWEST_WINDOWS = 6
_LEAST_OVERLAP = 0.3  # of the image's area

Gray = NDArray[np.float32]
Motion = NDArray[np.float64]
"""Shape (2, 3): coordinates (y, x, 1) in [-1, 1] of one image -> (y, x) of the other."""


def read_thumbnail(path: Path) -> Gray:
    """Gray levels of an image, float32, shape (96, 96), in [0, 255].

    Raises:
        BadImageError: it cannot be decoded.
    """
    image = decode_image(path, target=SIDE).convert("L")
    # A mean over each pixel's area; an image that is smaller is enlarged smoothly.
    enough = min(image.size) >= SIDE
    way = Image.Resampling.BOX if enough else Image.Resampling.BILINEAR
    return np.asarray(image.resize((SIDE, SIDE), way), dtype=np.float32)


def same_scene(first: Gray, second: Gray) -> float:
    """How alike two images are once one is laid over the other, in [-1, 1].

    The median, over windows of 12 x 12 pixels that show something, of the correlation of the two.
    -1 where no two parts of them can be laid over each other.

    Args:
        first, second: float32, shape (96, 96), as `read_thumbnail` gives them.
    """
    fits = [
        fitted
        for guess in _guesses(first, second)
        if (fitted := _fit(first, second, guess, _LEVELS[0])) is not None
    ]
    if not fits:
        return -1.0
    motion, _ = max(fits, key=lambda fit: fit[1])
    finer = _fit(first, second, motion, _LEVELS[1])
    return -1.0 if finer is None else _window_correlation(first, second, finer[0])


def _guesses(first: Gray, second: Gray) -> list[Motion]:
    """The mirrored and scaled copies with the best correlation over all shifts, best first."""
    near, far = (_flatten_light(_shrink(image, _SEARCH)) for image in (first, second))
    motions = np.array(
        [[[scale, 0, 0], [0, mirror * scale, 0]] for mirror in (1, -1) for scale in _SCALES]
    )  # (V, 2, 3)
    copies, inside = _lay_over(far[None], motions, _SEARCH)
    copies = np.where(inside, copies[:, 0], 0)  # (V, 48, 48)
    size = (2 * _SEARCH, 2 * _SEARCH)
    spectrum = fft.rfft2(near, s=size) * np.conj(fft.rfft2(copies, s=size))
    correlation = np.roll(fft.irfft2(spectrum, s=size), (_FARTHEST, _FARTHEST), (1, 2))
    width = 2 * _FARTHEST + 1
    correlation = correlation[:, :width, :width].reshape(len(motions), -1)
    lengths = np.sqrt((near**2).sum() * (copies**2).sum(axis=(1, 2))) + 1e-6
    peaks = correlation.max(axis=1) / lengths
    shifts = np.stack(divmod(correlation.argmax(axis=1), width), axis=1) - _FARTHEST  # (V, 2)
    motions[:, :, 2] = -np.einsum("vij,vj->vi", motions[:, :, :2], shifts * (2 / _SEARCH))
    return [motions[row] for row in np.argsort(-peaks, kind="stable")[:_STARTS]]


def _fit(first: Gray, second: Gray, motion: Motion, side: int) -> tuple[Motion, float] | None:
    """Gauss-Newton on the motion, brightness and contrast; the motion and the correlation.

    None if the images hardly overlap on the way.
    """
    near, far = (ndimage.gaussian_filter(_shrink(image, side), 0.7) for image in (first, second))
    slopes = np.stack([far, *np.gradient(far)])  # (3, side, side)
    correlation = -1.0
    for _ in range(_STEPS):
        (moved, down, right), inside = (part[0] for part in _lay_over(slopes, motion[None], side))
        if inside.mean() < _LEAST_OVERLAP:
            return None
        y, x = (axis[inside] for axis in _grid(side))
        seen, wanted = moved[inside], near[inside]
        spread = wanted.std() + 1e-3
        gain = seen.std() / spread
        rest = seen - seen.mean() - gain * (wanted - wanted.mean())
        correlation = float(1 - rest.var() / (2 * seen.var() + 1e-6))
        down, right = down[inside] * (side / 2), right[inside] * (side / 2)
        ones = np.ones_like(y)
        columns = [down * y, down * x, down, right * y, right * x, right, -wanted, -ones]
        matrix = np.stack(columns, axis=1)  # (P, 8)
        # A mark or a border is an outlier: it weighs little (Cauchy).
        scale = 3 * np.median(np.abs(rest)) + 1e-3
        weighted = matrix / (1 + (rest / scale) ** 2)[:, None]
        normal = weighted.T @ matrix
        normal[np.diag_indices(8)] += 1e-3 * np.diag(normal) + 1e-6
        step = -np.linalg.solve(normal, weighted.T @ rest)[:6]
        motion = motion + step.reshape(2, 3)
        if np.abs(step).max() < 1e-3:
            break
    return motion, correlation


def _window_correlation(first: Gray, second: Gray, motion: Motion) -> float:
    """The median over the windows that lie in both images, where either shows something."""
    near, far = (ndimage.gaussian_filter(image, 1.0) for image in (first, second))
    moved, inside = _lay_over(far[None], motion[None], SIDE)
    a, b = _windows(near), _windows(moved[0, 0])  # (64, 144)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    spread_a, spread_b = a.std(axis=1), b.std(axis=1)
    used = _windows(inside[0]).mean(axis=1) > 0.95
    used &= np.maximum(spread_a, spread_b) > _FLAT
    if used.sum() < _FEWEST_WINDOWS:
        return -1.0
    # Of a window that is flat in one image alone, noise must not correlate.
    correlations = (a * b).mean(axis=1) / np.maximum(spread_a * spread_b, _FLAT**2)
    return float(np.median(correlations[used]))


def _lay_over(
    channels: Gray, motions: Motion, side: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Images after motions, and which of the pixels lie in the image before.

    Args:
        channels: shape (C, S, S).
        motions: shape (V, 2, 3).

    Returns:
        float64, shape (V, C, side, side), bilinear; bool, shape (V, side, side).
    """
    y, x = _grid(side)
    places = np.stack([y, x, np.ones_like(y)])  # (3, side, side)
    found = np.einsum("vij,jab->viab", motions, places)  # (V, 2, side, side)
    inside = (np.abs(found) <= 1).all(axis=1)
    last = channels.shape[-1] - 1
    pixels = np.clip((found + 1) / 2 * (last + 1) - 0.5, 0, last)
    low = np.minimum(pixels.astype(np.int64), last - 1)
    part = pixels - low
    (top, left), (down, right) = low.swapaxes(0, 1), part.swapaxes(0, 1)
    upper = channels[:, top, left] * (1 - right) + channels[:, top, left + 1] * right
    lower = channels[:, top + 1, left] * (1 - right) + channels[:, top + 1, left + 1] * right
    moved: NDArray[np.float64] = upper * (1 - down) + lower * down  # (C, V, side, side)
    return moved.swapaxes(0, 1), inside


def _grid(side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    centres = (np.arange(side) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return y, x


def _shrink(image: Gray, side: int) -> Gray:
    cell = SIDE // side
    smaller: Gray = image.reshape(side, cell, side, cell).mean(axis=(1, 3))
    return smaller


def _flatten_light(image: Gray) -> Gray:
    """Without slow changes of brightness, and with equal contrast everywhere."""
    detail = image - ndimage.gaussian_filter(image, 3.0)
    contrast = np.sqrt(ndimage.gaussian_filter(detail * detail, 3.0))
    flattened: Gray = detail / (contrast + 4.0)
    return flattened


def _windows(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """Shape (96, 96) -> (64, 144): a row for each window."""
    size = SIDE // _WINDOWS
    parts = image.reshape(_WINDOWS, size, _WINDOWS, size).swapaxes(1, 2)
    return parts.reshape(_WINDOWS**2, size**2)
