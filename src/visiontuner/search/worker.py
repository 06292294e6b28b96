"""What every trial does in its worker, whatever it trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visiontuner.search.trial import CHECKPOINT_FOLDER, LOGITS_FILE, TrialTask
from visiontuner.training.fit import EpochResult, Fit


def prepare_worker(threads: int) -> None:
    """Set the number of threads, and keep the compiler out.

    For every trial: OpenMP keeps the number by thread, and Ray gives each trial a thread of its
    own.
    """
    torch.set_num_threads(threads)
    _leave_the_compiler_out()


def run_epochs(training: Fit, folder: Path, task: TrialTask) -> Iterator[EpochResult]:
    """The epochs of a training; with `task.checkpoints` from the one after its checkpoint on.

    The state after an epoch is written when the next one is asked for: what the caller did with the
    epoch, its line in a journal for one, is done by then.

    Raises:
        CheckpointError: the checkpoint is of another network, other classes or other settings.
    """
    from visiontuner.training.checkpoint import load_checkpoint, save_checkpoint

    checkpoint = folder / CHECKPOINT_FOLDER
    if task.checkpoints and checkpoint.is_dir():
        training.load_state_dict(load_checkpoint(checkpoint))
    for result in training.epochs():
        yield result
        if task.checkpoints:
            save_checkpoint(checkpoint, training.state_dict())


def save_logits(folder: Path, result: EpochResult, task: TrialTask) -> None:
    """An epoch's validation logits, whole or not there; none of pictures that were trained on."""
    if task.trained_on != "train":
        return
    with (folder / "logits.part").open("wb") as file:
        np.save(file, result.validation_logits.numpy(), allow_pickle=False)
    (folder / "logits.part").replace(folder / LOGITS_FILE)


def to_report(result: EpochResult) -> dict[str, Any]:
    """What Ray carries to the driver."""
    steps = [list(step) for step in result.step_losses]
    return {
        **result.metrics.to_dict(),
        "epoch": result.epoch,
        "step_losses": steps,
        "notes": list(getattr(result, "notes", ())),
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
