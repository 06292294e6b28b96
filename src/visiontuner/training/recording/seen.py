"""What is seen of a network in one step: gathered on its device, brought over at once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from visiontuner.training.recording import statistics
from visiontuner.training.recording.layers import unit_dimension
from visiontuner.training.recording.records import TENSOR_STATISTICS, Floats

NAMES = tuple(TENSOR_STATISTICS)
_PLACE = {name: place for place, name in enumerate(NAMES)}
_ACTIVATION = [_PLACE[f"activation_{name}"] for name in statistics.ACTIVATION]


@dataclass(frozen=True)
class Row:
    """One recorded step.

    Attributes:
        values: float32, (statistics, layers), NaN for what there is none of.
        input_mean: float32, (C,); `input_std` likewise.
    """

    values: Floats
    input_mean: Floats
    input_std: Floats
    input_min: float
    input_max: float


@dataclass
class Seen:
    """One step while it is recorded; layers are numbers here.

    Attributes:
        samples: of the weights before the step, by layer.
        handles: of the hooks that report to this.
    """

    step: int
    inputs: Tensor
    handles: list[RemovableHandle] = field(default_factory=list)
    samples: dict[int, Tensor] = field(default_factory=dict)
    _outputs: list[tuple[int, int, Tensor]] = field(default_factory=list)
    _units: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _numbers: list[tuple[int, tuple[str, ...], Tensor]] = field(default_factory=list)

    def output(self, layer: int, kind: str, output: Any) -> None:
        """Of one call of a layer, for all of the batch or a piece of it.

        Raises:
            TypeError: there is no tensor in it.
        """
        tensor = _tensor_of(output)
        if not tensor.is_floating_point() or not tensor.numel():
            return
        highest = None
        if kind in statistics.RECTIFIERS:
            highest = statistics.highest_by_unit(tensor, unit_dimension(tensor))
            key = layer, self._calls[layer]
            earlier = self._units.get(key)
            self._units[key] = highest if earlier is None else torch.maximum(earlier, highest)
        self._outputs.append((layer, tensor.numel(), statistics.activation(tensor, kind, highest)))
        self._calls[layer] += 1

    def piece_has_passed(self) -> None:
        """Whatever layer is called next, it is called for other pictures."""
        self._calls.clear()

    def forget_outputs(self) -> None:
        """The step begins anew."""
        self._outputs.clear()
        self._units.clear()
        self._calls.clear()

    def add(self, layer: int, names: tuple[str, ...], numbers: Tensor) -> None:
        """Some statistics of a layer, by their names in `TENSOR_STATISTICS`."""
        self._numbers.append((layer, names, numbers.reshape(-1).float()))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def layers_in_order(self) -> list[int]:
        """Those that ran, as they first did."""
        return list(dict.fromkeys(layer for layer, *_ in self._outputs))

    def row(self, order: list[int]) -> Row:
        """Everything as numbers: one transfer, which waits for the device.

        Args:
            order: which layer is in which column; all that were seen.
        """
        dead = [(highest <= 0).float().mean().reshape(1) for highest in self._units.values()]
        tensors = [
            *_of_inputs(self.inputs),
            *(numbers for *_, numbers in self._outputs),
            *dead,
            *(numbers for *_, numbers in self._numbers),
        ]
        edges = np.cumsum([len(tensor) for tensor in tensors])[:-1]
        parts = iter(np.split(torch.cat(tensors).cpu().numpy(), edges))
        mean, std, (low, high) = next(parts), next(parts), next(parts)
        outputs = [(layer, size, next(parts)) for layer, size, _ in self._outputs]
        shares = [(layer, next(parts)) for layer, _ in self._units]
        numbers = [(layer, names, next(parts)) for layer, names, _ in self._numbers]
        column = {layer: place for place, layer in enumerate(order)}
        values = np.full((len(NAMES), len(order)), np.nan, np.float32)
        for layer in dict.fromkeys(layer for layer, *_ in outputs):
            together = _joined([(size, found) for n, size, found in outputs if n == layer])
            values[_ACTIVATION, column[layer]] = together
        for layer in dict.fromkeys(layer for layer, _ in shares):
            share = np.mean([found for n, found in shares if n == layer])
            values[_PLACE["activation_dead"], column[layer]] = share
        for layer, names, found in numbers:
            values[[_PLACE[name] for name in names], column[layer]] = found
        return Row(values, mean, std, float(low), float(high))


def _tensor_of(output: Any) -> Tensor:
    """The first tensor in what a layer gave."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple) and output:
        return _tensor_of(output[0])
    raise TypeError(f"{type(output).__name__} instead of a tensor")


def _of_inputs(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation by channel, (C,), and both extremes, (2,); features are one channel."""
    with torch.no_grad():
        channels = [inputs[:, c] for c in range(inputs.shape[1])] if inputs.dim() == 4 else [inputs]
        mean, std = zip(
            *(statistics.mean_and_std(statistics.evenly(one)) for one in channels), strict=True
        )
        extremes = torch.stack(torch.aminmax(statistics.in_memory_order(inputs))).float()
        return torch.stack(mean), torch.stack(std), extremes


def _joined(calls: list[tuple[int, Floats]]) -> Floats:
    """`ACTIVATION` of a layer over its calls, each with its number of values: float32, (7,)."""
    sizes = np.array([size for size, _ in calls], np.float64)
    mean, std, low, high, zeros, nonfinite, saturated = np.stack([n for _, n in calls], axis=1)
    if not np.isfinite([low, high]).all():
        # Too few for the sample to hold one of them.
        nonfinite = np.maximum(nonfinite, ~np.isfinite(low + high) / sizes)
    if len(calls) == 1:
        total_mean, total_std = mean[0], std[0]
    else:
        total_mean = _weighted(mean, sizes)
        total_std = np.sqrt(max(0.0, _weighted(std**2 + mean**2, sizes) - total_mean**2))
    return np.array(
        [
            total_mean,
            total_std,
            low.min(),
            high.max(),
            _weighted(zeros, sizes),
            _weighted(nonfinite, sizes),
            _weighted(saturated, sizes),
        ],
        np.float32,
    )


def _weighted(values: Floats, sizes: Any) -> float:
    return float((values * sizes).sum() / sizes.sum())
