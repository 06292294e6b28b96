"""An exponential moving average of the weights (EMA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_copy(network: nn.Module, decay: float) -> AveragedModel:
    """A copy whose weights follow those of `network`; call `update_parameters` after every step.

    After n updates the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that a short
    training is not held back by the weights it began with. Buffers, such as the statistics of
    batch normalisation, are copied.

    Source: Polyak and Juditsky 1992; the first updates as in TensorFlow's
    `ExponentialMovingAverage(num_updates=…)`.
    """

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        kept = min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(average, current, 1 - kept)

    # The counter lies on the CPU, so reading it never waits for the device.
    return AveragedModel(network, multi_avg_fn=update)  # type: ignore[arg-type]
