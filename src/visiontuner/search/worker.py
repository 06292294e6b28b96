"""What every trial does in its worker, whatever it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from visiontuner.search.trial import LOGITS_FILE
from visiontuner.training.fit import EpochResult


def prepare_worker(threads: int) -> None:
    """Set the number of threads, and keep the compiler out.

    For every trial: OpenMP keeps the number by thread, and Ray gives each trial a thread of its
    own.
    """
    torch.set_num_threads(threads)
    _leave_the_compiler_out()


def save_logits(folder: Path, result: EpochResult) -> None:
    """An epoch's validation logits, whole or not there."""
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
