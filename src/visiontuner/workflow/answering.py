"""A classifier over many images of a data set. No torch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import decode_batches
from visiontuner.data.dataset import Sample
from visiontuner.model.classifier import FEATURES, LOGITS, Classifier

_BATCH_SIZE = 4  # see engine.py

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The raw answers for the images that could be read, in order.

    Args:
        logits: float64, shape (N, num_classes), before the temperature.
        novelty: float64, shape (N,), see `model/novelty.py`; None where the classifier cannot tell.
        samples: the N images.
        bad: path -> why it could not be read.
        features: path -> float32, shape (D,), of the images whose features were to be kept.
    """

    logits: NDArray[np.float64]
    novelty: NDArray[np.float64] | None
    samples: tuple[Sample, ...]
    bad: dict[str, str]
    features: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class Batch(NamedTuple):
    """Some images' outputs, in the order they were asked for, each with a row an image.

    `pixels`, uint8 (B, size, size, 3), are what the network saw; `bad` is path -> why it was not.
    """

    samples: list[Sample]
    outputs: list[NDArray[np.float32]]
    bad: dict[str, str]
    pixels: NDArray[np.uint8]


def answer_images(
    classifier: Classifier,
    root: Path,
    samples: Sequence[Sample],
    *,
    keep_features: Container[str] = (),
    progress: Progress | None = None,
) -> Answers:
    """Run the very artifact over images; the next batch is decoded meanwhile.

    Args:
        root: what the samples' paths are relative to.
        keep_features: paths; nothing is kept where the classifier has no novelty.
        progress: called with (images done, images in all).
    """
    names = [LOGITS] if classifier.novelty is None else [LOGITS, FEATURES]
    rows, novelty = [np.empty((0, len(classifier.class_names)))], [np.empty(0)]
    good: list[Sample] = []
    bad: dict[str, str] = {}
    kept: dict[str, NDArray[np.float32]] = {}
    for batch in run_over_images(classifier, root, samples, names, progress=progress):
        bad |= batch.bad
        good += batch.samples
        if batch.samples:
            rows.append(batch.outputs[0].astype(np.float64))
            if classifier.novelty is not None:
                novelty.append(classifier.novelty.scores(batch.outputs[1]))
                pairs = zip(batch.samples, batch.outputs[1], strict=True)
                kept |= {s.path: row.copy() for s, row in pairs if s.path in keep_features}
    return Answers(
        logits=np.concatenate(rows),
        novelty=None if classifier.novelty is None else np.concatenate(novelty),
        samples=tuple(good),
        bad=bad,
        features=kept,
    )


def run_over_images(
    classifier: Classifier,
    root: Path,
    samples: Sequence[Sample],
    names: Sequence[str],
    *,
    progress: Progress | None = None,
) -> Iterator[Batch]:
    """Some outputs of the artifact for images, a few at a time; the next are decoded meanwhile.

    Args:
        names: of `Classifier.output_names`.
        progress: called with (images done, images in all).
    """
    starts = range(0, len(samples), _BATCH_SIZE)
    batches = [samples[start : start + _BATCH_SIZE] for start in starts]
    paths = [[sample.path for sample in batch] for batch in batches]
    decoded = decode_batches(root, paths, classifier.preprocessing, workers=0)
    with closing(decoded):
        for done, (batch, pixels) in enumerate(zip(batches, decoded, strict=True), 1):
            outputs = classifier.outputs(pixels.pixels, names) if pixels.good else []
            bad = {batch[position].path: reason for position, reason in pixels.bad.items()}
            good = [batch[position] for position in pixels.good]
            yield Batch(good, outputs, bad, pixels.pixels)
            if progress is not None:
                progress(min(done * _BATCH_SIZE, len(samples)), len(samples))
