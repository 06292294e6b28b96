"""Records what happens in a network: weights, gradients, updates and activations of its layers.

Only in a step that is recorded there are hooks on the network. Everything is computed on the
network's device and brought over at once, at the step's end.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visiontuner.diagnostics.history import TENSOR_STATISTICS, Floats, TensorRecord
from visiontuner.workarounds.torch import tensor_norms

# Rows by number, never more than so many: a recording of any training is bounded.


Row = TypeVar("Row")


class Thinned(Generic[Row]):
    """The first row and every n-th; when that is full, every second goes and n doubles.

    Args:
        every: n to begin with.
        most: rows at a time.
    """

    def __init__(self, every: int, most: int) -> None:
        self.every = every
        self._most = most
        self._rows: dict[int, Row] = {}

    def wants(self, number: int) -> bool:
        """Whether the row of a number, from 1, would be kept."""
        return number == 1 or number % self.every == 0

    def add(self, number: int, row: Row) -> None:
        """Take in a row that is wanted; numbers only grow."""
        while len(self._rows) >= self._most:
            self.every *= 2
            self._rows = {n: kept for n, kept in self._rows.items() if self.wants(n)}
        if self.wants(number):
            self._rows[number] = row

    def refill(self, rows: Iterable[tuple[int, Row]], every: int) -> None:
        """Go on with the rows of an earlier recording, and every so many from now on."""
        self.every = every
        self._rows = dict(rows)

    @property
    def numbers(self) -> list[int]:
        return list(self._rows)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())


# Which parts of a network are recorded: layers with weights, and activation functions.


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One module that is recorded.

    Attributes:
        name: of the module within the network; of a shared one the first.
        kind: its class.
        weight: what of its own parameters is recorded; None of an activation function, and where
            an earlier layer has the same one.
    """

    name: str
    kind: str
    module: nn.Module
    weight: nn.Parameter | None


def find_layers(network: nn.Module) -> tuple[list[Layer], list[str]]:
    """The layers of a network, each once, and a line on each weight that two of them share."""
    layers, notes = [], []
    owners: dict[int, str] = {}
    for name, module in network.named_modules():
        weight, kind = _own_weight(module), type(module).__name__
        if weight is None and not is_activation(module):
            continue
        if weight is not None:
            owner = owners.setdefault(id(weight), name)
            if owner != name:
                notes.append(f"{name} ({kind}): shares its weight with {owner}, recorded there")
                weight = None
        layers.append(Layer(name=name, kind=kind, module=module, weight=weight))
    return layers, notes


def is_activation(module: nn.Module) -> bool:
    """torch's activation functions, and those of networks that bring their own (timm's)."""
    home = type(module).__module__.rsplit(".", 1)[-1]
    return home.startswith("activation") and not any(module.children())


def unit_dimension(output: Tensor) -> int:
    """Where a layer's units are: channels of maps (B, C, H, W), else the last dimension."""
    return 1 if output.dim() == 4 else output.dim() - 1


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """Its `weight`; of a layer with another name for it the largest matrix.

    What a block has besides its layers, a factor for its output or a table of positions, is no
    weight: a factor that begins with 1e-6 changes a hundredfold in a step when all is well.
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.numel() > 0}
    for name in ("weight", "in_proj_weight"):
        if name in own:
            return own[name]
    if any(module.children()):
        return None
    matrices = [parameter for parameter in own.values() if _is_matrix(parameter)]
    return max(matrices, key=lambda parameter: parameter.numel(), default=None)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) > 1


# Tensors -> the few numbers that are recorded of them, on the device and cheap.
#
# Reading a large map once is cheap, comparing it with anything is not (it makes another one). So
# extremes are of all values, and means and shares of an even sample of them.


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


def activation_statistics(output: Tensor, kind: str, highest: Tensor | None = None) -> Tensor:
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


def weight_statistics(tensor: Tensor) -> Tensor:
    """`WEIGHT` of a weight: float32, (3,)."""
    values = evenly(tensor)
    _, std = mean_and_std(values)
    return torch.stack([std, _absmax(tensor), _share(values == 0)])


def gradient_statistics(tensor: Tensor) -> Tensor:
    """`GRADIENT` of a gradient: float32, (4,)."""
    values = evenly(tensor)
    return torch.stack(
        [values.abs().mean(), _absmax(tensor), _share(values == 0), _share(~values.isfinite())]
    )


def update_statistics(before: Tensor, after: Tensor, size: int) -> Tensor:
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
    # From the middle of the first step: the edge of an image is no place like others.
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


# The statistics of a network in one step: collected on its device, brought over at once.


NAMES = tuple(TENSOR_STATISTICS)
_PLACE = {name: place for place, name in enumerate(NAMES)}
_ACTIVATION = [_PLACE[f"activation_{name}"] for name in ACTIVATION]


@dataclass(frozen=True)
class StatisticsRow:
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
class StepStatistics:
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
        if kind in RECTIFIERS:
            highest = highest_by_unit(tensor, unit_dimension(tensor))
            key = layer, self._calls[layer]
            earlier = self._units.get(key)
            self._units[key] = highest if earlier is None else torch.maximum(earlier, highest)
        self._outputs.append((layer, tensor.numel(), activation_statistics(tensor, kind, highest)))
        self._calls[layer] += 1

    def piece_has_passed(self) -> None:
        """Whatever layer is called next, it is called for other images."""
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

    def row(self, order: list[int]) -> StatisticsRow:
        """Everything as numbers: one transfer, which waits for the device.

        Args:
            order: which layer is in which column.
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
        return StatisticsRow(values, mean, std, float(low), float(high))


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
        mean, std = zip(*(mean_and_std(evenly(one)) for one in channels), strict=True)
        extremes = torch.stack(torch.aminmax(in_memory_order(inputs))).float()
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


MOST_STEPS = 200
"""Recorded steps at a time: 22 statistics of ResNet-50's 124 layers are then 2.2 MB."""
MOST_INPUTS = 8
_INPUT_BYTES = 2_000_000
_NAMED = 3
_MOST_PROBLEMS = 5

_WEIGHT = tuple(f"weight_{name}" for name in WEIGHT)
_GRADIENT = tuple(f"gradient_{name}" for name in GRADIENT)

Aside = Callable[[], AbstractContextManager[None]]


class TensorRecorder:
    """Statistics of a network's layers, every so many steps.

    A layer that cannot be recorded, or a step that cannot, is a line in the record's notes; the
    training goes on as if nothing were recorded.

    Args:
        every: steps between two that are recorded; the first step always is.
        aside: entered while something is recorded within a step, so that its time is not taken
            for the step's.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        every: int,
        aside: Aside = nullcontext,
        most_steps: int = MOST_STEPS,
    ) -> None:
        self.kept: Thinned[StatisticsRow] = Thinned(every, most_steps)
        self._network = network
        self._aside = aside
        self._layers: list[Layer] | None = None
        self._shared: list[str] = []
        self._order: list[int] = []  # of layers, as they first ran
        self._collected: StepStatistics | None = None
        self._failed: dict[int, str] = {}
        self._problems: list[str] = []
        self._inputs: NDArray[np.float16] = np.zeros((0, 0, 0, 0), np.float16)

    def step_begins(self, step: int, inputs: Tensor) -> None:
        if self.kept.wants(step):
            self._collected = StepStatistics(step, inputs.detach())
            with self._recording("it is not recorded"):
                self._attach(self._collected)

    def passes_begin(self) -> None:
        if self._collected is not None:
            self._collected.forget_outputs()

    def piece_has_passed(self) -> None:
        if self._collected is not None:
            self._collected.piece_has_passed()

    def gradients_ready(self) -> None:
        if self._collected is not None:
            with self._recording("it is not recorded"):
                self._collect_weights(self._collected)

    def weights_moved(self) -> None:
        if self._collected is not None:
            with self._recording("it is not recorded"):
                self._collect_updates(self._collected)

    def step_ends(self) -> None:
        if self._collected is not None:
            with self._recording("it is not recorded"):
                self._collected.detach()
                self._keep(self._collected)
            self._collected = None

    def abandon(self) -> None:
        """Take the hooks of a step that will not end off the network."""
        if self._collected is not None:
            self._collected.detach()
            self._collected = None

    def record(self) -> TensorRecord:
        """What is recorded so far."""
        layers, rows = [self._known[number] for number in self._order], self.kept.rows
        values = np.full((len(rows), len(NAMES), len(layers)), np.nan, np.float32)
        for number, row in enumerate(rows):
            values[number, :, : row.values.shape[1]] = row.values
        return TensorRecord(
            steps=np.array(self.kept.numbers, np.int64),
            layers=tuple(layer.name for layer in layers),
            kinds=tuple(layer.kind for layer in layers),
            values={name: values[:, place] for place, name in enumerate(NAMES)},
            input_mean=_stacked([row.input_mean for row in rows]),
            input_std=_stacked([row.input_std for row in rows]),
            input_min=np.array([row.input_min for row in rows], np.float32),
            input_max=np.array([row.input_max for row in rows], np.float32),
            inputs=self._inputs,
            notes=(*self._shared, *self._not_seen(layers, values), *dict.fromkeys(self._problems)),
        )

    def go_on(self, record: TensorRecord, *, until: int, every: int) -> None:
        """Take over an earlier record of the same network, up to a step."""
        places = {layer.name: number for number, layer in enumerate(self._known)}
        if not all(name in places for name in record.layers):
            self._problems.append("what was recorded before is of other layers, and left out")
            return
        self._order = [places[name] for name in record.layers]
        self._inputs = record.inputs
        values = np.stack([record.of(name) for name in NAMES], axis=1)  # (S, statistics, L)
        rows = [
            (
                int(step),
                StatisticsRow(
                    values[n],
                    record.input_mean[n],
                    record.input_std[n],
                    float(record.input_min[n]),
                    float(record.input_max[n]),
                ),
            )
            for n, step in enumerate(record.steps)
            if step <= until
        ]
        self.kept.refill(rows, every)

    # A step

    @property
    def _known(self) -> list[Layer]:
        if self._layers is None:
            self._layers, self._shared = find_layers(self._network)
        return self._layers

    def _attach(self, collected: StepStatistics) -> None:
        for number, layer in enumerate(self._known):
            if number in self._failed:
                continue
            try:
                hook = self._hook(collected, number, layer.kind)
                collected.handles.append(layer.module.register_forward_hook(hook))
            except Exception as problem:  # a compiled module takes no hooks
                self._failed[number] = _one_line(problem)
        if not self._inputs.size and collected.inputs.dim() == 4:
            self._inputs = _some(collected.inputs)

    def _hook(self, collected: StepStatistics, number: int, kind: str) -> Callable[..., None]:
        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            try:
                with self._aside(), torch.no_grad():
                    collected.output(number, kind, output)
            except Exception as problem:  # whatever it is, the training goes on
                self._failed[number] = _one_line(problem)

        return see

    def _collect_weights(self, collected: StepStatistics) -> None:
        """Of every layer's weight and gradient, before the optimizer's step."""
        weights = self._weights
        for (number, weight), norm in zip(
            weights, tensor_norms([w for _, w in weights]), strict=True
        ):
            collected.add(number, ("weight_norm",), norm)
            collected.add(number, _WEIGHT, weight_statistics(weight))
        learning = [(n, w, w.grad) for n, w in weights if w.grad is not None]
        norms = tensor_norms([gradient for *_, gradient in learning])
        for (number, weight, gradient), norm in zip(learning, norms, strict=True):
            collected.add(number, ("gradient_norm",), norm)
            collected.add(number, _GRADIENT, gradient_statistics(gradient))
            collected.samples[number] = evenly(weight)

    def _collect_updates(self, collected: StepStatistics) -> None:
        for number, weight in self._weights:
            if number in collected.samples:
                after = evenly(weight)
                change = update_statistics(collected.samples[number], after, weight.numel())
                collected.add(number, CHANGE, change)

    def _keep(self, collected: StepStatistics) -> None:
        # As they first ran, then weights whose layers never did.
        weighted = [number for number, _ in self._weights]
        self._order = list(dict.fromkeys([*self._order, *collected.layers_in_order(), *weighted]))
        self.kept.add(collected.step, collected.row(self._order))

    @property
    def _weights(self) -> list[tuple[int, nn.Parameter]]:
        found = ((number, layer.weight) for number, layer in enumerate(self._known))
        return [(number, weight) for number, weight in found if weight is not None]

    @contextmanager
    def _recording(self, otherwise: str) -> Iterator[None]:
        """Whatever goes wrong in it, the training goes on and the notes say so."""
        step = self._collected
        try:
            with self._aside(), torch.no_grad():
                yield
        except Exception as problem:
            if step is not None:
                step.detach()
                if len(self._problems) < _MOST_PROBLEMS:
                    self._problems.append(f"step {step.step}: {otherwise}, {_one_line(problem)}")
            self._collected = None

    def _not_seen(self, layers: list[Layer], values: Floats) -> list[str]:
        """A line on each layer whose output could not be recorded, one on all that never ran."""
        told = [
            f"{self._known[number].name} ({self._known[number].kind}): its output is not recorded, "
            f"{why}"
            for number, why in self._failed.items()
        ]
        shares = values[:, NAMES.index("activation_nonfinite")]  # (S, L), a number where it ran
        ran = [bool(np.isfinite(column).any()) for column in shares.T]
        failed = {self._known[number].name for number in self._failed}
        never = [
            layer.name
            for layer, did in zip(layers, ran, strict=True)
            if not did and layer.name not in failed
        ]
        if never and len(values):
            more = f" and {len(never) - _NAMED} more" if len(never) > _NAMED else ""
            told.append(f"never ran: {', '.join(never[:_NAMED])}{more}")
        return told


def _some(inputs: Tensor) -> NDArray[np.float16]:
    """The first images of a batch, float16 (N, C, H, W), of 2 MB at most where one fits."""
    fitting = _INPUT_BYTES // (2 * inputs[0].numel())
    some = inputs[: min(MOST_INPUTS, max(1, fitting))]
    images: NDArray[np.float16] = some.to("cpu", torch.float16).contiguous().numpy()
    return images


def _stacked(rows: list[Floats]) -> Floats:
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)


def _one_line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
