"""Records what happens in a network: weights, gradients, updates and activations of its layers.

Only in a step that is recorded there are hooks on the network. Everything is computed on the
network's device and brought over at once, at the step's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visiontuner.training.recording import statistics
from visiontuner.training.recording.layers import Layer, find_layers
from visiontuner.training.recording.records import Floats, TensorRecord
from visiontuner.training.recording.seen import NAMES, Row, Seen
from visiontuner.training.recording.thinned import Thinned

MOST_STEPS = 200
"""Recorded steps at a time: 22 statistics of ResNet-50's 124 layers are then 2.2 MB."""
MOST_INPUTS = 8
_INPUT_BYTES = 2_000_000
_NAMED = 3
_MOST_PROBLEMS = 5

_WEIGHT = tuple(f"weight_{name}" for name in statistics.WEIGHT)
_GRADIENT = tuple(f"gradient_{name}" for name in statistics.GRADIENT)

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
        self.kept: Thinned[Row] = Thinned(every, most_steps)
        self._network = network
        self._aside = aside
        self._layers: list[Layer] | None = None
        self._shared: list[str] = []
        self._order: list[int] = []  # of layers, as they first ran
        self._seen: Seen | None = None
        self._failed: dict[int, str] = {}
        self._problems: list[str] = []
        self._inputs: NDArray[np.float16] = np.zeros((0, 0, 0, 0), np.float16)

    def step_begins(self, step: int, inputs: Tensor) -> None:
        if self.kept.wants(step):
            self._seen = Seen(step, inputs.detach())
            with self._recording("it is not recorded"):
                self._attach(self._seen)

    def passes_begin(self) -> None:
        if self._seen is not None:
            self._seen.forget_outputs()

    def piece_has_passed(self) -> None:
        if self._seen is not None:
            self._seen.piece_has_passed()

    def gradients_ready(self) -> None:
        if self._seen is not None:
            with self._recording("it is not recorded"):
                self._see_weights(self._seen)

    def weights_moved(self) -> None:
        if self._seen is not None:
            with self._recording("it is not recorded"):
                self._see_updates(self._seen)

    def step_ends(self) -> None:
        if self._seen is not None:
            with self._recording("it is not recorded"):
                self._seen.detach()
                self._keep(self._seen)
            self._seen = None

    def abandon(self) -> None:
        """Take the hooks of a step that will not end off the network."""
        if self._seen is not None:
            self._seen.detach()
            self._seen = None

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
                Row(
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

    def _attach(self, seen: Seen) -> None:
        for number, layer in enumerate(self._known):
            if number in self._failed:
                continue
            try:
                hook = self._hook(seen, number, layer.kind)
                seen.handles.append(layer.module.register_forward_hook(hook))
            except Exception as problem:  # a compiled module takes no hooks
                self._failed[number] = _one_line(problem)
        if not self._inputs.size and seen.inputs.dim() == 4:
            self._inputs = _some(seen.inputs)

    def _hook(self, seen: Seen, number: int, kind: str) -> Callable[..., None]:
        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            try:
                with self._aside(), torch.no_grad():
                    seen.output(number, kind, output)
            except Exception as problem:  # whatever it is, the training goes on
                self._failed[number] = _one_line(problem)

        return see

    def _see_weights(self, seen: Seen) -> None:
        """Of every layer's weight and gradient, before the optimizer's step."""
        weights = self._weights
        for (number, weight), norm in zip(weights, _norms([w for _, w in weights]), strict=True):
            seen.add(number, ("weight_norm",), norm)
            seen.add(number, _WEIGHT, statistics.weight(weight))
        learning = [(n, w, w.grad) for n, w in weights if w.grad is not None]
        norms = _norms([gradient for *_, gradient in learning])
        for (number, weight, gradient), norm in zip(learning, norms, strict=True):
            seen.add(number, ("gradient_norm",), norm)
            seen.add(number, _GRADIENT, statistics.gradient(gradient))
            seen.samples[number] = statistics.evenly(weight)

    def _see_updates(self, seen: Seen) -> None:
        for number, weight in self._weights:
            if number in seen.samples:
                after = statistics.evenly(weight)
                change = statistics.change(seen.samples[number], after, weight.numel())
                seen.add(number, statistics.CHANGE, change)

    def _keep(self, seen: Seen) -> None:
        # As they first ran, then weights whose layers never did.
        weighted = [number for number, _ in self._weights]
        self._order = list(dict.fromkeys([*self._order, *seen.layers_in_order(), *weighted]))
        self.kept.add(seen.step, seen.row(self._order))

    @property
    def _weights(self) -> list[tuple[int, nn.Parameter]]:
        found = ((number, layer.weight) for number, layer in enumerate(self._known))
        return [(number, weight) for number, weight in found if weight is not None]

    @contextmanager
    def _recording(self, otherwise: str) -> Iterator[None]:
        """Whatever goes wrong in it, the training goes on and the notes say so."""
        step = self._seen
        try:
            with self._aside(), torch.no_grad():
                yield
        except Exception as problem:
            if step is not None:
                step.detach()
                if len(self._problems) < _MOST_PROBLEMS:
                    self._problems.append(f"step {step.step}: {otherwise}, {_one_line(problem)}")
            self._seen = None

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
    """The first pictures of a batch, float16 (N, C, H, W), of 2 MB at most where one fits."""
    fitting = _INPUT_BYTES // (2 * inputs[0].numel())
    some = inputs[: min(MOST_INPUTS, max(1, fitting))]
    pictures: NDArray[np.float16] = some.to("cpu", torch.float16).contiguous().numpy()
    return pictures


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors)) if tensors else []


def _stacked(rows: list[Floats]) -> Floats:
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)


def _one_line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
