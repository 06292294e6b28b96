"""A classifier over many pictures of a data set: what an evaluation looks at. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample
from visiontuner.model.classifier import Classifier
from visiontuner.model.decoding import decode_batches

_BATCH_SIZE = 4  # see engine.py


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The raw answers for the pictures that could be read, in order.

    Args:
        logits: float64, shape (N, num_classes), before the temperature.
        samples: the N pictures.
        bad: path -> why it could not be read.
    """

    logits: NDArray[np.float64]
    samples: tuple[Sample, ...]
    bad: dict[str, str]


def answer_pictures(
    classifier: Classifier,
    root: Path,
    samples: Sequence[Sample],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Run the very artifact over pictures; the next batch is decoded meanwhile.

    Args:
        root: what the samples' paths are relative to.
        progress: called with (pictures done, pictures in all).
    """
    starts = range(0, len(samples), _BATCH_SIZE)
    batches = [samples[start : start + _BATCH_SIZE] for start in starts]
    rows = [np.empty((0, len(classifier.class_names)))]
    good: list[Sample] = []
    bad: dict[str, str] = {}
    paths = [[sample.path for sample in batch] for batch in batches]
    decoded = decode_batches(root, paths, classifier.preprocessing, workers=0)
    with closing(decoded):
        for batch, pixels in zip(batches, decoded, strict=True):
            if pixels.good:
                rows.append(classifier.logits(pixels.pixels))
            good += [batch[position] for position in pixels.good]
            bad |= {batch[position].path: reason for position, reason in pixels.bad.items()}
            if progress is not None:
                progress(len(good) + len(bad), len(samples))
    return Answers(logits=np.concatenate(rows), samples=tuple(good), bad=bad)
