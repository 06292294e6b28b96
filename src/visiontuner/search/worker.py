"""What every trial does in its worker, whatever it trains."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from visiontuner.experiment import Experiment
from visiontuner.journal import Finding
from visiontuner.model.network_files import whole_file
from visiontuner.search.rungs import Rungs
from visiontuner.search.trial import CHECKPOINT_FOLDER, LOGITS_FILE, SCORES_FILE, TrialTask
from visiontuner.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from visiontuner.training.fit import EpochResult, Fit
from visiontuner.training.recording.records import RECORDING_FILE
from visiontuner.training.watch import Watch, Watches

if TYPE_CHECKING:
    from visiontuner.training.recording.recorder import Recorder
    from visiontuner.training.recording.records import Recording


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
    if task.home is None or not task.checkpoints:
        return lambda: None
    from visiontuner.search.hosts import CheckpointsHome

    return CheckpointsHome(task, trial_id, clock=time.monotonic).send


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
    from visiontuner.training.recording.recorder import Recorder

    recorder = Recorder(folder, network, every_steps=every_steps, began=began, **facts)
    with closing(recorder):
        yield recorder


@contextmanager
def watched(task: TrialTask, folder: Path, recorder: Recorder | None) -> Iterator[Watch]:
    """Who watches the training: the recorder, and whoever traces some of its steps."""
    if task.trace_steps is None:
        yield recorder or Watch()
        return
    from visiontuner.training.recording.trace import Trace

    with closing(Trace(folder, *task.trace_steps)) as trace:
        # Around the recorder: what it does in a step is in the trace.
        yield Watches([trace, recorder]) if recorder is not None else trace


def after_epoch(
    result: EpochResult, recorder: Recorder | None, task: TrialTask, *, is_last: bool
) -> EpochResult:
    """The same result, once what was recorded is on the disk and asked by the rules.

    Before the report: what reads the file when the trial has ended then finds all of it.
    """
    if recorder is None:
        return result
    from visiontuner.training.rules import LASTING_RECORDED, TrainingHistory, diagnose_recording

    recording = recorder.recording()
    rules = tuple(dict.fromkeys([*LASTING_RECORDED, *task.experiment.rules.stop_on]))
    found = diagnose_recording(TrainingHistory(recording=recording), rules)
    errors = [finding for finding in found if finding.severity == "error"]
    recorder.save(now=is_last or _may_be_stopped(task.experiment, result.epoch))
    return replace(result, findings=(*errors, *_incomplete(recording, result.epoch)))


def _may_be_stopped(experiment: Experiment, epoch: int) -> bool:
    """Whether the driver may end a trial with this epoch: nothing is then written afterwards."""
    rungs = Rungs.of(experiment)
    return bool(experiment.rules.stop_on) or (rungs is not None and epoch in rungs)


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
    """An epoch's validation logits and scores, each whole; none of pictures that were trained on.

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
    """Tell Ray of an epoch, once the files of the best one are where the search is."""
    from ray import tune

    if task.home is not None:
        from visiontuner.search.hosts import send_home

        everything = task.keeps(is_best=result.is_best)
        send_home(task, trial_id, only=None if everything else RECORDING_FILE)
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
