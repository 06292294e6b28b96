"""What features and pixels say of single images.

Against an image of a search: a wrong label, an outlier, an odd image. Of an image that a model is
asked about: whether it is known to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import FeatureSet, find_damage
from visiontuner.data.dataset import Sample, find_units
from visiontuner.data.findings import OddImage, inspect_images, odd_images
from visiontuner.errors import UserMistake
from visiontuner.evaluation.baselines import logistic_regression
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.suspects import UNLIKE_ITS_CLASS, class_deviations, find_suspect_labels
from visiontuner.io.files import write_cached_json
from visiontuner.journal import Finding, SearchRecord, TrialRecord, read_events
from visiontuner.model.classifier import FEATURES, Classifier
from visiontuner.model.novelty import Novelty, balanced_sample, fit_novelty
from visiontuner.search.plan import Stores, stage_of
from visiontuner.text import next_command
from visiontuner.workflow.answering import run_over_images
from visiontuner.workflow.inputs import Inputs
from visiontuner.workflow.selection import folds_of

FOLDS = 5
_VERSION = 1
# Images x features x classes: dogs24's 5.2e7 took a second and a half on one core.
_QUICK_WORK = 2e8
_SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose label is probably wrong.

    Args:
        path: relative to the data's folder, as `prepare --all` prints it.
        label: the class it is given as.
        suggested: the most probable of the other classes.
        probability: of the suggested class, by a regression that was fitted without the image.
        score: one minus the label's own probability, in [0, 1].
    """

    path: str
    label: str
    suggested: str
    probability: float = field(repr=False)
    score: float


@dataclass(frozen=True, kw_only=True)
class CheckedLabels:
    """Training and validation images that were looked at, and the suspects, the surest first."""

    images: int
    suspects: tuple[Suspect, ...]


def check_labels(inputs: Inputs, features: FeatureSet) -> CheckedLabels:
    """Find labels that are probably wrong; what an earlier call found is not looked for again.

    Raises:
        UserMistake: too few images.
    """
    kept = _cache_file(inputs, features)
    known = _read(kept)
    if known is None:
        known = _check_labels(inputs, features)
        write_cached_json(kept, [known.images, [asdict(one) for one in known.suspects]])
    return known


def check_labels_if_quick(inputs: Inputs, features: FeatureSet) -> CheckedLabels | None:
    """The same where it takes seconds or is known; None otherwise."""
    images = sum(len(features.split(split).labels) for split in _SPLITS)
    work = float(images) * features.feature_dim * len(features.class_names)
    if work > _QUICK_WORK and _read(_cache_file(inputs, features)) is None:
        return None
    try:
        return check_labels(inputs, features)
    except UserMistake:  # too few images
        return None


def find_outliers(
    inputs: Inputs, features: FeatureSet, suspects: Sequence[Suspect]
) -> list[OddImage]:
    """Training and validation images that are unlike the others of their class, the farthest first.

    Args:
        suspects: images whose label is probably wrong, which is what is said of them.
    """
    splits = [features.split(name) for name in _SPLITS]
    paths = [path for split in splits for path in split.paths]
    labels = np.concatenate([split.labels for split in splits])
    known = {s.path: s for name in _SPLITS for s in inputs.dataset.splits[name]}
    samples = [known[path] for path in paths]
    deviations = class_deviations(
        np.concatenate([split.features for split in splits]),
        labels,
        list(map(find_units(samples), samples)),
    )
    suspect = np.isin(paths, [one.path for one in suspects])
    rows = np.flatnonzero((deviations > UNLIKE_ITS_CLASS) & ~suspect)  # no NaN is
    return [
        OddImage(
            path=paths[row],
            label=features.class_names[labels[row]],
            reason="outlier",
            value=round(float(deviations[row]), 2),
        )
        for row in rows[np.argsort(-deviations[rows], kind="stable")]
    ]


def find_odd_images(
    inputs: Inputs, features: FeatureSet, suspects: Sequence[Suspect]
) -> list[OddImage]:
    """Training and validation images that are blank, odd-shaped, dark or blurred, or outliers.

    Each for one reason; outliers without those whose label is suspect. Images that `prepare` has
    not looked at yet are decoded.
    """
    dataset = replace(inputs.dataset, splits={**inputs.dataset.splits, "test": ()})
    facts = inspect_images(
        dataset,
        cache=inputs.cache,
        progress=lambda done, total: inputs.observer.progress("Looking", done, total, "images"),
    )
    odd = odd_images(dataset, facts)
    named = {one.path for one in odd}
    outliers = find_outliers(inputs, features, suspects)
    return odd + [one for one in outliers if one.path not in named]


def label_findings(inputs: Inputs, features: FeatureSet) -> list[Finding]:
    """One finding about suspect labels and one about outliers, where they take seconds to find."""
    checked = check_labels_if_quick(inputs, features)
    if checked is None:
        return []
    command = next_command("suspects", "--data", inputs.experiment.data.source)
    suspects = checked.suspects
    outliers = find_outliers(inputs, features, suspects)
    of_all = f"of {checked.images:,} training and validation images"
    found = (
        (
            "suspect_labels",
            len(suspects),
            f"{len(suspects):,} {of_all} have a label that the others contradict",
            f"`{command}` draws them, and writes a table to correct them with.",
        ),
        (
            "class_outliers",
            len(outliers),
            f"{len(outliers):,} {of_all} are unlike the others of their class",
            f"`{command}` lists them in odd.csv.",
        ),
    )
    return [
        Finding(rule=rule, severity="info", evidence=evidence, advice=advice)
        for rule, count, evidence, advice in found
        if count
    ]


def _cache_file(inputs: Inputs, features: FeatureSet) -> Path:
    names = json.dumps([_VERSION, FOLDS, inputs.dataset.digest, features.folder.name])
    return inputs.cache / "suspects" / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> CheckedLabels | None:
    try:
        images, suspects = json.loads(path.read_text(encoding="utf-8"))
        return CheckedLabels(images=int(images), suspects=tuple(Suspect(**one) for one in suspects))
    except (OSError, ValueError, TypeError):
        return None


def _check_labels(inputs: Inputs, features: FeatureSet) -> CheckedLabels:
    splits = [features.split(name) for name in _SPLITS]
    paths = [path for split in splits for path in split.paths]
    labels = np.concatenate([split.labels for split in splits])
    known = {s.path: s for name in _SPLITS for s in inputs.dataset.splits[name]}
    try:
        folds = folds_of([known[path] for path in paths], min(FOLDS, len(paths)))
    except ValueError as error:
        raise UserMistake(f"Too few images in {inputs.dataset.root}: {error}.") from None
    inputs.observer.note(f"Comparing {len(paths):,} labels with what the other images say.")
    names = features.class_names
    probabilities = out_of_fold_probabilities(
        np.concatenate([split.features for split in splits]), labels, folds, len(names)
    )
    found = find_suspect_labels(probabilities, labels)
    suspects = [
        Suspect(
            path=paths[row],
            label=names[labels[row]],
            suggested=names[suggested],
            probability=float(probabilities[row, suggested]),
            score=round(float(score), 4),
        )
        for row, suggested, score in zip(found.rows, found.suggested, found.scores, strict=True)
    ]
    return CheckedLabels(images=len(paths), suspects=tuple(suspects))


def out_of_fold_probabilities(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
    num_classes: int,
) -> NDArray[np.float64]:
    """What a regression on the images of the other folds says of each, float64, shape (N, C).

    Args:
        features: float32, shape (N, D).
        labels: int64, shape (N,).
        folds: int64, shape (N,), from 0 on.
    """
    # Every image has a fold, so that `refit=False` spares a last fit, which nobody would look at.
    fitted = logistic_regression(features, labels, folds, num_classes=num_classes, refit=False)
    return probabilities_of(fitted.logits)


# Of a fine-tuned network, through which they go once more: 40 s for ResNet-50 on two cores.
_TRAIN_IMAGES, _VALIDATION_IMAGES = 600, 400


def novelty_finder(
    inputs: Inputs, folder: Path, record: SearchRecord, trial: TrialRecord
) -> Callable[[Classifier], Novelty | None] | None:
    """What `package_classifier` asks for the novelty of a trial's classifier.

    A head's features are those that it was trained on, and no image has changed them, so any
    training or validation image may be in the sample and, without itself, set the threshold; of
    1,000 images if the features are gone from the cache. A network's are computed anew, and only
    validation images can judge it.

    Args:
        folder: the search's.

    Returns:
        None for a network that was trained on the validation images too: nothing can judge it.
    """
    if trial.trial_id in record.baselines or not stage_of(inputs.experiment, trial).on_images:
        return partial(_of_head, inputs, folder, trial.configuration.get("backbone"))
    if record.is_unvalidated:
        return None
    return partial(novelty_of_artifact, inputs)


def _of_head(
    inputs: Inputs, folder: Path, backbone: str | None, classifier: Classifier
) -> Novelty | None:
    cached = _cached_features(inputs, folder, backbone)
    samples, features = cached or _features(inputs, classifier, _some_of_both(inputs))
    everything = np.ones(len(samples), dtype=bool)
    return fit_novelty(
        features, _labels(samples), known=everything, judged=everything, units=units_of(samples)
    )


def _cached_features(
    inputs: Inputs, folder: Path, backbone: str | None
) -> tuple[list[Sample], NDArray[np.float32]] | None:
    """Those that the search was trained on, if they are still there and whole.

    Args:
        backbone: of this network, where several are searched.
    """
    store = Stores.of(read_events(folder).events, backbone).features
    if store is None or find_damage(store) is not None:
        return None
    splits = [FeatureSet.open(store).split(name) for name in ("train", "validation")]
    known = {sample.path: sample for of in inputs.dataset.splits.values() for sample in of}
    samples = [known[path] for split in splits for path in split.paths]
    return samples, np.concatenate([split.features for split in splits])


def _some_of_both(inputs: Inputs) -> list[Sample]:
    splits = inputs.dataset.splits
    samples = [*splits["train"], *splits["validation"]]
    rows = balanced_sample(_labels(samples), _TRAIN_IMAGES + _VALIDATION_IMAGES)
    return [samples[row] for row in rows]


def novelty_of_artifact(inputs: Inputs, classifier: Classifier) -> Novelty | None:
    """By the artifact's own features: some training images are its sample, some of validation
    set the threshold. None where they are too few."""
    splits = inputs.dataset.splits
    rows = balanced_sample(_labels(splits["train"]), _TRAIN_IMAGES)
    train = [splits["train"][row] for row in rows]
    drawn = np.random.default_rng(0).permutation(len(splits["validation"]))
    validation = [splits["validation"][row] for row in drawn[:_VALIDATION_IMAGES]]
    samples, features = _features(inputs, classifier, [*train, *validation])
    trained_on = set(train)
    known = np.array([sample in trained_on for sample in samples], dtype=bool)
    return fit_novelty(
        features,
        _labels(samples),
        known=known,
        judged=~known,
        units=units_of(samples),
    )


def _labels(samples: Sequence[Sample]) -> NDArray[np.int64]:
    return np.array([sample.label for sample in samples], dtype=np.int64)


def _features(
    inputs: Inputs, classifier: Classifier, samples: Sequence[Sample]
) -> tuple[list[Sample], NDArray[np.float32]]:
    """Of the images that can be read."""
    good: list[Sample] = []
    rows: list[NDArray[np.float32]] = []
    for batch in run_over_images(
        classifier,
        inputs.dataset.root,
        samples,
        [FEATURES],
        progress=lambda done, total: inputs.observer.progress("Novelty", done, total, "images"),
    ):
        good += batch.samples
        rows += batch.outputs
    return good, np.concatenate(rows)


def units_of(samples: Sequence[Sample]) -> list[str]:
    """A name for each image, the same for copies and for images of one group."""
    return list(map(find_units(samples), samples))
