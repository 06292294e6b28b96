"""Which images are known to a classifier: fitted to the images of the search that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import FeatureSet, find_damage
from visiontuner.data.dataset import Sample, find_units
from visiontuner.journal import SearchRecord, TrialRecord, read_events
from visiontuner.model.classifier import FEATURES, Classifier
from visiontuner.model.novelty import Novelty, balanced_sample, fit_novelty
from visiontuner.search.plan import Stores, stage_of
from visiontuner.workflow.answering import run_over_images
from visiontuner.workflow.inputs import Inputs

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
