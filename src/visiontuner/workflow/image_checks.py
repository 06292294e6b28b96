"""What features and pixels say against single images: wrong labels, outliers, odd images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import FeatureSet
from visiontuner.data.dataset import find_units
from visiontuner.data.findings import OddImage, inspect_images, odd_images
from visiontuner.errors import UserMistake
from visiontuner.evaluation.baselines import logistic_regression
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.outliers import UNLIKE_ITS_CLASS, class_deviations
from visiontuner.evaluation.suspects import find_suspect_labels
from visiontuner.io.files import write_cached_json
from visiontuner.journal import Finding
from visiontuner.text import next_command
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
