"""One pass over the training samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from visiontuner import interrupts
from visiontuner.training.epoch import EpochMetrics
from visiontuner.training.metrics import Scores
from visiontuner.training.optimisation import learning_rate_of
from visiontuner.training.results import StepDone, StepLoss
from visiontuner.training.step import TrainingStep


class Trained(NamedTuple):
    """Means over the samples (of the gradient's norm: over the steps) of one epoch.

    Attributes:
        learning_rate: the head's, at the first step: with a cosine the last one is near 0.
    """

    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    samples: int
    step_losses: tuple[StepLoss, ...]

    def joined_with(self, scores: Scores, *, seconds: float) -> EpochMetrics:
        """The epoch's numbers, with those of evaluation; `seconds` is what training took."""
        return EpochMetrics(
            train_loss=self.loss,
            train_accuracy=self.accuracy,
            validation_loss=scores.loss,
            validation_accuracy=scores.accuracy,
            validation_macro_f1=scores.macro_f1,
            learning_rate=self.learning_rate,
            gradient_norm=self.gradient_norm,
            epoch_seconds=seconds,
            images_per_second=self.samples / max(seconds, 1e-9),
        )


def train_epoch(
    take_step: TrainingStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    epoch: int,
    steps_per_epoch: int,
    log_every_steps: int | None = None,
    on_step: Callable[[StepDone], None] | None = None,
) -> Trained:
    """A step for every batch. Sums stay on the device: one transfer an epoch."""
    take_step.network.train()
    zero = torch.zeros((), device=take_step.device)
    loss_sum, correct, norm_sum = zero.clone(), zero.clone(), zero.clone()
    learning_rate = learning_rate_of(take_step.optimizer)
    samples, steps, before, step_losses = 0, 0, (epoch - 1) * steps_per_epoch, []
    watch = take_step.watch
    for inputs, labels in batches:
        interrupts.check()
        steps += 1
        watch.spent_on("data")
        watch.step_begins(before + steps, inputs)
        outcome = take_step(inputs, labels)
        samples += len(labels)
        loss_sum += outcome.loss * len(labels)
        correct += outcome.correct
        norm_sum += outcome.gradient_norm
        if log_every_steps and steps % log_every_steps == 0:
            step_losses.append((before + steps, outcome.loss))
        if on_step is not None:
            on_step(StepDone(epoch, before + steps, steps_per_epoch, outcome.loss))
        watch.spent_on("reporting")
        watch.step_ends()
    return Trained(
        loss=float(loss_sum) / samples,
        accuracy=float(correct) / samples,
        learning_rate=learning_rate,
        gradient_norm=float(norm_sum) / steps,
        samples=samples,
        step_losses=tuple(StepLoss(step, float(loss)) for step, loss in step_losses),
    )
