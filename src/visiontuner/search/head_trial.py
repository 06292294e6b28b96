"""One configuration of a head, trained on the shared features, in a Ray worker.

A worker writes only into its trial's own folder and reports numbers to Ray; it never touches the
journal or MLflow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visiontuner.experiment import Training
from visiontuner.model.network_files import save_head
from visiontuner.model.store import FeatureSet
from visiontuner.search.trial import HEAD_FILE, TrainedOn, TrialTask, settings_of
from visiontuner.search.worker import (
    after_epoch,
    prepare_worker,
    recorded,
    report,
    run_epochs,
    save_answers,
    watched,
)
from visiontuner.training.fit import EpochResult, FeatureBatches, Fit, StepDone, linear_head


def train_head(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration and report every epoch; the best one is on disk before its report."""
    # A scheduler ends the trial inside a report: what is recorded of it has to be written then.
    with closing(train_epochs(config, task)) as results:
        for result in results:
            report(result, task, config["trial_id"])


def train_epochs(
    config: dict[str, Any], task: TrialTask, *, on_step: Callable[[StepDone], None] | None = None
) -> Generator[EpochResult, None, None]:
    """Train one configuration; an epoch that is the best so far is on disk when it is yielded.

    With `task.checkpoints` a training that finds a checkpoint goes on from there.

    Raises:
        TrialFailed: the loss is not finite.
        CheckpointError: the checkpoint is of other classes or settings.
        VisiontunerError: a file cannot be written.
    """
    assert task.features_folder is not None
    began = time.perf_counter()
    prepare_worker(task.threads)
    settings = settings_of(task.experiment.training, config["configuration"])
    start = start_head(
        task.features_folder, settings, seed=task.experiment.seed, trained_on=task.trained_on
    )
    folder = task.trial_folder(config["trial_id"])
    folder.mkdir(parents=True, exist_ok=True)
    with (
        recorded(task, folder, start.head, began=began) as recorder,
        watched(task, folder, recorder) as watch,
    ):
        training = Fit(
            start.head,
            start.train,
            start.validation,
            settings,
            num_classes=len(start.class_names),
            seed=task.experiment.seed,
            objective=task.experiment.objective,
            mode=task.experiment.mode,
            on_step=on_step,
            watch=watch,
        )
        for result in run_epochs(training, folder, task, start.class_names):
            if task.keeps(is_best=result.is_best):
                # Before the report: a scheduler may end the trial inside it.
                save_best(folder, result, task, labels=start.validation.labels)
            yield after_epoch(result, recorder, task, is_last=training.finished)


@dataclass(frozen=True)
class HeadStart:
    """A head before its first step, and what it is trained and evaluated on."""

    head: torch.nn.Sequential
    train: FeatureBatches
    validation: FeatureBatches
    class_names: tuple[str, ...]


def start_head(
    features_folder: Path, settings: Training, *, seed: int, trained_on: TrainedOn = "train"
) -> HeadStart:
    """On features; where validation is trained on as well, the first batches hold both splits."""
    features = _open_features(features_folder)
    train, validation = features.tensors
    if trained_on != "train":
        train = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    head = linear_head(
        features.feature_dim,
        len(features.class_names),
        dropout=settings.dropout,
        seed=seed,
    )
    return HeadStart(
        head.to(train[1].device),
        FeatureBatches(*train, batch_size=settings.batch_size),
        FeatureBatches(*validation, batch_size=settings.batch_size),
        features.class_names,
    )


def save_best(folder: Path, result: EpochResult, task: TrialTask, *, labels: torch.Tensor) -> None:
    """The epoch's validation answers and head weights, each file whole or not there."""
    assert isinstance(result.network, torch.nn.Sequential)
    save_head(result.network[1], folder / HEAD_FILE)
    save_answers(folder, result, task, labels=labels)


@dataclass(frozen=True)
class _WorkerFeatures:
    tensors: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    feature_dim: int
    class_names: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def _open_features(folder: Path) -> _WorkerFeatures:
    """Mapped once a worker process, whatever the number of trials it runs."""
    features = FeatureSet.open(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = [features.split(name) for name in ("train", "validation")]
    return _WorkerFeatures(
        tuple(
            (torch.from_numpy(s.features).to(device), torch.from_numpy(s.labels).to(device))
            for s in splits
        ),
        features.feature_dim,
        features.class_names,
    )
