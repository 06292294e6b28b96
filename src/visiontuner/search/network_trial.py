"""One configuration of the network itself, trained on pictures: in a Ray worker, or without Ray.

A worker writes only into its trial's own folder: the best epoch's weights and validation logits,
and while it runs a checkpoint. It never touches the journal or MLflow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visiontuner.data.picture_store import PictureStore
from visiontuner.experiment import NO_AUGMENTATION, Experiment, Training
from visiontuner.model.backbone import Backbone, load_backbone
from visiontuner.model.network import Network, build_network, parameter_groups
from visiontuner.model.network_files import load_head, save_head, save_network
from visiontuner.search.trial import (
    HEAD_FILE,
    NETWORK_FILE,
    TrialTask,
    settings_of,
)
from visiontuner.search.worker import (
    after_epoch,
    prepare_worker,
    recorded,
    report,
    run_epochs,
    save_answers,
    watched,
)
from visiontuner.training.fit import EpochResult, Fit, StepDone, linear_head
from visiontuner.training.pictures import PictureBatches

# Pictures evaluated at a time: the numbers do not depend on it, memory does.
_EVALUATION_BATCH = 64


def train_network(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration and report every epoch; the best one is on disk before its report."""
    # A scheduler ends the trial inside a report: the processes that decode have to end with it.
    with closing(train_epochs(config, task)) as results:
        for result in results:
            report(result, task, config["trial_id"])


def train_epochs(
    config: dict[str, Any], task: TrialTask, *, on_step: Callable[[StepDone], None] | None = None
) -> Generator[EpochResult, None, None]:
    """Train one configuration; an epoch that is the best so far is on disk when it is yielded.

    With `task.checkpoints` the state after an epoch is written when the next one is asked for, and
    a training that finds a checkpoint yields from the epoch after it on, with the numbers that it
    would have given without the interruption (on the CPU in fp32).

    Raises:
        TrialFailed: the loss is not finite, or one picture is too much for the memory.
        CheckpointError: the checkpoint is of another network or other classes.
        VisiontunerError: a file cannot be written.
    """
    assert task.pictures_folder is not None
    began = time.perf_counter()
    prepare_worker(task.threads)
    experiment, pictures = task.experiment, PictureStore.open(task.pictures_folder)
    settings = settings_of(experiment.training, config["configuration"])
    device, num_classes = training_device(), len(pictures.class_names)
    assert task.cache is not None
    network = start_network(
        experiment,
        settings,
        num_classes=num_classes,
        cache=task.cache,
        head=task.start_heads.get(config["trial_id"]),
    ).to(device)
    folder = task.trial_folder(config["trial_id"])
    folder.mkdir(parents=True, exist_ok=True)
    with (
        closing(train_batches(pictures, experiment, settings, device)) as train,
        closing(_validation_batches(pictures, settings, device)) as validation,
        recorded(
            task, folder, network, began=began, workers=train.workers, about=_about(pictures)
        ) as recorder,
        watched(task, folder, recorder) as watch,
    ):
        train.watch = watch
        training = Fit(
            network,
            train,
            validation,
            settings,
            num_classes=num_classes,
            seed=experiment.seed,
            objective=experiment.objective,
            mode=experiment.mode,
            parameter_groups=parameter_groups(network, settings),
            on_step=on_step,
            watch=watch,
        )
        for result in run_epochs(training, folder, task, pictures.class_names):
            if task.keeps(is_best=result.is_best):
                # Before the report: a scheduler may end the trial inside it.
                save_best(
                    folder,
                    result,
                    task,
                    class_names=pictures.class_names,
                    labels=validation.labels,
                )
            noted = replace(result, notes=(*result.notes, *train.take_notes()))
            yield after_epoch(noted, recorder, task, is_last=training.finished)


def save_best(
    folder: Path,
    result: EpochResult,
    task: TrialTask,
    *,
    class_names: Sequence[str],
    labels: torch.Tensor,
) -> None:
    """The epoch's answers and weights, each file whole or not there.

    Where the head alone is trained it alone is kept: its backbone is the one that is cached.
    """
    network = _network(result)
    if task.experiment.model.train != "head":
        save_network(network, folder / NETWORK_FILE, class_names=class_names)
    else:
        save_head(network.head[1], folder / HEAD_FILE)
    save_answers(folder, result, task, labels=labels)


def _about(pictures: PictureStore) -> dict[str, Any]:
    """What a recording says of what enters the network."""
    preprocessing = pictures.preprocessing
    return {"mean": list(preprocessing.mean), "std": list(preprocessing.std)}


def _network(result: EpochResult) -> Network:
    assert isinstance(result.network, Network)
    return result.network


def training_device() -> torch.device:
    """The first GPU that this process sees, made ready for a training; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Batches have the same shape in every step: the time to find the fastest algorithm pays.
    torch.backends.cudnn.benchmark = True
    # What the trial before in this process held; other trials on this GPU can use it meanwhile.
    torch.cuda.empty_cache()
    return torch.device("cuda")


def start_network(
    experiment: Experiment,
    settings: Training,
    *,
    num_classes: int,
    cache: Path,
    head: Path | None = None,
) -> Network:
    """The network before its first step; `head` is a trained one that it begins with."""
    backbone = _load_backbone(experiment, cache)
    network = build_network(
        backbone,
        linear_head(
            backbone.feature_dim, num_classes, dropout=settings.dropout, seed=experiment.seed
        ),
        train=experiment.model.train,
        freeze_batch_norm=settings.freeze_batch_norm,
    )
    if head is not None:
        load_head(network, head)
    return network


def _load_backbone(experiment: Experiment, cache: Path) -> Backbone:
    model = experiment.model
    return _loaded(model.backbone, model.weights, model.image_size, cache)


@functools.lru_cache(maxsize=1)
def _loaded(name: str, weights: str, image_size: int | None, cache: Path) -> Backbone:
    """Read once a worker process; `build_network` copies it."""
    return load_backbone(name, weights=weights, image_size=image_size, cache=cache)


def train_batches(
    pictures: PictureStore, experiment: Experiment, settings: Training, device: torch.device
) -> PictureBatches:
    return PictureBatches(
        pictures.split("train"),
        preprocessing=pictures.preprocessing,
        augmentation=experiment.augmentation,
        num_classes=len(pictures.class_names),
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=device,
    )


def _validation_batches(
    pictures: PictureStore, settings: Training, device: torch.device
) -> PictureBatches:
    at_once = settings.micro_batch_size or settings.batch_size
    return PictureBatches(
        pictures.split("validation"),
        preprocessing=pictures.preprocessing,
        augmentation=NO_AUGMENTATION,
        num_classes=len(pictures.class_names),
        batch_size=min(at_once, _EVALUATION_BATCH),
        workers=settings.workers,
        device=device,
    )
