"""Cross-validation of a linear head in one training: heads side by side, each blind to a fold.

Every head sees the same batches, in which the images of its own fold weigh nothing, so that one
pass over the features and one matrix product train all of them. The answers that count are those
of each image's own head, which has never learnt from it: its out-of-fold answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from visiontuner.training.batches import FeatureBatches

_ROWS = 256  # images answered at once: their features stay in a core's cache


class FoldedHead(nn.Sequential):
    """One head for each fold; float32 (B, feature_dim) -> (B, num_folds, num_classes).

    All begin with the same weights, those of `head`.

    Args:
        head: dropout and a linear layer, as `linear_head` makes it.
    """

    def __init__(self, head: nn.Sequential, num_folds: int) -> None:
        dropout, linear = head
        assert isinstance(linear, nn.Linear)
        folded = nn.Linear(linear.in_features, num_folds * linear.out_features)
        with torch.no_grad():
            folded.weight.copy_(linear.weight.repeat(num_folds, 1))
            folded.bias.copy_(linear.bias.repeat(num_folds))
        super().__init__(dropout, folded, nn.Unflatten(1, (num_folds, linear.out_features)))
        self.num_folds = num_folds

    def out_of_fold(self, batches: FoldedBatches) -> Tensor:
        """Answers to each image by the head of its own fold: (num_samples, num_classes)."""
        _, linear, _ = self
        assert isinstance(linear, nn.Linear)
        weights = linear.weight.view(self.num_folds, -1, linear.in_features)
        biases = linear.bias.view(self.num_folds, -1)
        logits: Tensor = weights.new_empty(len(batches.labels), weights.shape[1])
        for fold in range(self.num_folds):
            rows = torch.nonzero(batches.folds == fold)[:, 0]
            for piece in torch.split(rows, _ROWS):
                inputs = batches.features.index_select(0, piece)
                logits[piece] = functional.linear(inputs, weights[fold], biases[fold])
        return logits

    @torch.no_grad()
    def clip_gradients(self, largest: float | None) -> Tensor:
        """Clip each head's gradient by itself; the mean of their L2 norms before that."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        parts = [torch.linalg.vector_norm(g.reshape(self.num_folds, -1), dim=1) for g in gradients]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)  # (num_folds,)
        if largest is not None:
            shares = (largest / (norms + 1e-6)).clamp(max=1)  # as clip_grad_norm_ does
            for gradient in gradients:
                gradient.reshape(self.num_folds, -1).mul_(shares[:, None])
        return norms.mean()


class FoldedBatches(FeatureBatches):
    """Batches of features whose labels carry the fold of each image.

    Args:
        features: float32, shape (num_samples, feature_dim).
        labels: int64, shape (num_samples,).
        folds: int64, shape (num_samples,), values in [0, num_folds).
    """

    def __init__(self, features: Tensor, labels: Tensor, folds: Tensor, *, batch_size: int) -> None:
        super().__init__(features, labels, batch_size=batch_size)
        self.folds = folds

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of features (B, feature_dim) with label and fold of each, int64 (B, 2)."""
        targets = torch.stack([self.labels, self.folds], dim=1)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for rows in torch.split(order, self.batch_size):
            yield self.features.index_select(0, rows), targets.index_select(0, rows)

    def spread(self, values: Tensor) -> float:
        """Standard deviation over the folds of the mean of `values`, shape (num_samples,)."""
        folds = int(self.folds.max()) + 1
        sums = torch.zeros(folds, dtype=torch.float64, device=values.device)
        sums.index_add_(0, self.folds, values.double())
        counts = torch.bincount(self.folds, minlength=folds)
        means = (sums / counts.clamp(min=1))[counts > 0]
        return float(means.std()) if len(means) > 1 else math.nan


def folded_losses(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Each head's cross-entropy, the mean over the images that it may learn from: (num_folds,).

    Args:
        logits: float32, (B, num_folds, num_classes).
        targets: int64, (B, 2): label and fold.
    """
    seen, weights = _seen(targets, logits.shape[1], class_weights)
    losses = functional.cross_entropy(
        logits.flatten(0, 1),
        targets[:, 0].repeat_interleave(logits.shape[1]),
        weight=class_weights,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return (losses.view_as(seen) * seen).sum(dim=0) / weights


def folded_weights(targets: Tensor, num_folds: int, class_weights: Tensor | None) -> Tensor:
    """What a batch weighs for each head, (num_folds,): the images that it may learn from."""
    return _seen(targets, num_folds, class_weights)[1]


def _seen(targets: Tensor, num_folds: int, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which images each head may learn from, (B, num_folds), and their sums of weights."""
    folds = torch.arange(num_folds, device=targets.device)
    seen = (targets[:, 1, None] != folds).float()
    weights = seen if class_weights is None else seen * class_weights[targets[:, 0]][:, None]
    # A batch of one fold alone teaches its head nothing: 0 / tiny.
    return seen, weights.sum(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
