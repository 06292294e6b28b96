"""A trial of a search -> the classifier in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.commands import next_command
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.errors import ClassifierError
from visiontuner.experiment import Experiment
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.layout import CLASSIFIER_FOLDER

if TYPE_CHECKING:
    from visiontuner.model.backbone import Backbone

REFERENCE_PICTURES = 20


def package_trial(
    folder: Path,
    trial: TrialRecord,
    *,
    experiment: Experiment,
    dataset: ImageDataset,
    backbone: Backbone,
    cache: Path,
) -> Path:
    """Package a trial of a search as its `classifier/`, without training.

    Raises:
        ClassifierError: the trial's weights are not there or do not fit.
    """
    from visiontuner.model.package import package_classifier

    classifier = folder / CLASSIFIER_FOLDER
    reference = _spread(dataset.splits["validation"], REFERENCE_PICTURES)
    package_classifier(
        folder=classifier,
        backbone=backbone,
        **_weights(folder, trial),
        class_names=dataset.class_names,
        dataset_root=dataset.root,
        reference_paths=[sample.path for sample in reference],
        reference_labels=[sample.label for sample in reference],
        metadata={
            "trial_id": trial.trial_id,
            "configuration": trial.configuration,
            "data_digest": dataset.digest,
            experiment.objective: trial.best_value,
        },
        cache=cache,
    )
    return classifier


def _weights(folder: Path, trial: TrialRecord) -> dict[str, Path]:
    """What the trial trained, under the name that `package_classifier` has for it."""
    from visiontuner.search.trial import NETWORK_FILE
    from visiontuner.search.weights import kept_weights

    weights = kept_weights(folder, trial.trial_id)
    if weights is None:
        raise ClassifierError(
            f"The weights of {trial.trial_id} are gone from {folder}. "
            f"`{next_command('evaluate', folder)}` trains the trial again."
        )
    return {"network_weights" if weights.name == NETWORK_FILE else "head_weights": weights}


def packaged_trial(folder: Path) -> str | None:
    """The id of the trial that `classifier/` was made from; None without a readable one."""
    try:
        text = (folder / CLASSIFIER_FOLDER / "classifier.json").read_text(encoding="utf-8")
        metadata: dict[str, Any] = json.loads(text)["metadata"]
        return str(metadata["trial_id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def is_packaged(folder: Path, record: SearchRecord) -> bool:
    """Whether a trial of this search lies in `classifier/`, whole."""
    from visiontuner.model.classifier import Classifier

    if packaged_trial(folder) not in record.trials:
        return False
    try:
        Classifier.load(folder / CLASSIFIER_FOLDER, threads=1)
    except ClassifierError:
        return False
    return True


def _spread(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """`count` pictures spread evenly over a split, so that many classes are among them."""
    step = max(1, len(samples) // count)
    return samples[::step][:count]
