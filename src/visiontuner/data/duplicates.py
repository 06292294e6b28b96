"""Images that show the same in two places, found by their features and verified at the pixels.

A perceptual hash finds copies that were resized or recompressed. Features also find those that were
cropped, mirrored, turned, framed or marked, and photographs of one series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.alignment import read_thumbnail, same_scene
from visiontuner.data.arrays import available_cpus
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
