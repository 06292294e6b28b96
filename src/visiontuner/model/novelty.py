"""How unlike a classifier's training images an image is, by the network's features. No torch.

The score is one minus the mean cosine between an image's features and those of the nearest training
images, of which the artifact holds a sample: `novelty.npz` with `images`, float16 (N, D), features
of unit length.

Source: nearest neighbours in feature space, Sun et al. 2022, https://arxiv.org/abs/2204.06507.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

KNOWN_SHARE = 0.95
NEIGHBOURS = 5
# 1,000 images of 1,280 features: 2.6 MB, and 0.3 ms an image. A projection to 256 dimensions would
# hold more of them, but is nearer to the images that it was fitted to than to others: 94 % of these
# instead of 95 % stayed known.
_MOST_NUMBERS = 1_280_000
_MOST_JUDGED = 5_000
# Of fewer images the largest score does not reach 95 %.
FEWEST_JUDGED = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Novelty:
    """A sample of training images' features, and the score above which an image is not known.

    Args:
        images: float32, shape (N, D), rows of length 1.
        neighbours: how many of the nearest images count.
        threshold: the highest score of an image that is known, in [0, 2].
    """

    images: NDArray[np.float32]
    neighbours: int
    threshold: float

    @classmethod
    def load(cls, path: Path, raw: dict[str, Any]) -> Self:
        """Read what `content` gave and what `to_dict` did.

        Raises:
            ValueError: they are damaged, or do not belong together.
            OSError: the file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                images = np.ascontiguousarray(file["images"], dtype=np.float32)
        except (BadZipFile, EOFError, LookupError) as error:
            raise ValueError(type(error).__name__) from None
        neighbours, threshold = int(raw["neighbours"]), float(raw["threshold"])
        if images.ndim != 2 or not 1 <= neighbours <= len(images) or not math.isfinite(threshold):
            raise ValueError(
                f"images of shape {images.shape}, {neighbours} neighbours, threshold {threshold}"
            )
        return cls(images=images, neighbours=neighbours, threshold=threshold)

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vectors that it scores."""
        return int(self.images.shape[1])

    def content(self) -> bytes:
        """The sample as an npz file; the same sample gives the same bytes."""
        file = io.BytesIO()
        np.savez(file, images=self.images.astype(np.float16))
        return file.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """What is read beside the sample: plain JSON values."""
        return {"neighbours": self.neighbours, "threshold": self.threshold}

    def scores(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """How new images are.

        Args:
            features: float, shape (B, D).

        Returns:
            float64, shape (B,), in [0, 2]; 0 where the nearest images have the same direction.
        """
        return _scores(_unit(features) @ self.images.T, self.neighbours)


def balanced_sample(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many images, of every class as many as of the others, or all that there are.

    Args:
        labels: int64, shape (N,).

    Returns:
        Their rows, int64, ascending.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)  # within its class
    first = np.argsort(rank, kind="stable")[:most]  # every class's first, every class's second, …
    return np.sort(by_class[first])


def fit_novelty(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    *,
    known: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    units: Sequence[str],
) -> Novelty | None:
    """Take a sample, and the threshold that keeps 95 % of other images of the same kind known.

    An image is judged by the images of the sample that are not of its own unit, so neither by
    itself nor by its copies. Of n scores the threshold is the ceil(0.95 (n + 1))-th: the next image
    then is known with a probability of at least 95 % (split conformal prediction, Lei et al. 2018,
    https://arxiv.org/abs/1604.04173).

    Args:
        features: float, shape (N, D).
        labels: int64, shape (N,).
        known: shape (N,), which images the sample may hold.
        judged: shape (N,), whose scores give the threshold; no training has changed their features.
        units: N names; images of one name are copies, or of one group.

    Returns:
        None for fewer than 20 images that can be judged, or too few that can be in the sample.
    """
    most = max(2 * NEIGHBOURS, _MOST_NUMBERS // features.shape[1])
    rows = np.flatnonzero(known)[balanced_sample(labels[known], most)]
    asked = np.random.default_rng(1).permutation(np.flatnonzero(judged))[:_MOST_JUDGED]
    if len(asked) < FEWEST_JUDGED or len(rows) <= NEIGHBOURS:
        return None
    images = _unit(features[rows]).astype(np.float16).astype(np.float32)  # as they are read
    names = np.unique(np.asarray(units), return_inverse=True)[1]
    same = names[asked][:, None] == names[rows][None]
    scores = np.sort(_scores_by_others(_unit(features[asked]), images, same))
    place = min(len(scores), math.ceil(KNOWN_SHARE * (len(scores) + 1)))
    return Novelty(images=images, neighbours=NEIGHBOURS, threshold=float(scores[place - 1]))


def scores_among(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """How new each of some images is to the others.

    Args:
        features: float, shape (N, D), more than five rows; no copies of each other.

    Returns:
        float64, shape (N,), in [0, 2].
    """
    rows = _unit(features)
    return _scores_by_others(rows, rows, np.eye(len(rows), dtype=bool))


def novelty_to(features: NDArray[np.floating]) -> Novelty:
    """The score of other images against all of some, without a threshold (it is infinite).

    Args:
        features: float, shape (N, D), more than five rows.
    """
    return Novelty(images=_unit(features), neighbours=NEIGHBOURS, threshold=math.inf)


def _scores_by_others(
    asked: NDArray[np.float32], images: NDArray[np.float32], same: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Args:
    same: shape (asked, images), which images are not to be compared.
    """
    similarities = asked @ images.T
    similarities[same] = -1.0
    return _scores(similarities, NEIGHBOURS)


def _scores(similarities: NDArray[np.float32], neighbours: int) -> NDArray[np.float64]:
    nearest = np.partition(similarities, -neighbours, axis=1)[:, -neighbours:]
    scores: NDArray[np.float64] = 1.0 - nearest.mean(axis=1, dtype=np.float64)
    return scores


def _unit(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length 1, float32; a row of zeros stays."""
    rows = np.asarray(features, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
