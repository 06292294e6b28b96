"""What a training's state must agree with before it goes on, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visiontuner.errors import CheckpointError
from visiontuner.experiment import Training

_ANEW = "; go on with what it was made with, or begin anew without it."
# These leave a training's numbers as they are, or answer to this machine.
_MAY_DIFFER = {"workers", "micro_batch_size", "log_every_steps", "record_every_steps"}


def identity_of(settings: Training, *, seed: int, num_classes: int) -> dict[str, Any]:
    """What determines a training besides its network and its pictures."""
    kept = settings.model_dump(mode="json", exclude=_MAY_DIFFER)
    return {"num_classes": num_classes, "seed": seed} | {
        f"training.{name}": value for name, value in kept.items()
    }


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Two descriptions, name by name.

    Raises:
        CheckpointError: they differ; the message has the first name and both values.
    """
    for name in [*current, *(name for name in saved if name not in current)]:
        before, now = saved.get(name), current.get(name)
        if before != now:
            raise CheckpointError(
                f"The checkpoint was made with {name} {_short(before)}, this training has "
                f"{_short(now)}{_ANEW}"
            )


def require_fitting(saved: Mapping[str, Tensor], network: nn.Module) -> None:
    """The weights of a checkpoint against those of a network, by name and shape.

    Raises:
        CheckpointError: they are of another network.
    """
    current = network.state_dict()
    missing = [name for name in current if name not in saved]
    unknown = [name for name in saved if name not in current]
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}"
        raise CheckpointError(f"The checkpoint is of another network: it {which}{_ANEW}")
    for name, tensor in current.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"The checkpoint is of another network: {name} is {_sizes(saved[name])} there and "
                f"{_sizes(tensor)} here{_ANEW}"
            )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer's state back, laid out in memory as its parameters are.

    torch keeps the layout of what it is given, and its fused optimizers read the moments of
    channels-last weights in the weights' own order.

    Raises:
        CheckpointError: the parameter groups are others.
    """
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"The checkpoint is of a training of other parts of the network ({error}){_ANEW}"
        ) from None
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The global generators that a training on `device` draws from (dropout, mixing)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sizes(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
