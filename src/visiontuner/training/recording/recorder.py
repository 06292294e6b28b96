"""Records one training: its tensors, its steps' time and the machine, into one bounded file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from visiontuner.training.recording.records import RECORDING_FILE, Recording
from visiontuner.training.recording.steps import StepTimes
from visiontuner.training.recording.system import SystemSampler
from visiontuner.training.recording.tensors import TensorRecorder
from visiontuner.training.watch import Part, Watch

_LONGEST_WRITING = 0.01  # share of the time
_SHORTEST_PAUSE = 2.0  # seconds between two writings

Method = TypeVar("Method", bound=Callable[..., None])


def _harmless(method: Method) -> Method:
    """The first time that recording itself fails it ends, and the notes say why."""

    @wraps(method)
    def careful(self: Recorder, *args: Any) -> None:
        if self.problem is None:
            try:
                method(self, *args)
            except Exception as problem:
                self.problem = f"recording ended, {type(problem).__name__}: {problem}"
                self._tensors.abandon()

    return cast(Method, careful)


class Recorder(Watch):
    """Watches a training and keeps `recording.npz` in its trial's folder; close it at the end.

    A training that goes on from a checkpoint goes on with the file: what was recorded after the
    checkpoint is dropped. One that begins anew begins a new one. Nothing that goes wrong here ends
    a training.

    Args:
        every_steps: of the optimizer, between two in which tensors are recorded.
        began: when the training did, of `time.perf_counter`: loading the network included.
        workers: processes that prepare its batches.
        about: for `Recording.about`.
    """

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        *,
        every_steps: int,
        began: float,
        workers: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        device = next(network.parameters()).device
        self.path = folder / RECORDING_FILE
        self.problem: str | None = None
        self._about = {"every_steps": every_steps, **(about or {})}
        self._steps = StepTimes(device, began=began, workers=workers)
        self._tensors = TensorRecorder(network, every=every_steps, aside=self._steps.aside)
        self._system = SystemSampler(folder, device)
        self._begun = False
        self._written, self._writing_took = -math.inf, 0.0

    # What a training tells

    @_harmless
    def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
        self._about["steps_per_epoch"] = steps_per_epoch
        if not self._begun:
            self._begun = True
            if epoch > 1:
                self._go_on((epoch - 1) * steps_per_epoch)
            else:
                self.path.unlink(missing_ok=True)
        self._steps.epoch_begins()

    @_harmless
    def spent_on(self, part: Part) -> None:
        self._steps.spent_on(part)
        if part == "backward":
            self._tensors.piece_has_passed()

    @_harmless
    def step_begins(self, step: int, inputs: Tensor) -> None:
        self._steps.step_begins(step, len(inputs))
        self._tensors.step_begins(step, inputs)

    @_harmless
    def passes_begin(self) -> None:
        self._tensors.passes_begin()

    @_harmless
    def gradients_ready(self) -> None:
        self._tensors.gradients_ready()

    @_harmless
    def weights_moved(self) -> None:
        self._tensors.weights_moved()

    @_harmless
    def step_ends(self) -> None:
        self._tensors.step_ends()
        self._steps.step_ends()

    @_harmless
    def epoch_ends(self) -> None:
        self._steps.epoch_ends()

    # What is made of it

    def recording(self) -> Recording:
        """Everything so far."""
        other = {f"{name}_seconds": spent for name, spent in self._steps.other_seconds.items()}
        intervals = {
            "tensors_every_steps": self._tensors.kept.every,
            "times_every_steps": self._steps.kept.every,
        }
        problems = [problem for problem in (self.problem, self._system.problem) if problem]
        problem = {"problem": "; ".join(problems)} if problems else {}
        return Recording(
            tensors=self._tensors.record(),
            steps=self._steps.record(),
            system=self._system.record(),
            about={**self._about, **intervals, **other, **problem},
        )

    def save(self, *, now: bool = False) -> None:
        """Write the file if it is time to, or `now`; a disk that is full costs the file alone."""
        began = time.monotonic()
        pause = max(_SHORTEST_PAUSE, self._writing_took / _LONGEST_WRITING)
        if now or began - self._written >= pause:
            with suppress(OSError):
                self.recording().save(self.path)
            self._written = time.monotonic()
            self._writing_took = self._written - began

    def close(self) -> None:
        """The last sample, and the file as it will stay."""
        self._system.close()
        if self._begun:
            self.save(now=True)

    def _go_on(self, steps: int) -> None:
        """With what an earlier process recorded, up to a step."""
        try:
            earlier = Recording.load(self.path)
        except (OSError, ValueError):
            return  # none, or damaged: what follows is recorded anew
        about = earlier.about
        if earlier.tensors is not None:
            # As many times less often than asked for as before, whatever is asked for now.
            thinned = int(about["tensors_every_steps"]) // int(about["every_steps"])
            every = self._tensors.kept.every * thinned
            self._tensors.go_on(earlier.tensors, until=steps, every=every)
        if earlier.steps is not None:
            every = int(about["times_every_steps"])
            self._steps.go_on(earlier.steps, until=steps, every=every)
        if earlier.system is not None:
            self._system.go_on(earlier.system)
