"""Tensors -> the few numbers that are recorded of them, on the device and cheap.

Reading a large map once is cheap, comparing it with anything is not (it makes another one). So
extremes are of all values, and means and shares of an even sample of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SAMPLE = 2**16
"""Values: a share is then right within half a percent."""

UNCHANGED_RELATIVE, UNCHANGED_ABSOLUTE = 1e-5, 1e-8

ACTIVATION = ("mean", "std", "min", "max", "zeros", "nonfinite", "saturated")
WEIGHT = ("std", "absmax", "zeros")
GRADIENT = ("mean", "absmax", "zeros", "nonfinite")
CHANGE = ("weight_unchanged", "update_norm", "update_mean", "update_absmax", "update_ratio")

# Flat: where the slope is under a hundredth of the largest.
_FLAT: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Sigmoid": lambda out: out * (1 - out) < 0.0025,
    "Tanh": lambda out: 1 - out * out < 0.01,
    "Hardsigmoid": lambda out: (out <= 0) | (out >= 1),
    "Hardtanh": lambda out: out.abs() >= 1,
    "ReLU6": lambda out: out >= 6,  # its zeros are counted as such
}
_SPELLINGS = {"HardSigmoid": "Hardsigmoid", "HardTanh": "Hardtanh"}
RECTIFIERS = ("ReLU", "ReLU6")
"""Activations whose units can die: no gradient passes where the output is 0."""


def activation(output: Tensor, kind: str, highest: Tensor | None = None) -> Tensor:
    """`ACTIVATION` of a layer's output, of any shape: float32, (7,); NaN where there is none.

    Args:
        highest: of a rectifier's output by unit; its lowest value is then the sample's.
    """
    values = evenly(output, keep=1 if output.dim() == 4 else -1)
    if highest is None:
        low, high = torch.aminmax(in_memory_order(output))
    else:
        low, high = values.amin(), highest.amax()
    mean, std = mean_and_std(values)
    flat = _FLAT.get(_SPELLINGS.get(kind, kind))
    saturated = torch.full_like(mean, math.nan) if flat is None else _share(flat(values))
    numbers = (mean, std, low, high, _share(values == 0), _share(~values.isfinite()), saturated)
    return torch.stack([number.float() for number in numbers])


def highest_by_unit(output: Tensor, unit_dimension: int) -> Tensor:
    """The largest value of each unit, over the batch and all places: (units,)."""
    others = [d for d in range(output.dim()) if d != unit_dimension]
    return output.amax(others) if others else output


def weight(tensor: Tensor) -> Tensor:
    """`WEIGHT` of a weight: float32, (3,)."""
    values = evenly(tensor)
    _, std = mean_and_std(values)
    return torch.stack([std, _absmax(tensor), _share(values == 0)])


def gradient(tensor: Tensor) -> Tensor:
    """`GRADIENT` of a gradient: float32, (4,)."""
    values = evenly(tensor)
    return torch.stack(
        [values.abs().mean(), _absmax(tensor), _share(values == 0), _share(~values.isfinite())]
    )


def change(before: Tensor, after: Tensor, size: int) -> Tensor:
    """`CHANGE`: what a step did to a weight of so many values, from samples of it: float32, (5,).

    The norm is the sample's, times the root of what share the sample is.
    """
    same = torch.isclose(after, before, rtol=UNCHANGED_RELATIVE, atol=UNCHANGED_ABSOLUTE)
    update = after - before
    norm = torch.linalg.vector_norm(update)
    absolute = update.abs()
    ratio = norm / torch.linalg.vector_norm(before)
    whole = norm * math.sqrt(size / before.numel())
    return torch.stack([_share(same), whole, absolute.mean(), absolute.amax(), ratio])


def mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of flat values, each (); ten times faster on a CPU than torch's `std_mean`."""
    mean = values.mean()
    return mean, torch.linalg.vector_norm(values - mean) / math.sqrt(values.numel())


def evenly(tensor: Tensor, *, keep: int | None = None) -> Tensor:
    """At most about `SAMPLE` of a tensor's values, from all over it: float32, flat; a copy.

    Args:
        keep: a dimension of which everything is taken.
    """
    steps, counts = [1] * tensor.dim(), list(tensor.shape)
    kept = keep % tensor.dim() if keep is not None and tensor.dim() else None
    while math.prod(counts) > SAMPLE:
        others = [d for d in range(len(counts)) if d != kept and counts[d] > 1]
        widest = max(others or range(len(counts)), key=lambda d: counts[d])
        steps[widest] += 1
        counts[widest] = math.ceil(tensor.shape[widest] / steps[widest])
    # From the middle of the first step: the edge of a picture is no place like others.
    places = tuple(slice((step - 1) // 2, None, step) for step in steps)
    return tensor[places].reshape(-1).to(torch.float32, copy=True)


def in_memory_order(tensor: Tensor) -> Tensor:
    """The same values in dimensions that follow the memory: reductions are then fast."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor


def _absmax(tensor: Tensor) -> Tensor:
    low, high = torch.aminmax(in_memory_order(tensor))
    return torch.maximum(low.abs(), high.abs()).float()


def _share(which: Tensor) -> Tensor:
    return which.float().mean()
