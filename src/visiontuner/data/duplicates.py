"""Images that show the same in two places, found by their features and verified at the pixels.

A perceptual hash finds copies that were resized or recompressed. Features also find those that were
cropped, mirrored, turned, framed or marked, and photographs of one series. A pair is verified by
laying one image over the other: shift, scale, rotation, another aspect ratio, a mirrored copy,
brightness and contrast are fitted; then small windows are compared, so that a mark on a part of the
image changes the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from visiontuner.data.arrays import available_cpus
from visiontuner.data.images import decode_image
from visiontuner.errors import BadImageError

LEAST_COSINE = 0.8
"""Of 300 photographs 99 % of mirrored, turned, framed and cropped copies are more similar."""
MOST_NEIGHBOURS = 3  # candidates of one image
EXACT_UP_TO = 50_000
"""Images; of more, candidates come from a random projection, and are verified."""
_PROJECTED = 256  # dimensions: a cosine of .8 is then off by .023 (one standard deviation)
_MARGIN = 0.1  # more than four of them
_MORE_NEIGHBOURS = 8  # candidates before they are verified
_BLOCK = 2048  # rows: a product is 17 MB
LEAST_SCORE = 0.75
"""Looked at pair by pair on photographs: above, one in 48 pairs or fewer shows two things."""
MOST_PAIRS = 20_000  # looked at, four minutes on a core
_CONTROLS = 48  # pairs of different images, which say what the score is by chance
TELLS_NOTHING = 0.95
"""A threshold from which on nothing is named: handwritten digits have .99, photographs .75."""
_FEWEST_CONTROLS = 10
_CONTROL_RANK = 20  # nearest but so many
_DEVIATIONS = 4.0
_REMEMBERED = 4096  # thumbnails of 37 kB

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of images, the most similar first.

    Args:
        rows: int64, shape (P, 2), i < j.
        values: float64, shape (P,), falling: cosines of candidates, scores of duplicates.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Duplicates:
    """What `find_duplicates` found.

    Args:
        pairs: with the score of `same_scene`, at least `threshold`.
        threshold: .75, or more where different images of the data set score high as well.
        candidates: pairs that are similar by their features; at most 20,000 of them are looked at.
    """

    pairs: Pairs
    threshold: float
    candidates: int


def find_duplicates(
    features: NDArray[np.float32],
    places: NDArray[np.int64],
    paths: Sequence[Path],
    *,
    progress: Progress = lambda _done, _total: None,
) -> Duplicates:
    """Pairs of images in two places that show the same.

    Args:
        features: float32, shape (N, D).
        places: int64, shape (N,), such as the split: pairs within one are not looked for.
        paths: N image files.
        progress: called with (pairs looked at, pairs to look at).
    """
    units = unit_length(features)
    candidates = similar_pairs(units, places)
    if not len(candidates):
        return Duplicates(pairs=candidates, threshold=LEAST_SCORE, candidates=0)
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="pixels") as executor:
        score = partial(_score, paths, executor)
        threshold = _threshold(np.array(list(score(_control_pairs(units, places)))))
        looked_at = candidates.rows[: MOST_PAIRS if threshold < TELLS_NOTHING else 0]
        scores = np.empty(len(looked_at))
        for done, found in enumerate(score(looked_at)):
            scores[done] = found
            progress(done + 1, len(looked_at))
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= threshold]
    return Duplicates(
        pairs=Pairs(rows=looked_at[order], values=scores[order]),
        threshold=threshold,
        candidates=len(candidates),
    )


def _score(paths: Sequence[Path], executor: Executor, rows: NDArray[np.int64]) -> Iterator[float]:
    """`same_scene` of each pair; -1 where an image cannot be read."""
    thumbnail = lru_cache(_REMEMBERED)(read_thumbnail)

    def score(pair: NDArray[np.int64]) -> float:
        try:
            first, second = (thumbnail(paths[row]) for row in pair)
        except BadImageError:
            return -1.0
        return same_scene(first, second)

    return executor.map(score, rows)


def _control_pairs(units: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images with one that is near, but not so near that it shows the same; shape (K, 2)."""
    step = max(1, len(units) // _CONTROLS)
    pairs = []
    for row in range(0, len(units), step):
        elsewhere = np.flatnonzero(places != places[row])
        rank = min(_CONTROL_RANK, len(elsewhere) // 2)
        if rank:
            similar = units[elsewhere] @ units[row]
            pairs.append((row, elsewhere[np.argsort(-similar, kind="stable")[rank]]))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _threshold(controls: NDArray[np.float64]) -> float:
    """The score that different images hardly reach: drawn shapes are alike, photographs are not."""
    fitted = controls[controls > -1]
    if len(fitted) < _FEWEST_CONTROLS:
        return LEAST_SCORE
    z = np.arctanh(np.minimum(fitted, 0.999))
    # Median and median deviation: a control pair that shows the same is an outlier.
    deviation = 1.4826 * np.median(np.abs(z - np.median(z)))
    return max(LEAST_SCORE, float(np.tanh(np.median(z) + _DEVIATIONS * deviation)))


def unit_length(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one, float32, shape (N, D); a row of zeros stays."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features))
    units: NDArray[np.float32] = features / np.maximum(lengths, 1e-12)[:, None]
    return units


# Candidates: pairs of similar features in two places.


def similar_pairs(
    units: NDArray[np.float32],
    places: NDArray[np.int64],
    *,
    exact_up_to: int = EXACT_UP_TO,
) -> Pairs:
    """Each image's three most similar in other places, from a cosine of .8 on.

    Args:
        units: float32, shape (N, D), rows of length one.
        places: int64, shape (N,).
        exact_up_to: with more rows, a random projection says which products are computed.
    """
    if len(units) <= exact_up_to:
        found = _nearest(units, places, LEAST_COSINE, MOST_NEIGHBOURS)
        return _sorted(found.rows, found.values)
    rng = np.random.default_rng(0)
    shape = (units.shape[1], _PROJECTED)
    projection = rng.standard_normal(shape, dtype=np.float32)
    projected = unit_length(units @ projection)
    rough = _nearest(projected, places, LEAST_COSINE - _MARGIN, _MORE_NEIGHBOURS)
    blocks = [
        np.einsum("nd,nd->n", units[part[:, 0]], units[part[:, 1]])
        for part in np.array_split(rough.rows, max(1, len(rough) // _BLOCK))
    ]
    exact = np.concatenate(blocks).astype(np.float64)
    kept = exact >= LEAST_COSINE
    return _sorted(rough.rows[kept], exact[kept])


def _sorted(rows: NDArray[np.int64], values: NDArray[np.float64]) -> Pairs:
    order = np.argsort(-values, kind="stable")
    return Pairs(rows=rows[order], values=values[order])


def _nearest(
    units: NDArray[np.float32], places: NDArray[np.int64], least: float, most: int
) -> Pairs:
    """Each row's nearest of other places, at most `most`; pairs sorted by rows, each once."""
    similar = np.full((len(units), most), -1.0, dtype=np.float32)
    partners = np.full((len(units), most), -1, dtype=np.int64)
    starts = range(0, len(units), _BLOCK)
    for start in starts:
        for other in range(start, len(units), _BLOCK):
            rows, columns = slice(start, start + _BLOCK), slice(other, other + _BLOCK)
            product = units[rows] @ units[columns].T  # (B, B)
            product[places[rows, None] == places[None, columns]] = -1
            _keep_nearest(product, rows, columns, similar, partners, least)
            if other != start:
                _keep_nearest(product.T, columns, rows, similar, partners, least)
    first, rank = np.nonzero(partners >= 0)
    pairs = np.sort(np.stack([first, partners[first, rank]], axis=1), axis=1)
    pairs, kept = np.unique(pairs, axis=0, return_index=True)
    return Pairs(rows=pairs, values=similar[first, rank][kept].astype(np.float64))


def _keep_nearest(
    product: NDArray[np.float32],
    rows: slice,
    columns: slice,
    similar: NDArray[np.float32],
    partners: NDArray[np.int64],
    least: float,
) -> None:
    """Put what is nearer than anything so far into `similar` and `partners`, rows of each."""
    floor = np.maximum(similar[rows].min(axis=1), np.float32(least))
    hit = np.flatnonzero(product.max(axis=1) >= floor)
    if not len(hit):
        return
    most = similar.shape[1]
    values = np.concatenate([similar[rows][hit], product[hit]], axis=1)
    values[:, most:][values[:, most:] < least] = -1
    numbers = np.arange(columns.start, columns.start + product.shape[1])
    known = np.concatenate(
        [partners[rows][hit], np.broadcast_to(numbers, (len(hit), len(numbers)))], axis=1
    )
    best = np.argpartition(-values, most - 1, axis=1)[:, :most]
    every = np.arange(len(hit))[:, None]
    chosen = values[every, best]
    similar[rows.start + hit] = chosen
    partners[rows.start + hit] = np.where(chosen >= least, known[every, best], -1)


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
