"""Linear heads of many trials, trained side by side: the numbers of `Fit` in less time.

Trials that share a batch size and a seed see the same batches: `Fit` draws its order from the seed
alone. So a step of all of them is one product of the batch with all heads' weights, and features
are read from memory once instead of once a trial. Optimizer, schedule, loss, initial heads and
order are the product's own functions; `largest_difference` trains one of them with `Fit`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import Fit, linear_head, training_loss
from visiontuner.training.optimisation import make_optimizer, make_schedule

# What `Fit` does and this does not; the default search space has none of it.
_NOT_TOGETHER = ("dropout", "early_stop", "gradient_clip", "ema_decay", "micro_batch_size")


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Feature vectors, float32 (N, D), and their labels, int64 (N,)."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: NDArray[np.integer]) -> Points:
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return Points(features=self.features[index], labels=self.labels[index])

    @staticmethod
    def join(first: Points, second: Points) -> Points:
        return Points(
            features=torch.cat([first.features, second.features]),
            labels=torch.cat([first.labels, second.labels]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """H trained linear heads.

    Args:
        weights: float32, (H, C, D).
        biases: float32, (H, C).
    """

    weights: Tensor
    biases: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """float32, (H, N, C) for features (N, D)."""
        heads, classes, dim = self.weights.shape
        flat = torch.addmm(self.biases.reshape(-1), features, self.weights.reshape(-1, dim).T)
        return flat.reshape(len(features), heads, classes).permute(1, 0, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What the trainings gave.

    Args:
        last: the heads after their last epoch.
        best: those of the epoch with the highest validation accuracy, the first of equals.
        best_epoch: int, (H,), 1 for the first.
        accuracy, loss: float64, (H, epochs), on validation.
    """

    last: Heads
    best: Heads
    best_epoch: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]


def train_heads(
    train: Points,
    validation: Points | None,
    settings: Sequence[Training],
    *,
    num_classes: int,
    seed: int,
) -> Trained:
    """Train a head with each of the settings; without validation nothing is recorded.

    Raises:
        ValueError: settings that heads cannot have side by side.
    """
    for name in _NOT_TOGETHER:
        if any(getattr(s, name) for s in settings):
            raise ValueError(f"heads with training.{name} are not trained together")
    if any(s.class_weights != "none" for s in settings):
        raise ValueError("heads with training.class_weights are not trained together")
    together = defaultdict(list)
    for place, own in enumerate(settings):
        # A batch size beyond the training set takes the whole set, whatever it is.
        size = min(own.batch_size, len(train))
        together[own.model_copy(update={"learning_rate": 1.0, "batch_size": size})].append(place)
    dim, count, epochs = train.features.shape[1], len(settings), settings[0].epochs
    parts = {k: torch.empty(count, num_classes, dim) for k in ("last", "best")}
    biases = {k: torch.empty(count, num_classes) for k in ("last", "best")}
    accuracy, loss = np.full((2, count, epochs), np.nan)
    for common, places in together.items():
        group = _Group(
            train, common, [settings[i].learning_rate for i in places], num_classes, seed
        )
        best_yet = torch.full((len(places),), -1.0)
        for epoch in range(epochs):
            group.run_epoch()
            if validation is None:
                continue
            right, losses = _scores(group.heads.logits(validation.features), validation.labels)
            accuracy[places, epoch], loss[places, epoch] = right.numpy(), losses.numpy()
            better = (right > best_yet).nonzero()[:, 0]
            best_yet[better] = right[better]
            kept = [places[i] for i in better]
            parts["best"][kept] = group.heads.weights[better]
            biases["best"][kept] = group.heads.biases[better]
        parts["last"][places], biases["last"][places] = group.heads.weights, group.heads.biases
    if validation is None:
        parts["best"], biases["best"] = parts["last"], biases["last"]
        best_epoch = np.full(count, epochs)
    else:
        best_epoch = accuracy.argmax(axis=1) + 1
    return Trained(
        last=Heads(weights=parts["last"], biases=biases["last"]),
        best=Heads(weights=parts["best"], biases=biases["best"]),
        best_epoch=best_epoch,
        accuracy=accuracy,
        loss=loss,
    )


def out_of_fold(
    points: Points,
    folds: NDArray[np.int64],
    settings: Sequence[Training],
    *,
    num_classes: int,
    seed: int,
) -> Tensor:
    """Each image's answers by the heads that did not learn from its fold, after the last epoch.

    Args:
        folds: int64, (N,).

    Returns:
        float32, (len(settings), N, num_classes).
    """
    count, total = int(folds.max()) + 1, len(points)
    own = torch.from_numpy(folds)
    seen = torch.ones(total, count)  # which images each head may learn from
    seen[torch.arange(total), own] = 0
    answers = torch.empty(len(settings), total, num_classes)
    together = defaultdict(list)
    for place, setting in enumerate(settings):
        size = min(setting.batch_size, total)
        together[setting.model_copy(update={"learning_rate": 1.0, "batch_size": size})].append(
            place
        )
    for common, places in together.items():
        rates = [settings[place].learning_rate for place in places for _ in range(count)]
        group = _Group(points, common, rates, num_classes, seed)
        weights = seen.repeat(1, len(places))  # (N, trials * folds)
        for _ in range(common.epochs):
            group.run_epoch(weights)
        logits = group.heads.logits(points.features)  # (trials * folds, N, C)
        logits = logits.reshape(len(places), count, total, num_classes)
        answers[places] = logits[:, own, torch.arange(total)]
    return answers


class _Group:
    """Heads that differ in their learning rate alone."""

    def __init__(
        self, train: Points, common: Training, rates: Sequence[float], num_classes: int, seed: int
    ) -> None:
        count, dim = len(rates), train.features.shape[1]
        head = linear_head(dim, num_classes, dropout=0.0, seed=seed)[1]
        self._weight = head.weight.detach().repeat(count, 1).requires_grad_()
        self._bias = head.bias.detach().repeat(count).requires_grad_()
        self._weight.grad, self._bias.grad = map(torch.zeros_like, (self._weight, self._bias))
        own = [
            self._parameters(slice(h * num_classes, (h + 1) * num_classes)) for h in range(count)
        ]
        groups = [{"params": p, "lr": lr} for p, lr in zip(own, rates, strict=True)]
        self._optimizer = make_optimizer(
            nn.ParameterList(p for both in own for p in both), common, groups
        )
        self._batches = FeatureBatches(train.features, train.labels, batch_size=common.batch_size)
        steps = math.ceil(len(train) / common.batch_size) * common.epochs
        self._schedule = make_schedule(self._optimizer, common, total_steps=steps)
        self._order = torch.Generator().manual_seed(seed)
        self._count, self._classes, self._settings = count, num_classes, common

    def _parameters(self, rows: slice) -> list[nn.Parameter]:
        """One head's: views into the tensors of all, and so are their gradients."""
        parameters = []
        for all_heads in (self._weight, self._bias):
            own = nn.Parameter(all_heads.detach()[rows])
            assert all_heads.grad is not None
            own.grad = all_heads.grad[rows]
            parameters.append(own)
        return parameters

    @property
    def heads(self) -> Heads:
        weights = self._weight.detach().reshape(self._count, self._classes, -1)
        return Heads(weights=weights, biases=self._bias.detach().reshape(self._count, -1))

    def run_epoch(self, weights: Tensor | None = None) -> None:
        """Args: weights: float32, (N, heads), how much each image counts for each head."""
        rows = torch.arange(len(self._batches.labels))
        indexed = FeatureBatches(rows, rows, batch_size=self._batches.batch_size)
        for batch, _ in indexed.shuffled(self._order):
            inputs, labels = self._batches.features[batch], self._batches.labels[batch]
            assert self._weight.grad is not None
            assert self._bias.grad is not None
            self._weight.grad.zero_()
            self._bias.grad.zero_()
            logits = functional.linear(inputs, self._weight, self._bias)  # (B, H * C)
            flat, truth = logits.reshape(-1, self._classes), labels.repeat_interleave(self._count)
            smoothing = self._settings.label_smoothing
            if weights is None:
                loss = training_loss(flat, truth, None, smoothing) * self._count
            else:
                losses = functional.cross_entropy(
                    flat, truth, label_smoothing=smoothing, reduction="none"
                ).reshape(len(labels), self._count)
                own = weights[batch]
                loss = ((losses * own).sum(dim=0) / own.sum(dim=0).clamp(min=1)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._schedule.step()


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and loss of each head, (H,), for logits (H, N, C)."""
    right = (logits.argmax(dim=2) == labels).double().mean(dim=1).float()
    losses = functional.cross_entropy(
        logits.reshape(-1, logits.shape[2]), labels.repeat(len(logits)), reduction="none"
    )
    return right, losses.reshape(len(logits), -1).mean(dim=1)


def largest_difference(
    trained: Trained,
    train: Points,
    validation: Points,
    settings: Sequence[Training],
    places: Sequence[int],
    *,
    num_classes: int,
    seed: int,
) -> float:
    """Between some heads' last validation logits and those that the product's `Fit` gives."""
    together = trained.last.logits(validation.features)
    worst = 0.0
    for place in places:
        own = settings[place]
        training = Fit(
            linear_head(train.features.shape[1], num_classes, dropout=own.dropout, seed=seed),
            FeatureBatches(train.features, train.labels, batch_size=own.batch_size),
            FeatureBatches(validation.features, validation.labels, batch_size=own.batch_size),
            own,
            num_classes=num_classes,
            seed=seed,
        )
        alone = list(training.epochs())[-1].validation_logits
        worst = max(worst, float((alone - together[place]).abs().max()))
    return worst
