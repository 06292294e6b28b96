"""One optimizer step: forward, backward, clip, step; a batch in pieces where memory asks for it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from visiontuner.errors import TrialFailed
from visiontuner.experiment import Training
from visiontuner.training.batches import learns_from_batches
from visiontuner.training.ema import WeightAverage
from visiontuner.training.micro_batches import MicroBatches
from visiontuner.training.watch import Watch


class StepOutcome(NamedTuple):
    """What one step gave; on the network's device, since reading a number waits for it.

    Attributes:
        loss: float32, (): the batch's training loss, before the step.
        correct: int64, (): samples whose largest logit is their label's.
        gradient_norm: float32, (): L2 norm over all trained parameters, before clipping.
    """

    loss: Tensor
    correct: Tensor
    gradient_norm: Tensor


class TrainingStep:
    """Takes optimizer steps; call it with a batch.

    A batch larger than `micro_batches.size` goes through in pieces whose gradients add up to those
    of the whole batch (but batch normalisation sees each piece alone).

    Args:
        class_weights: float32, (num_classes,), on the network's device, or None.
        average: follows the weights, or None.
        watch: told what is done.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        settings: Training,
        *,
        class_weights: Tensor | None = None,
        average: WeightAverage | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.schedule = schedule
        self.settings = settings
        self.class_weights = class_weights
        self.average = average
        self.watch = watch or Watch()
        self.micro_batches = MicroBatches(
            settings.micro_batch_size,
            where="training",
            fewest=2 if learns_from_batches(network) else 1,
        )
        self.device = next(network.parameters()).device
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]

    def __call__(self, inputs: Tensor, labels: Tensor) -> StepOutcome:
        """One step on inputs (B, …) and labels, int64 (B,) or shares of classes float32 (B, C).

        Raises:
            TrialFailed: one picture does not fit into memory, or batch normalisation got one value.
        """
        backward = functools.partial(self._backward, inputs, labels)
        loss, correct = self.micro_batches.run(len(labels), backward)
        self.watch.gradients_ready()
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self._parameters if p.grad is not None]
            )
            if self.settings.gradient_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters, self.settings.gradient_clip, norm
                )
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.network)
        self.watch.spent_on("optimizer")
        self.watch.weights_moved()
        return StepOutcome(loss, correct, norm)

    def _backward(self, inputs: Tensor, labels: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """The batch's loss and number of correct answers; its gradients are in the parameters."""
        self.optimizer.zero_grad()
        self.watch.passes_begin()
        if len(sizes) == 1:
            loss, correct = self._forward(inputs, labels)
            self._backpropagate(loss)
            return loss.detach(), correct
        weight = total_weight(labels, self.class_weights)
        parts = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
        losses, corrects = [], []
        for part, part_labels in parts:
            loss, correct = self._forward(part, part_labels)
            # The mean over the batch is the sum of the pieces' means, each with its share.
            loss = loss * (total_weight(part_labels, self.class_weights) / weight)
            self._backpropagate(loss)
            losses.append(loss.detach())
            corrects.append(correct)
        return torch.stack(losses).sum(), torch.stack(corrects).sum()

    def _backpropagate(self, loss: Tensor) -> None:
        self.watch.spent_on("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        self.watch.spent_on("backward")

    def _forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            logits = self._logits(inputs)  # (B, num_classes)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrialFailed(
                "Batch normalisation cannot learn from one picture at a time; use a batch_size "
                "(and micro_batch_size) of at least 2, or training.freeze_batch_norm: true.",
                comes_back=True,
            ) from None
        loss = training_loss(logits, labels, self.class_weights, self.settings.label_smoothing)
        with torch.no_grad():
            label = labels.argmax(dim=1) if labels.is_floating_point() else labels
            return loss, (logits.argmax(dim=1) == label).sum()

    def _logits(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 4:  # features
            return self.network(inputs)  # type: ignore[no-any-return]
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self.settings.precision == "fp32":
            return self.network(inputs)  # type: ignore[no-any-return]
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return self.network(inputs).float()  # type: ignore[no-any-return]


def training_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Cross-entropy, the mean over the samples, each with the weight of its class.

    Args:
        logits: float, (B, num_classes).
        labels: int64 (B,), or shares of classes float32 (B, num_classes) with rows that sum to 1:
            a one-hot row counts exactly as its label does.
    """
    if class_weights is None or not labels.is_floating_point():
        return functional.cross_entropy(
            logits, labels, weight=class_weights, label_smoothing=label_smoothing
        )
    # torch would divide by the number of rows here, but by the sum of weights for int64 labels.
    summed = functional.cross_entropy(
        logits, labels, weight=class_weights, label_smoothing=label_smoothing, reduction="sum"
    )
    return summed / total_weight(labels, class_weights)


def total_weight(labels: Tensor, class_weights: Tensor | None) -> Tensor | int:
    """What a batch weighs: the sum of its samples' class weights, without them their number."""
    if class_weights is None:
        return len(labels)
    if labels.is_floating_point():
        return (labels @ class_weights).sum()
    return class_weights[labels].sum()
