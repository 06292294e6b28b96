"""The training loop: epochs -> EpochResult, for feature vectors and for images."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visiontuner import interrupts
from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.journal import EpochMetrics, Finding
from visiontuner.training.batches import (
    Batches,
    MicroBatches,
    failing_out_of_memory,
    join_last_single,
    learns_from_batches,
    needs_joining,
)
from visiontuner.training.callbacks import TrainingCallback
from visiontuner.training.checkpoint import (
    identity_of,
    load_optimizer,
    random_state,
    regrouped,
    require_fitting,
    require_same,
    set_random_state,
)
from visiontuner.training.cross_validation import (
    FoldedBatches,
    FoldedHead,
    folded_losses,
    folded_weights,
)
from visiontuner.training.metrics import Scores, balanced_class_weights, score
from visiontuner.training.optimisation import (
    ParameterGroup,
    learning_rate_of,
    make_optimizer,
    make_schedule,
)
from visiontuner.workarounds.torch import full_float32

# What a training tells while it runs: after every step, and after every epoch.


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
        is_kept: this epoch is to be kept instead of those before it; see `Fit.keeps_last`.
        is_last: the training ends with it.
        validation_logits: float32, shape (num_validation, num_classes), on the CPU; of folds the
            out-of-fold logits of all images.
        network: the one that was evaluated, in eval mode: the averaged weights with `ema_decay`.
            It trains on in the next epoch, so whatever is kept of it is copied before.
        step_losses: every `log_every_steps`-th step's loss; empty if not asked for.
        notes: what happened in this epoch and a user should know, a line each.
        findings: what rules on the recording see that no later step can take back.
    """

    epoch: int
    metrics: EpochMetrics
    is_kept: bool
    is_last: bool
    validation_logits: Tensor
    network: nn.Module
    step_losses: tuple[StepLoss, ...] = ()
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


# An exponential moving average of the weights (EMA).


class WeightAverage(nn.Module):
    """A copy of a network, `module`, whose weights follow the trained ones; `update` after a step.

    After n updates the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that a short
    training is not held back by the weights it began with. Buffers, such as the statistics of
    batch normalisation, are copied. torch's own `AveragedModel` does the same, but reads its
    counter from the device, so that every step would wait for a GPU.

    Source: Polyak and Juditsky 1992; the first updates as in TensorFlow's
    `ExponentialMovingAverage(num_updates=…)`.
    """

    n_averaged: Tensor  # on the CPU, so that reading it never waits

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(network)
        self.register_buffer("n_averaged", torch.tensor(0))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow `network`; the first update takes its weights as they are."""
        n = int(self.n_averaged)
        kept = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        average = get_ema_multi_avg_fn(kept)  # type: ignore[no-untyped-call]
        average(list(self.module.parameters()), list(network.parameters()), 0)
        for average_buffer, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            average_buffer.copy_(buffer)
        self.n_averaged += 1


# One optimizer step: forward, backward, clip, step; a batch in pieces where memory asks for it.


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
        callback: told what is done.
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
        callback: TrainingCallback | None = None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.schedule = schedule
        self.settings = settings
        self.class_weights = class_weights
        self.average = average
        self.callback = callback or TrainingCallback()
        self.micro_batches = MicroBatches(
            settings.micro_batch_size,
            where="training",
            fewest=2 if learns_from_batches(network) else 1,
        )
        self.device = next(network.parameters()).device
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]

    def __call__(self, inputs: Tensor, labels: Tensor) -> StepOutcome:
        """One step on inputs (B, …) and labels, int64 (B,) or shares of classes float32 (B, C).

        Of a `FoldedHead` the labels are those of `FoldedBatches`, and the loss is the heads' mean.

        Raises:
            TrialFailed: one image does not fit into memory, or batch normalisation got one value.
        """
        backward = functools.partial(self._backward, inputs, labels)
        loss, correct = self.micro_batches.run(len(labels), backward)
        self.callback.gradients_ready()
        with torch.no_grad():
            norm = self._clip()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.network)
        self.callback.spent_on("optimizer")
        self.callback.weights_moved()
        return StepOutcome(loss, correct, norm)

    def _clip(self) -> Tensor:
        """Clip the gradients if asked to; their L2 norm before that, of folds the heads' mean."""
        largest = self.settings.gradient_clip
        if isinstance(self.network, FoldedHead):
            return self.network.clip_gradients(largest)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self._parameters if p.grad is not None]
        )
        if largest is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, largest, norm)
        return norm

    def _backward(self, inputs: Tensor, labels: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """The batch's loss and number of correct answers; its gradients are in the parameters."""
        self.optimizer.zero_grad()
        self.callback.passes_begin()
        if len(sizes) == 1:
            loss, correct = self._forward(inputs, labels)
            self._backpropagate(loss)
            return loss.detach().mean(), correct
        weight = self._weight(labels)
        parts = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
        losses, corrects = [], []
        for part, part_labels in parts:
            loss, correct = self._forward(part, part_labels)
            # The mean over the batch is the sum of the pieces' means, each with its share.
            loss = loss * (self._weight(part_labels) / weight)
            self._backpropagate(loss)
            losses.append(loss.detach().mean())
            corrects.append(correct)
        return torch.stack(losses).sum(), torch.stack(corrects).sum()

    def _weight(self, labels: Tensor) -> Tensor | int:
        if isinstance(self.network, FoldedHead):
            return folded_weights(labels, self.network.num_folds, self.class_weights)
        return total_weight(labels, self.class_weights)

    def _backpropagate(self, loss: Tensor) -> None:
        """Of folds the loss of each head, (num_folds,): they have no weight in common."""
        self.callback.spent_on("forward")
        loss.sum().backward()  # type: ignore[no-untyped-call]
        self.callback.spent_on("backward")

    def _forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            logits = self._logits(inputs)  # (B, num_classes)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrialFailed(
                "Batch normalisation cannot learn from one image at a time; use a batch_size "
                "(and micro_batch_size) of at least 2, or training.freeze_batch_norm: true.",
                deterministic=True,
            ) from None
        smoothing = self.settings.label_smoothing
        if isinstance(self.network, FoldedHead):
            loss = folded_losses(logits, labels, self.class_weights, smoothing)
            with torch.no_grad():  # the mean of the heads that learn from an image
                right = logits.argmax(dim=2) == labels[:, :1]  # (B, num_folds)
                own = right.gather(1, labels[:, 1:])
                return loss, (right.sum() - own.sum()) / (self.network.num_folds - 1)
        loss = training_loss(logits, labels, self.class_weights, smoothing)
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


# One pass over the training samples.


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
    callback = take_step.callback
    for inputs, labels in batches:
        interrupts.check()
        steps += 1
        callback.spent_on("data")
        callback.step_begins(before + steps, inputs)
        outcome = take_step(inputs, labels)
        samples += len(labels)
        loss_sum += outcome.loss * len(labels)
        correct += outcome.correct
        norm_sum += outcome.gradient_norm
        if log_every_steps and steps % log_every_steps == 0:
            step_losses.append((before + steps, outcome.loss))
        if on_step is not None:
            on_step(StepDone(epoch, before + steps, steps_per_epoch, outcome.loss))
        callback.spent_on("reporting")
        callback.step_ends()
    return Trained(
        loss=float(loss_sum) / samples,
        accuracy=float(correct) / samples,
        learning_rate=learning_rate,
        gradient_norm=float(norm_sum) / steps,
        samples=samples,
        step_losses=tuple(StepLoss(step, float(loss)) for step, loss in step_losses),
    )


# One pass over the images a network has not seen.


def evaluate(
    network: nn.Module, batches: Batches, micro_batches: MicroBatches | None = None
) -> tuple[Tensor, Scores]:
    """Logits (num_samples, num_classes) on the CPU, in order, and their scores.

    Always in float32, whatever the training's precision: as the packaged classifier answers.

    Raises:
        TrialFailed: one image does not fit into memory.
    """
    network.eval()
    pieces = micro_batches or MicroBatches(None, where="evaluation")
    with torch.inference_mode(), full_float32():
        if isinstance(network, FoldedHead) and isinstance(batches, FoldedBatches):
            logits = network.out_of_fold(batches)
        else:
            logits = torch.cat(
                [
                    pieces.run(len(inputs), functools.partial(_answer, network, inputs))
                    for inputs in batches.in_order()
                ]
            )
        scores = score(logits, batches.labels.to(logits.device))
    return logits.cpu(), scores


def _answer(network: nn.Module, inputs: Tensor, sizes: list[int]) -> Tensor:
    interrupts.check()
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if len(sizes) == 1:
        return network(inputs).float()  # type: ignore[no-any-return]
    return torch.cat([network(part).float() for part in torch.split(inputs, sizes)])


# Epochs -> EpochResult: one training loop, for feature vectors and for images.
#
# `fit` knows neither Ray nor MLflow: it yields after every epoch and stops when it is no longer
# asked. `Fit` is the same with a state that can be saved between two epochs.


def linear_head(feature_dim: int, num_classes: int, *, dropout: float, seed: int) -> nn.Sequential:
    """Dropout and one linear layer, initialised from the seed alone.

    Maps float32 (B, feature_dim) to logits (B, num_classes); the layer is `head[1]`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, num_classes))


def fit(
    network: nn.Module,
    train: Batches,
    validation: Batches,
    settings: Training,
    *,
    num_classes: int,
    seed: int,
    parameter_groups: Sequence[ParameterGroup] | None = None,
) -> Iterator[EpochResult]:
    """Train `network` in place and yield once an epoch; `Fit` says more."""
    yield from Fit(
        network,
        train,
        validation,
        settings,
        num_classes=num_classes,
        seed=seed,
        parameter_groups=parameter_groups,
    ).epochs()


class Fit:
    """One training: `epochs()` runs it, `state_dict()` between two epochs is all it needs to go on.

    The same seed gives the same numbers on the same machine with the same number of threads, and so
    does a training that was interrupted and went on from its state.

    Args:
        network: trained in place, on the device of `train`'s batches. Its convolutions' weights
            are laid out channels last.
        parameter_groups: learning rates and decays of parts of the network; default: one group.
        on_step: called after every optimizer step.
        callback: told what is done within a step.

    Raises:
        ExperimentError: nothing of the network is trained.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Batches,
        validation: Batches,
        settings: Training,
        *,
        num_classes: int,
        seed: int,
        parameter_groups: Sequence[ParameterGroup] | None = None,
        on_step: Callable[[StepDone], None] | None = None,
        callback: TrainingCallback | None = None,
    ) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.settings = settings
        self.epoch = 0
        """Whole epochs trained so far."""
        self._train, self._validation = train, validation
        self._num_classes, self._seed = num_classes, seed
        self._identity = identity_of(settings, seed=seed, num_classes=num_classes)
        self._on_step, self._callback = on_step, callback or TrainingCallback()
        self._lowest_loss, self._epochs_without_better = math.inf, 0
        self._order = torch.Generator().manual_seed(seed)
        self._random: dict[str, Tensor] | None = None
        self._joins_last_single = needs_joining(
            network, samples=len(train.labels), batch_size=settings.batch_size
        )
        self.steps_per_epoch = (
            math.ceil(len(train.labels) / settings.batch_size) - self._joins_last_single
        )
        decay = settings.ema_decay
        self._average = None if decay is None else WeightAverage(network, decay)
        self._step = self._make_step(parameter_groups)
        self._evaluation = MicroBatches(None, where="evaluation")

    def _make_step(self, parameter_groups: Sequence[ParameterGroup] | None) -> TrainingStep:
        settings, labels = self.settings, self._train.labels
        optimizer = make_optimizer(self.network, settings, parameter_groups)
        steps = self.steps_per_epoch * settings.epochs
        weights = (
            balanced_class_weights(labels, self._num_classes).to(self._device)
            if settings.class_weights == "balanced"
            else None
        )
        return TrainingStep(
            self.network,
            optimizer,
            make_schedule(optimizer, settings, total_steps=steps),
            settings,
            class_weights=weights,
            average=self._average,
            callback=self._callback,
        )

    @property
    def keeps_last(self) -> bool:
        """Whether the last epoch is the one to keep: the learning rate falls to zero in it.

        Otherwise it is the one with the lowest validation loss.
        """
        return self.settings.keeps_last

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `early_stop` of them without a lower validation loss."""
        patience = self.settings.early_stop
        stopped = patience is not None and self._epochs_without_better >= patience
        return stopped or self.epoch >= self.settings.epochs

    def epochs(self) -> Iterator[EpochResult]:
        """Train on from the last whole epoch, and yield once an epoch.

        Raises:
            TrialFailed: the loss is not finite (the message has the epoch and the learning rate),
                or one image is more than memory holds.
        """
        while not self.finished:
            with failing_out_of_memory(self.settings.batch_size):
                result = self._run_epoch()
            yield result

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: tensors, numbers and text in plain containers.

        The tensors are the live ones, so save or copy them before the next epoch.
        """
        return {
            "identity": self._identity,
            "epoch": self.epoch,
            "lowest_loss": self._lowest_loss if self.epoch else None,
            "epochs_without_better": self._epochs_without_better,
            "network": dict(self.network.state_dict()),
            "average": None if self._average is None else dict(self._average.state_dict()),
            "optimizer": self._step.optimizer.state_dict(),
            "schedule": self._step.schedule.state_dict(),
            "order": self._order.get_state(),
            "random": self._random,
            "micro_batch_size": self._step.micro_batches.size,
            "evaluation_batch_size": self._evaluation.size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: it is of another network or was made with other settings.
        """
        # Checkpoints of before the objective had no say in a training name it.
        saved = {name: value for name, value in state["identity"].items() if name != "objective"}
        require_same(saved, self._identity)
        require_fitting(state["network"], self.network)
        self.network.load_state_dict(state["network"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        state = regrouped(state, self._step.optimizer, self.network)
        load_optimizer(self._step.optimizer, state["optimizer"])
        self._step.schedule.load_state_dict(dict(state["schedule"]))
        self._order.set_state(state["order"].cpu())
        self._random = state["random"]
        self.epoch = state["epoch"]
        lowest = state.get("lowest_loss")  # not in a checkpoint of before it counted
        self._lowest_loss = math.inf if lowest is None else lowest
        self._epochs_without_better = state["epochs_without_better"]
        self._step.micro_batches.limit(state["micro_batch_size"])
        self._evaluation.limit(state["evaluation_batch_size"])

    def _run_epoch(self) -> EpochResult:
        if self._random is None:
            torch.manual_seed(self._seed)  # dropout draws from the global generator
        else:  # whatever was drawn between two epochs
            set_random_state(self._random, self._device)
        epoch, started = self.epoch + 1, time.perf_counter()
        self._callback.epoch_begins(epoch, self.steps_per_epoch)
        trained = self._train_epoch()
        _require_finite(trained.loss, "training loss", epoch, trained.learning_rate)
        seconds = time.perf_counter() - started
        network = self.network if self._average is None else self._average.module
        logits, scores = evaluate(network, self._validation, self._evaluation)
        self._callback.epoch_ends()
        _require_finite(scores.loss, "validation loss", epoch, trained.learning_rate)
        metrics = trained.joined_with(scores, seconds=seconds)
        if isinstance(self._validation, FoldedBatches):
            metrics = _with_spread(metrics, self._validation, logits)
        is_kept = self._count(scores.loss) or self.keeps_last
        self.epoch = epoch
        self._random = random_state(self._device)
        return EpochResult(
            epoch=epoch,
            metrics=metrics,
            is_kept=is_kept,
            is_last=self.finished,
            validation_logits=logits,
            network=network,
            step_losses=trained.step_losses,
            notes=(*self._step.micro_batches.take_notes(), *self._evaluation.take_notes()),
        )

    def _count(self, loss: float) -> bool:
        """Whether this epoch's validation loss is the lowest so far."""
        is_lowest = loss < self._lowest_loss
        self._lowest_loss = min(self._lowest_loss, loss)
        self._epochs_without_better = 0 if is_lowest else self._epochs_without_better + 1
        return is_lowest

    def _train_epoch(self) -> Trained:
        batches: Iterable[tuple[Tensor, Tensor]] = self._train.shuffled(self._order)
        if self._joins_last_single:
            batches = join_last_single(batches)
        return train_epoch(
            self._step,
            batches,
            epoch=self.epoch + 1,
            steps_per_epoch=self.steps_per_epoch,
            log_every_steps=self.settings.log_every_steps,
            on_step=self._on_step,
        )

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def _with_spread(metrics: EpochMetrics, batches: FoldedBatches, logits: Tensor) -> EpochMetrics:
    labels, logits = batches.labels, logits.to(batches.labels.device)
    right = (logits.argmax(dim=1) == labels).float()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return replace(
        metrics,
        validation_accuracy_spread=batches.spread(right),
        validation_loss_spread=batches.spread(losses),
    )


def _require_finite(loss: float, what: str, epoch: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise TrialFailed(
            f"The {what} is {loss} in epoch {epoch} at learning rate {learning_rate:.3g}; "
            "try a smaller learning rate.",
            deterministic=True,
        )
