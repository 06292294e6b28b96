"""What a model says of images, and which of a search's images tell what is usual for it.

A model is surer of the images that it was trained on than of others. So a network is judged by its
validation images; and the answers that are compared are those of regressions on the features, each
of which has not seen the images that it answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample, find_units
from visiontuner.data.findings import read_header
from visiontuner.errors import BadImageError, UserMistake
from visiontuner.evaluation.drift import FEWEST, FoldJudges, Observations
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_whole
from visiontuner.journal import SearchRecord, packaged_trial
from visiontuner.model.classifier import FEATURES, LOGITS, Classifier
from visiontuner.model.novelty import Novelty, novelty_to, scores_among
from visiontuner.paths import CLASSIFIER_FOLDER, EXPERIMENT_FILE
from visiontuner.search.plan import stage_of
from visiontuner.serving.registry import classifier_digest
from visiontuner.workflow.answering import run_over_images
from visiontuner.workflow.inputs import Inputs, Observer, require_same_data

NOVELTY, CONFIDENCE = "novelty", "confidence"
STATISTICS = ("brightness", "contrast", "sharpness", "side")
MEASURES = ("features", NOVELTY, CONFIDENCE, "classes", *STATISTICS)

_MOST_OBSERVED = 1_000  # images through the network, once: ten to twenty seconds
_VERSION = 1
_LEARNED = "the network was trained on the validation images too"
_EARLIER = "the classifier is of an earlier version, which gives no features"
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the artifact says of images that can be read, and what they are like.

    Args:
        samples: the N images.
        logits: float64, shape (N, C), before the temperature.
        features: float32, shape (N, D); (N, 0) of an artifact that gives none.
        statistics: float64, shape (N, 4): mean and standard deviation of the gray values and their
            mean step from pixel to pixel, of what the network sees, 0 to 255; and the shorter side
            of the file's image in pixels, NaN if it has gone meanwhile.
        bad: path -> why it could not be read.
    """

    samples: tuple[Sample, ...]
    logits: NDArray[np.float64]
    features: NDArray[np.float32]
    statistics: NDArray[np.float64]
    bad: dict[str, str]

    @property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """The statistics by name."""
        columns = zip(STATISTICS, self.statistics.T, strict=True)
        return {name: column[np.isfinite(column)] for name, column in columns}


def see_images(
    classifier: Classifier,
    root: Path,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None],
) -> Seen:
    """Run the artifact over images, and measure what it sees."""
    names = [name for name in (LOGITS, FEATURES) if name in classifier.output_names]
    good: list[Sample] = []
    logits = [np.empty((0, len(classifier.class_names)))]
    features: list[NDArray[np.float32]] = []
    statistics = [np.empty((0, len(STATISTICS)))]
    bad: dict[str, str] = {}
    for batch in run_over_images(classifier, root, samples, names, progress=progress):
        bad |= batch.bad
        if batch.samples:
            good += batch.samples
            logits.append(batch.outputs[0].astype(np.float64))
            features += batch.outputs[1:]
            sides = [_side(root / sample.path) for sample in batch.samples]
            statistics.append(np.column_stack([_statistics_of(batch.pixels), sides]))
    return Seen(
        samples=tuple(good),
        logits=np.concatenate(logits),
        features=np.concatenate(features) if features else np.empty((len(good), 0), np.float32),
        statistics=np.concatenate(statistics),
        bad=bad,
    )


def _statistics_of(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of images of shape (B, size, size, 3): float64, shape (B, 3)."""
    gray = pixels.astype(np.float32) @ _GREY
    steps = [np.abs(np.diff(gray, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    rows = [gray.mean(axis=(1, 2)), gray.std(axis=(1, 2)), np.mean(steps, axis=0)]
    return np.stack(rows, axis=1).astype(np.float64)


def _side(path: Path) -> float:
    with suppress(BadImageError, OSError):
        return float(min(read_header(path)[1:]))
    return float("nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What is usual for a classifier.

    Args:
        bank: by which novelty is measured; None where it cannot be.
        judges: whose answers are compared; None where there can be none.
        known: digests of all images that it may have learned from.
        notes: which measures are left out, and why; a sentence each.
    """

    classifier: Classifier
    observations: Observations
    bank: Novelty | None
    judges: FoldJudges | None
    known: frozenset[str]
    notes: tuple[str, ...]

    def observe(self, seen: Seen) -> Observations:
        """The same measures of other images."""
        novelty = None if self.bank is None else self.bank.scores(seen.features)
        answers = None if self.judges is None else self.judges.answers(seen.features)
        return _observations(seen, novelty, answers)


def _observations(
    seen: Seen, novelty: NDArray[np.float64] | None, answers: NDArray[np.float64] | None
) -> Observations:
    values = dict[str, NDArray[np.float64]]()
    if novelty is not None:
        values[NOVELTY] = novelty
    if answers is not None:
        values[CONFIDENCE] = answers.max(axis=1)
    return Observations(
        features=seen.features if seen.features.shape[1] else None,
        classes=None if answers is None else answers.argmax(axis=1),
        values=values | seen.values,
    )


def find_reference(search: Path, cache: Path, observer: Observer) -> Reference:
    """What a search's own images say of its model, each without having been learned by heart.

    Raises:
        UserMistake: the images have changed since the search.
        ClassifierError: there is no classifier.
        DataError: the images are gone.
    """
    record, experiment = SearchRecord.load(search), Experiment.load(search / EXPERIMENT_FILE)
    classifier = Classifier.load(search / CLASSIFIER_FOLDER)
    inputs = Inputs(experiment, observer, cache=cache)
    require_same_data(record, inputs.dataset)
    trial = record.named(packaged_trial(search) or "") or record.kept
    if trial is None:
        raise UserMistake(f"{search} has no trial that could be used. Search again.")
    is_head = trial.trial_id in record.baselines or not stage_of(experiment, trial).on_images
    splits = inputs.dataset.splits
    known = [*splits["train"], *splits["validation"]]
    learned = not is_head and record.is_unvalidated
    chosen = known if is_head or learned else list(splits["validation"])
    seen = _see_once(classifier, inputs, _drawn(chosen, _MOST_OBSERVED))
    notes = list[str]()
    if learned:
        notes.append(f"Only what images look like is compared: {_LEARNED}.")
        seen = replace(seen, features=seen.features[:, :0])
    elif not seen.features.shape[1]:
        notes.append(f"Only what images look like is compared: {_EARLIER}.")
    known_digests = frozenset(sample.digest for sample in known)
    return make_reference(classifier, seen, is_head=is_head, known=known_digests, notes=notes)


def make_reference(
    classifier: Classifier,
    seen: Seen,
    *,
    is_head: bool,
    known: frozenset[str] = frozenset(),
    notes: Sequence[str] = (),
) -> Reference:
    """What is usual, by images that no training has changed the features of.

    Args:
        seen: in random order.
        is_head: they are training images too, of a head.
    """
    bank, novelty = _novelty(classifier, seen, is_head=is_head)
    judges, answers = _judges(classifier, seen)
    return Reference(
        classifier=classifier,
        observations=_observations(seen, novelty, answers),
        bank=bank,
        judges=judges,
        known=known,
        notes=tuple(notes),
    )


def _judges(
    classifier: Classifier, seen: Seen
) -> tuple[FoldJudges | None, NDArray[np.float64] | None]:
    """Who answers in the model's place, and their answers to the reference's images."""
    if not seen.features.shape[1] or len(seen.features) < FEWEST:
        return None, None
    labels = np.array([sample.label for sample in seen.samples], dtype=np.int64)
    judges = FoldJudges.fit(seen.features, labels, num_classes=len(classifier.class_names))
    return judges, judges.answers(seen.features)


def _novelty(
    classifier: Classifier, seen: Seen, *, is_head: bool
) -> tuple[Novelty | None, NDArray[np.float64] | None]:
    """What to measure novelty by, and that of the reference's images.

    A head's features no image has changed: each image is compared with the others. A network's
    validation images are compared with the training images of its artifact.
    """
    if not seen.features.shape[1]:
        return None, None
    if is_head:
        if len(seen.features) < FEWEST:
            return None, None
        return novelty_to(seen.features), scores_among(seen.features)
    bank = classifier.novelty
    return bank, None if bank is None else bank.scores(seen.features)


def _drawn(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many images, at random, one of each group and of each set of copies.

    Images of one group are alike: each of them would count as if it said something of its own.
    """
    unit_of = find_units(samples)
    # Shuffled, they can be parted by their numbers.
    order = np.random.default_rng(0).permutation(len(samples))
    first: dict[str, Sample] = {}
    for row in order:
        first.setdefault(unit_of(samples[row]), samples[row])
    return list(first.values())[:most]


def _see_once(classifier: Classifier, inputs: Inputs, samples: Sequence[Sample]) -> Seen:
    """`see_images` of a search's images, remembered: they are asked for with every check."""
    said = [_VERSION, classifier_digest(classifier.folder), *(s.digest for s in samples)]
    name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
    kept = inputs.cache / "drift" / f"{name}.npz"
    seen = _read(kept, samples)
    if seen is None:
        seen = see_images(
            classifier,
            inputs.dataset.root,
            samples,
            lambda done, total: inputs.observer.progress("Reference", done, total, "images"),
        )
        _keep(kept, seen)
    return seen


def _keep(path: Path, seen: Seen) -> None:
    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            digests=np.array([sample.digest for sample in seen.samples]),
            logits=seen.logits,
            features=seen.features,
            statistics=seen.statistics,
        )

    with suppress(OSError):  # a cache that cannot be written is no error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)


def _read(path: Path, samples: Sequence[Sample]) -> Seen | None:
    """What was kept of images that can be read; None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            by_digest = {sample.digest: sample for sample in samples}
            return Seen(
                samples=tuple(by_digest[str(digest)] for digest in file["digests"]),
                logits=file["logits"],
                features=file["features"],
                statistics=file["statistics"],
                bad={},
            )
    except (OSError, ValueError, LookupError, EOFError, BadZipFile):
        return None
