"""An exponential moving average of the weights (EMA)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


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
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - kept)
        buffers = list(self.module.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(network.buffers()))
        self.n_averaged += 1
