"""What a Ray worker runs: one configuration of a head, or of the network itself."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from visiontuner.data.arrays import DecodedImages, FeatureSet
from visiontuner.diagnostics.history import RECORDING_FILE, Recording, TrainingHistory
from visiontuner.diagnostics.recorder import Recorder, Trace
from visiontuner.diagnostics.rules import LASTING_RECORDED, diagnose_recording
from visiontuner.experiment.schema import NO_AUGMENTATION, Experiment, Training
from visiontuner.journal import Finding
from visiontuner.model.backbones import Backbone, load_backbone
from visiontuner.model.network import (
    Network,
    build_network,
    load_head,
    parameter_groups,
    save_head,
    save_network,
    whole_file,
)
from visiontuner.search.plan import (
    CHECKPOINT_FOLDER,
    HEAD_FILE,
    LOGITS_FILE,
    NETWORK_FILE,
    REFIT_FILE,
    SCORES_FILE,
    TrainedOn,
    TrialTask,
    may_be_stopped,
    settings_of,
)
from visiontuner.training.batches import FeatureBatches, ImageBatches
from visiontuner.training.callbacks import TrainingCallback, TrainingCallbacks
from visiontuner.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from visiontuner.training.cross_validation import FoldedBatches, FoldedHead
from visiontuner.training.loop import EpochResult, Fit, StepDone, linear_head


def train_again(config: dict[str, Any], task: TrialTask, *, kept_epoch: int) -> None:
    """Write the files of a finished trial's kept epoch anew; the seed makes the same numbers.

    For a head that takes seconds, for a network as long as the trial did. What was recorded of the
    trial itself stays.
    """
    training = task.experiment.training.model_copy(update={"record_every_steps": 0})
    unrecorded = task.experiment.model_copy(update={"training": training})
    task = replace(task, experiment=unrecorded, only_epoch=kept_epoch)
    if task.images_folder is not None:
        epochs = train_network_epochs(config, task)
    else:
        epochs = train_head_epochs(config, task)
    with closing(epochs):
        next(result for result in epochs if result.epoch == kept_epoch)


def train_one_head(config: dict[str, Any], task: TrialTask, *, trained_on: TrainedOn) -> Path:
    """Train a head with a trial's values to its last epoch, without anything to judge it by.

    Returns:
        Its weights in the trial's folder: `REFIT_FILE` if it learnt from validation images as well,
        else `HEAD_FILE`.
    """
    assert task.features_folder is not None
    prepare_worker(task.threads)
    settings = settings_of(task.experiment.training, config["configuration"])
    settings = settings.model_copy(update={"early_stop": None, "log_every_steps": None})
    start = start_head(
        task.features_folder,
        settings,
        seed=task.experiment.seed,
        trained_on=trained_on,
    )
    training = Fit(
        start.head,
        start.train,
        start.validation,
        settings,
        num_classes=len(start.class_names),
        seed=task.experiment.seed,
    )
    head = [result.network for result in training.epochs()][-1]
    assert isinstance(head, nn.Sequential)
    name = HEAD_FILE if trained_on == "train" else REFIT_FILE
    path = task.trial_folder(config["trial_id"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_head(head[1], path)
    return path


# What every trial does in its worker, whatever it trains.


def prepare_worker(threads: int) -> None:
    """Set the number of threads, and keep the compiler out.

    For every trial: OpenMP keeps the number by thread, and Ray gives each trial a thread of its
    own.
    """
    torch.set_num_threads(threads)
    _leave_the_compiler_out()


def run_epochs(
    training: Fit, folder: Path, task: TrialTask, class_names: Sequence[str]
) -> Iterator[EpochResult]:
    """The epochs of a training; with `task.checkpoints` from the one after its checkpoint on.

    The state after an epoch is written when the next one is asked for: what the caller did with the
    epoch, its line in a journal for one, is done by then.

    Raises:
        CheckpointError: the checkpoint is of another network, other classes or other settings.
    """
    checkpoint = folder / CHECKPOINT_FOLDER
    model = task.experiment.model.model_dump(mode="json")
    if model["views"] == 1:  # checkpoints of before it could be anything else do not say so
        del model["views"]
    made_for = {f"model.{name}": value for name, value in model.items()}
    made_for |= {"trained_on": task.trained_on, "class_names": list(class_names)}
    if task.checkpoints and (checkpoint / CHECKPOINT_FILE).is_file():
        training.load_state_dict(load_checkpoint(checkpoint, made_for=made_for))
    send = _sender(task, folder.name)
    for result in training.epochs():
        yield result
        if task.checkpoints and not training.finished:  # else there would be nothing to go on with
            save_checkpoint(checkpoint, training.state_dict(), made_for=made_for)
            send()


def _sender(task: TrialTask, trial_id: str) -> Callable[[], None]:
    """Brings checkpoints to where the search is, if that is another machine."""
    if task.driver is None or not task.checkpoints:
        return lambda: None
    from visiontuner.search.remote import CheckpointUpload

    return CheckpointUpload(task, trial_id, clock=time.monotonic).send


@contextmanager
def recorded(
    task: TrialTask, folder: Path, network: nn.Module, *, began: float, **facts: Any
) -> Iterator[Recorder | None]:
    """Records a training into its trial's folder while it lasts; None where nothing is to be.

    Args:
        facts: of `Recorder`.
    """
    every_steps = task.experiment.record_every_steps
    if not every_steps:
        yield None
        return

    recorder = Recorder(folder, network, every_steps=every_steps, began=began, **facts)
    with closing(recorder):
        yield recorder


@contextmanager
def training_callback(
    task: TrialTask, folder: Path, recorder: Recorder | None
) -> Iterator[TrainingCallback]:
    """The training's callback: the recorder, and a tracer of some steps if there is one."""
    if task.trace_steps is None:
        yield recorder or TrainingCallback()
        return

    with closing(Trace(folder, *task.trace_steps)) as trace:
        # Around the recorder: what it does in a step is in the trace.
        yield TrainingCallbacks([trace, recorder]) if recorder is not None else trace


def after_epoch(result: EpochResult, recorder: Recorder | None, task: TrialTask) -> EpochResult:
    """The same result, once what was recorded is on the disk and asked by the rules.

    Before the report: what reads the file when the trial has ended then finds all of it.
    """
    if recorder is None:
        return result

    recording = recorder.recording()
    rules = tuple(dict.fromkeys([*LASTING_RECORDED, *task.experiment.rules.stop_on]))
    found = diagnose_recording(TrainingHistory(recording=recording), rules)
    errors = [finding for finding in found if finding.severity == "error"]
    recorder.save(now=result.is_last or may_be_stopped(task.experiment, result.epoch))
    return replace(result, findings=(*errors, *_incomplete(recording, result.epoch)))


def _incomplete(recording: Recording, epoch: int) -> list[Finding]:
    """What was not recorded, as one finding."""
    notes = [*(recording.tensors.notes if recording.tensors else ())]
    notes += [recording.about["problem"]] if "problem" in recording.about else []
    if not notes:
        return []
    return [
        Finding(
            rule="recording_incomplete",
            severity="info",
            evidence="not recorded: " + "; ".join(notes)[:1000],
            advice="The training is the same without it; the rules pass over what is missing.",
            step=epoch,
        )
    ]


def save_answers(
    folder: Path, result: EpochResult, task: TrialTask, *, labels: torch.Tensor
) -> None:
    """An epoch's validation logits and scores, each whole; none of images that were trained on.

    The scores stay with every trial, the logits with those whose weights do (`WeightsOnDisk`).

    Args:
        labels: int64, shape (num_validation,).
    """
    if task.trained_on != "train":
        return
    logits, labels = result.validation_logits, labels.cpu()
    with whole_file(folder / LOGITS_FILE) as temporary, temporary.open("wb") as file:
        np.save(file, logits.numpy(), allow_pickle=False)
    correct = (logits.argmax(dim=1) == labels).to(torch.uint8)
    log_loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    with whole_file(folder / SCORES_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, correct=correct.numpy(), log_loss=log_loss.numpy())


def report(result: EpochResult, task: TrialTask, trial_id: str) -> None:
    """Tell Ray of an epoch, once the files of the kept one are where the search is."""
    from ray import tune

    if task.driver is not None:
        from visiontuner.search.remote import upload_to_driver

        everything = task.keeps(result.epoch, is_kept=result.is_kept, is_last=result.is_last)
        upload_to_driver(task, trial_id, only=None if everything else RECORDING_FILE)
    tune.report(to_report(result))


def to_report(result: EpochResult) -> dict[str, Any]:
    """What Ray carries to the driver."""
    steps = [list(step) for step in result.step_losses]
    return {
        **result.metrics.to_dict(),
        "epoch": result.epoch,
        "step_losses": steps,
        "notes": list(result.notes),
        "findings": [asdict(finding) for finding in result.findings],
    }


def _leave_the_compiler_out() -> None:
    """Keep torch.optim from importing torch's compiler: 4 s a worker, for code that never compiles.

    `Optimizer.add_param_group` and others are wrapped so that the compiler, once imported, stays
    out of them; the first call imports it for that. Telling the wrapper that this is done already
    leaves the very same functions.
    """
    optimizer = torch.optim.Optimizer
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        wrapped = getattr(getattr(optimizer, name), "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            wrapped.__dynamo_disable = wrapped
    # `step` imports it to tell it where not to look; what is inside is the same without.
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        kind.step = torch.no_grad()(inspect.unwrap(kind.step))  # type: ignore[method-assign]


# One configuration of a head, trained on the shared features, in a Ray worker.
#
# A worker writes only into its trial's own folder and reports numbers to Ray; it never touches the
# journal or MLflow.


def train_head(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration and report every epoch; the best one is on disk before its report."""
    # A scheduler ends the trial inside a report: what is recorded of it has to be written then.
    with closing(train_head_epochs(config, task)) as results:
        for result in results:
            report(result, task, config["trial_id"])


def train_head_epochs(
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
        task.features_folder,
        settings,
        seed=task.experiment.seed,
        trained_on=task.trained_on,
        folds=task.folds,
    )
    folder = task.trial_folder(config["trial_id"])
    folder.mkdir(parents=True, exist_ok=True)
    with (
        recorded(task, folder, start.head, began=began) as recorder,
        training_callback(task, folder, recorder) as callback,
    ):
        training = Fit(
            start.head,
            start.train,
            start.validation,
            settings,
            num_classes=len(start.class_names),
            seed=task.experiment.seed,
            on_step=on_step,
            callback=callback,
        )
        for result in run_epochs(training, folder, task, start.class_names):
            if task.keeps(result.epoch, is_kept=result.is_kept, is_last=result.is_last):
                # Before the report: a scheduler may end the trial inside it.
                save_best_head(folder, result, task, labels=start.validation.labels)
            yield after_epoch(result, recorder, task)


@dataclass(frozen=True)
class HeadStart:
    """A head before its first step, and what it is trained and evaluated on.

    Of folds it is a head for each, trained and evaluated on all images.
    """

    head: torch.nn.Sequential
    train: FeatureBatches
    validation: FeatureBatches
    class_names: tuple[str, ...]


def start_head(
    features_folder: Path,
    settings: Training,
    *,
    seed: int,
    trained_on: TrainedOn = "train",
    folds: NDArray[np.int64] | None = None,
) -> HeadStart:
    """On features; where validation is trained on as well, the first batches hold both splits.

    Args:
        folds: of the images of both splits, see `TrialTask`.
    """
    features = _open_features(features_folder)
    train, validation = features.tensors
    if trained_on != "train" or folds is not None:
        train = _open_joined(features_folder)
    head = linear_head(
        features.feature_dim,
        len(features.class_names),
        dropout=settings.dropout,
        seed=seed,
    )
    if folds is not None:
        device = train[1].device
        both = FoldedBatches(
            *train, torch.from_numpy(folds).to(device), batch_size=settings.batch_size
        )
        folded = FoldedHead(head, int(folds.max()) + 1).to(device)
        return HeadStart(folded, both, both, features.class_names)
    return HeadStart(
        head.to(train[1].device),
        FeatureBatches(*train, batch_size=settings.batch_size),
        FeatureBatches(*validation, batch_size=settings.batch_size),
        features.class_names,
    )


def save_best_head(
    folder: Path, result: EpochResult, task: TrialTask, *, labels: torch.Tensor
) -> None:
    """The epoch's validation answers and head weights, each file whole or not there.

    The heads of folds are not kept: `refit` makes the one that is.
    """
    assert isinstance(result.network, torch.nn.Sequential)
    if not isinstance(result.network, FoldedHead):
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


@functools.lru_cache(maxsize=1)
def _open_joined(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Both splits' features (N, D) and labels (N,), copied once a worker process."""
    train, validation = _open_features(folder).tensors
    return torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])


# One configuration of the network itself, trained on images: in a Ray worker, or without Ray.
#
# A worker writes only into its trial's own folder: the best epoch's weights and validation logits,
# and while it runs a checkpoint. It never touches the journal or MLflow.


# Images evaluated at a time: the numbers do not depend on it, memory does.
_EVALUATION_BATCH = 64


def train_network(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration and report every epoch; the best one is on disk before its report."""
    # A scheduler ends the trial inside a report: the processes that decode have to end with it.
    with closing(train_network_epochs(config, task)) as results:
        for result in results:
            report(result, task, config["trial_id"])


def train_network_epochs(
    config: dict[str, Any], task: TrialTask, *, on_step: Callable[[StepDone], None] | None = None
) -> Generator[EpochResult, None, None]:
    """Train one configuration; an epoch that is the best so far is on disk when it is yielded.

    With `task.checkpoints` the state after an epoch is written when the next one is asked for, and
    a training that finds a checkpoint yields from the epoch after it on, with the numbers that it
    would have given without the interruption (on the CPU in fp32).

    Raises:
        TrialFailed: the loss is not finite, or one image is too much for the memory.
        CheckpointError: the checkpoint is of another network or other classes.
        VisiontunerError: a file cannot be written.
    """
    assert task.images_folder is not None
    began = time.perf_counter()
    prepare_worker(task.threads)
    experiment, images = task.experiment, DecodedImages.open(task.images_folder)
    settings = settings_of(experiment.training, config["configuration"])
    device, num_classes = training_device(), len(images.class_names)
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
        closing(train_batches(images, experiment, settings, device)) as train,
        closing(_validation_batches(images, settings, device)) as validation,
        recorded(
            task, folder, network, began=began, workers=train.workers, about=_about(images)
        ) as recorder,
        training_callback(task, folder, recorder) as callback,
    ):
        train.callback = callback
        training = Fit(
            network,
            train,
            validation,
            settings,
            num_classes=num_classes,
            seed=experiment.seed,
            parameter_groups=parameter_groups(network, settings),
            on_step=on_step,
            callback=callback,
        )
        for result in run_epochs(training, folder, task, images.class_names):
            if task.keeps(result.epoch, is_kept=result.is_kept, is_last=result.is_last):
                # Before the report: a scheduler may end the trial inside it.
                save_best_network(
                    folder,
                    result,
                    task,
                    class_names=images.class_names,
                    labels=validation.labels,
                )
            noted = replace(result, notes=(*result.notes, *train.take_notes()))
            yield after_epoch(noted, recorder, task)


def save_best_network(
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


def _about(images: DecodedImages) -> dict[str, Any]:
    """What a recording says of what enters the network."""
    preprocessing = images.preprocessing
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
    images: DecodedImages, experiment: Experiment, settings: Training, device: torch.device
) -> ImageBatches:
    return ImageBatches(
        images.split("train"),
        preprocessing=images.preprocessing,
        augmentation=experiment.augmentation,
        num_classes=len(images.class_names),
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=device,
    )


def _validation_batches(
    images: DecodedImages, settings: Training, device: torch.device
) -> ImageBatches:
    at_once = settings.micro_batch_size or settings.batch_size
    return ImageBatches(
        images.split("validation"),
        preprocessing=images.preprocessing,
        augmentation=NO_AUGMENTATION,
        num_classes=len(images.class_names),
        batch_size=min(at_once, _EVALUATION_BATCH),
        workers=settings.workers,
        device=device,
    )
