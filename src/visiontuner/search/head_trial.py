"""One configuration of a head, trained on the shared features, in a Ray worker.

A worker writes only into its trial's own folder and reports numbers to Ray; it never touches the
journal or MLflow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from safetensors.numpy import save_file

from visiontuner.model.store import FeatureSet
from visiontuner.search.trial import HEAD_FILE, TrialTask, settings_of
from visiontuner.search.worker import prepare_worker, save_logits, to_report
from visiontuner.training.fit import EpochResult, FeatureBatches, fit, linear_head


def train_head(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration and report every epoch; the best one is on disk before its report."""
    for result in train_epochs(config, task):
        tune.report(to_report(result))


def train_again(config: dict[str, Any], task: TrialTask, *, best_epoch: int) -> None:
    """Write the files of a finished trial's best epoch anew; the seed makes the same numbers."""
    for result in train_epochs(config, task):
        if result.epoch == best_epoch:
            return


def train_epochs(config: dict[str, Any], task: TrialTask) -> Iterator[EpochResult]:
    """Train one configuration; an epoch that is the best so far is on disk when it is yielded."""
    assert task.features_folder is not None
    prepare_worker(task.threads)
    features = _open_features(task.features_folder)
    settings = settings_of(task.experiment.training, config["configuration"])
    seed = task.experiment.seed
    train, validation = (
        FeatureBatches(*tensors, batch_size=settings.batch_size) for tensors in features.tensors
    )
    head = linear_head(
        features.feature_dim, features.num_classes, dropout=settings.dropout, seed=seed
    ).to(train.labels.device)
    folder = task.trial_folder(config["trial_id"])
    folder.mkdir(parents=True, exist_ok=True)
    results = fit(
        head,
        train,
        validation,
        settings,
        num_classes=features.num_classes,
        seed=seed,
        objective=task.experiment.objective,
        mode=task.experiment.mode,
    )
    for result in results:
        if result.is_best:  # before the report: a scheduler may end the trial inside it
            save_best(folder, result, head[1])
        yield result


def save_best(folder: Path, result: EpochResult, head: torch.nn.Module) -> None:
    """The best epoch's validation logits and head weights, each file whole or not there."""
    tensors = {
        name: tensor.detach().cpu().contiguous().numpy()
        for name, tensor in head.state_dict().items()
    }
    save_file(tensors, folder / "head.part")
    (folder / "head.part").replace(folder / HEAD_FILE)
    save_logits(folder, result)


@dataclass(frozen=True)
class _WorkerFeatures:
    tensors: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    feature_dim: int
    num_classes: int


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
        len(features.class_names),
    )
