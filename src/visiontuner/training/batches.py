"""What a training runs on: batches of inputs and labels, from features or from pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Rows of logits computed at a time in evaluation: bounds memory, whatever the split's size.
EVALUATION_BATCH = 4096


class Batches(Protocol):
    """What `fit` trains or evaluates on."""

    @property
    def labels(self) -> Tensor:
        """int64, shape (num_samples,), in the order that `in_order` yields."""

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of (inputs, labels) batches in random order; every sample once.

        Labels are int64 (B,), or float32 (B, num_classes) with rows that sum to 1 where pictures
        are mixed. What is random follows from `generator` alone, or from torch's global generator.
        """

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


def needs_joining(network: nn.Module, *, samples: int, batch_size: int) -> bool:
    """Whether the last batch has one sample, and the network a layer that cannot learn from one."""
    return learns_from_batches(network) and samples > batch_size > 1 and samples % batch_size == 1


def learns_from_batches(network: nn.Module) -> bool:
    """Whether it has batch normalisation that learns: one sample has no variance."""
    network.train()
    return any(isinstance(m, _BatchNorm) and m.training for m in network.modules())


def join_last_single(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; a last one of a single sample becomes part of the one before it.

    Batch normalisation cannot learn from one picture: it has no variance.
    """
    held: tuple[Tensor, Tensor] | None = None
    for inputs, labels in batches:
        if held is not None and len(labels) == 1:
            held = torch.cat([held[0], inputs]), torch.cat([held[1], labels])
            continue
        if held is not None:
            yield held
        held = inputs, labels
    if held is not None:
        yield held
