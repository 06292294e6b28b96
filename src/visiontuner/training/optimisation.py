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

    Weight decay spares vectors, which are biases and the weights of norms: a group that holds some
    besides matrices becomes two.

    Args:
        parameter_groups: which parameters, with learning rates of their own; default: all that
            need gradients.

    Raises:
        ExperimentError: there is nothing to train.
    """
    trained: Sequence[Any] = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise ExperimentError(
            "Nothing of this network is trained; set model.train to head, last_stage or all."
        )
    decay = settings.weight_decay
    groups = parameter_groups or [{"params": trained}]
    trained = [part for group in groups for part in _sparing_vectors(group, decay)]
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


def _sparing_vectors(group: ParameterGroup, decay: float) -> list[ParameterGroup]:
    """The group, or its matrices and its vectors, if both are there and it decays."""
    matrices = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    if not group.get("weight_decay", decay) or not vectors:
        return [group]
    name = {"name": f"{group['name']}, no decay"} if "name" in group else {}
    spared = {**group, **name, "params": vectors, "weight_decay": 0.0}
    return [{**group, "params": matrices}, spared] if matrices else [spared]


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
