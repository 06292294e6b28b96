"""What a training tells while it runs: after every step, and after every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from visiontuner.journal import Finding
from visiontuner.training.epoch import EpochMetrics


class StepLoss(NamedTuple):
    """Training loss of one optimizer step, for curves finer than an epoch."""

    step: int
    loss: float


class StepDone(NamedTuple):
    """What `on_step` is told after every optimizer step.

    Attributes:
        epoch: 1 for the first.
        step: 1 for the first, counted through all epochs.
        steps_per_epoch: how many steps every epoch takes.
        loss: float32, (), on the network's device: reading its value waits for the device.
    """

    epoch: int
    step: int
    steps_per_epoch: int
    loss: Tensor


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch gave.

    Attributes:
        epoch: 1 for the first.
        is_best: this epoch's objective is better than every earlier one's.
        validation_logits: float32, shape (num_validation, num_classes), on the CPU.
        network: the one that was evaluated, in eval mode: the averaged weights with `ema_decay`.
            It trains on in the next epoch, so whatever is kept of it is copied before.
        step_losses: every `log_every_steps`-th step's loss; empty if not asked for.
        notes: what happened in this epoch and a user should know, a line each.
        findings: what rules on the recording see that no later step can take back.
    """

    epoch: int
    metrics: EpochMetrics
    is_best: bool
    validation_logits: Tensor
    network: nn.Module
    step_losses: tuple[StepLoss, ...] = ()
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
