"""Epochs -> EpochResult: one training loop, for feature vectors and for pictures.

`fit` knows neither Ray nor MLflow: it yields after every epoch and stops when it is no longer
asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from visiontuner.errors import TrialFailed
from visiontuner.experiment import Training
from visiontuner.training.epoch import EpochMetrics
from visiontuner.training.metrics import Scores, balanced_class_weights, score

# Rows of logits computed at a time in evaluation: bounds memory, whatever the split's size.
EVALUATION_BATCH = 4096


class Batches(Protocol):
    """What `fit` trains or evaluates on."""

    @property
    def labels(self) -> Tensor:
        """int64, shape (num_samples,), in the order that `in_order` yields."""

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of (inputs, labels) batches in random order; every sample once."""

    def in_order(self) -> Iterator[Tensor]:
        """One pass over the inputs alone, in their fixed order."""


class FeatureBatches:
    """Batches of rows of a feature matrix, which may be memory-mapped.

    Args:
        features: float32, shape (num_samples, feature_dim).
        labels: int64, shape (num_samples,).
    """

    def __init__(self, features: Tensor, labels: Tensor, *, batch_size: int) -> None:
        self.features = features
        self.labels = labels
        self.batch_size = batch_size

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for rows in torch.split(order, self.batch_size):
            yield self.features.index_select(0, rows), self.labels.index_select(0, rows)

    def in_order(self) -> Iterator[Tensor]:
        yield from torch.split(self.features, EVALUATION_BATCH)


class StepLoss(NamedTuple):
    """Training loss of one optimizer step, for curves finer than an epoch."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch gave.

    Attributes:
        epoch: 1 for the first.
        is_best: this epoch's objective is better than every earlier one's.
        validation_logits: float32, shape (num_validation, num_classes), on the CPU.
        step_losses: every `log_every_steps`-th step's loss; empty if not asked for.
    """

    epoch: int
    metrics: EpochMetrics
    is_best: bool
    validation_logits: Tensor
    step_losses: tuple[StepLoss, ...] = ()


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
    objective: str = "validation_accuracy",
    mode: Literal["min", "max"] = "max",
) -> Iterator[EpochResult]:
    """Train `network` in place and yield once an epoch.

    The same seed gives the same numbers on the same machine with the same number of threads.

    Raises:
        TrialFailed: the loss is not finite; the message has the epoch and the learning rate.
    """
    torch.manual_seed(seed)  # dropout draws from the global generator
    order = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(network, settings)
    steps_per_epoch = math.ceil(len(train.labels) / settings.batch_size)
    schedule = make_schedule(optimizer, settings, total_steps=steps_per_epoch * settings.epochs)
    weights = (
        balanced_class_weights(train.labels, num_classes).to(train.labels.device)
        if settings.class_weights == "balanced"
        else None
    )
    best, epochs_without_better = -math.inf, 0
    for epoch in range(1, settings.epochs + 1):
        started = time.perf_counter()
        trained = _train_epoch(
            network, train, optimizer, schedule, order, settings, weights, epoch - 1
        )
        _require_finite(trained.loss, "training loss", epoch, trained.learning_rate)
        seconds = time.perf_counter() - started
        logits, scores = evaluate(network, validation)
        _require_finite(scores.loss, "validation loss", epoch, trained.learning_rate)
        metrics = _join(trained, scores, seconds, len(train.labels))
        value = metrics.to_dict()[objective] * (1 if mode == "max" else -1)
        is_best = value > best
        best = max(best, value)
        epochs_without_better = 0 if is_best else epochs_without_better + 1
        yield EpochResult(
            epoch=epoch,
            metrics=metrics,
            is_best=is_best,
            validation_logits=logits,
            step_losses=trained.step_losses,
        )
        if settings.early_stop is not None and epochs_without_better >= settings.early_stop:
            return


def evaluate(network: nn.Module, batches: Batches) -> tuple[Tensor, Scores]:
    """Logits (num_samples, num_classes) on the CPU, in order, and their scores."""
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(inputs).float() for inputs in batches.in_order()])
        scores = score(logits, batches.labels)
    return logits.cpu(), scores


def make_optimizer(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with Nesterov momentum over the parameters that need gradients."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=decay,
        )
    adam = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return adam(parameters, lr=settings.learning_rate, weight_decay=decay, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: Training, *, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of every optimizer step: linear warm-up, then constant or cosine to 0."""
    warmup_steps = round(settings.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if settings.schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class _Trained(NamedTuple):
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    step_losses: tuple[StepLoss, ...]


def _train_epoch(
    network: nn.Module,
    train: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
    settings: Training,
    class_weights: Tensor | None,
    epochs_done: int,
) -> _Trained:
    """One pass over the training samples. Sums stay on the device: one transfer an epoch."""
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    zero = torch.zeros((), device=train.labels.device)
    loss_sum, correct, norm_sum = zero.clone(), zero.clone(), zero.clone()
    learning_rate, steps, step_losses = 0.0, 0, []
    for inputs, labels in train.shuffled(order):
        logits = network(inputs)  # (B, num_classes)
        loss = functional.cross_entropy(
            logits, labels, weight=class_weights, label_smoothing=settings.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if steps == 0:  # the epoch's first step: with a cosine the last one is near 0
            learning_rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        steps += 1
        with torch.no_grad():
            loss_sum += loss * len(labels)
            correct += (logits.argmax(dim=1) == labels).sum()
            norm_sum += torch.nn.utils.get_total_norm(
                [p.grad for p in parameters if p.grad is not None]
            )
        if settings.log_every_steps and steps % settings.log_every_steps == 0:
            step_losses.append((steps, loss.detach()))
    samples = len(train.labels)
    return _Trained(
        loss=float(loss_sum) / samples,
        accuracy=float(correct) / samples,
        learning_rate=learning_rate,
        gradient_norm=float(norm_sum) / steps,
        step_losses=tuple(StepLoss(epochs_done * steps + s, float(v)) for s, v in step_losses),
    )


def _join(trained: _Trained, scores: Scores, seconds: float, samples: int) -> EpochMetrics:
    return EpochMetrics(
        train_loss=trained.loss,
        train_accuracy=trained.accuracy,
        validation_loss=scores.loss,
        validation_accuracy=scores.accuracy,
        validation_macro_f1=scores.macro_f1,
        learning_rate=trained.learning_rate,
        gradient_norm=trained.gradient_norm,
        epoch_seconds=seconds,
        images_per_second=samples / max(seconds, 1e-9),
    )


def _require_finite(loss: float, what: str, epoch: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise TrialFailed(
            f"The {what} is {loss} in epoch {epoch} at learning rate {learning_rate:.3g}; "
            "try a smaller learning rate."
        )
