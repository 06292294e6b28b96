"""The optimizer and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from visiontuner.errors import ExperimentError
from visiontuner.experiment.schema import Training

ParameterGroup = dict[str, Any]
"""`params`, and what differs from the optimizer's defaults: `lr`, `weight_decay`, a `name`."""


def make_optimizer(
    network: nn.Module,
    settings: Training,
    parameter_groups: Sequence[ParameterGroup] | None = None,
) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with Nesterov momentum over the parameters that need gradients.

    Args:
        parameter_groups: which parameters, with learning rates of their own; default: all that
            need gradients, in one group.

    Raises:
        ExperimentError: there is nothing to train.
    """
    trained: Sequence[Any] = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise ExperimentError(
            "Nothing of this network is trained; set model.train to head, last_stage or all."
        )
    if parameter_groups is not None:
        trained = list(parameter_groups)
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            trained,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=decay,
        )
    adam = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return adam(trained, lr=settings.learning_rate, weight_decay=decay, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: Training, *, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of every optimizer step: linear warm-up, then constant or cosine to 0.

    The same factor multiplies the learning rate of every parameter group.
    """
    warmup_steps = round(settings.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if settings.schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The largest of the parameter groups' learning rates: the head's."""
    return max(float(group["lr"]) for group in optimizer.param_groups)
