"""Records one training: its tensors, its steps' time and the machine, into one bounded file."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from visiontuner.diagnostics.history import (
    RECORDING_FILE,
    STEP_PARTS,
    TRACE_FILE,
    Recording,
    StepRecord,
)
from visiontuner.diagnostics.system import SystemSampler
from visiontuner.diagnostics.tensors import TensorRecorder, Thinned
from visiontuner.training.callbacks import Part, TrainingCallback

# Where the time of every training step goes, without waiting for the device.
#
# On a CPU a stamp is the clock's. On a GPU it is an event in its stream: between two of them lies
# what the GPU took for the work, or for waiting for it. Events are read when the GPU has passed
# them.


MOST_STEPS = 4096
_RECORDING_PART = "recording"


class Clock(Protocol):
    """Gives stamps; what lies between two can be read once the later one has passed."""

    def stamp(self) -> Any: ...
    def passed(self, stamp: Any) -> bool: ...
    def seconds(self, earlier: Any, later: Any) -> float: ...


class HostClock:
    """This process's own time."""

    def stamp(self) -> float:
        return time.perf_counter()

    def passed(self, stamp: float) -> bool:
        return True

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier


class CudaClock:
    """The GPU's time: events in the current stream."""

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def passed(self, stamp: torch.cuda.Event) -> bool:
        return bool(stamp.query())  # type: ignore[no-untyped-call]

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        return float(earlier.elapsed_time(later)) / 1000


class StepTimes:
    """Seconds by part of the training's steps, bounded in number.

    Args:
        began: when the training did, of `time.perf_counter`.
        clock: default: the device's.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        began: float,
        workers: int = 0,
        clock: Clock | None = None,
        most_steps: int = MOST_STEPS,
    ) -> None:
        self.kept: Thinned[tuple[np.ndarray[Any, Any], int]] = Thinned(1, most_steps)
        self.startup_seconds: float | None = None
        self.other_seconds = {"evaluation": 0.0, "between_epochs": 0.0}
        """Of whole epochs: what no step's time holds."""
        self._device = device
        self._workers = workers
        self._began = began
        self._clock = clock or (CudaClock() if device.type == "cuda" else HostClock())
        self._laps: list[tuple[str, Any]] = []
        self._waiting: deque[tuple[int, int, list[tuple[str, Any]]]] = deque()
        self._step: tuple[int, int] | None = None
        self._left: float | None = None  # when the last epoch's training or evaluation ended

    def epoch_begins(self) -> None:
        self._count("between_epochs")
        self._laps = [("", self._clock.stamp())]

    def spent_on(self, part: Part) -> None:
        self._laps.append((part, self._clock.stamp()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is no part of the step: hooks in its forward pass, and what follows
        right after another part."""
        self.spent_on("forward")
        try:
            yield
        finally:
            self._laps.append((_RECORDING_PART, self._clock.stamp()))

    def step_begins(self, step: int, images: int) -> None:
        if self.startup_seconds is None:
            self.startup_seconds = time.perf_counter() - self._began
        self._step = step, images

    def step_ends(self) -> None:
        if self._step is not None and self.kept.wants(self._step[0]):
            self._waiting.append((*self._step, self._laps))
        self._laps = self._laps[-1:]
        self._step, self._left = None, time.perf_counter()
        self._read_passed()

    def epoch_ends(self) -> None:
        self._count("evaluation")

    def record(self) -> StepRecord:
        """The times that can be read by now: after an epoch's evaluation all of its steps'."""
        self._read_passed()
        rows = self.kept.rows
        seconds = [row for row, _ in rows]
        return StepRecord(
            steps=np.array(self.kept.numbers, np.int64),
            seconds=np.array(seconds, np.float32).reshape(len(rows), len(STEP_PARTS)),
            images=np.array([images for _, images in rows], np.int64),
            startup_seconds=self.startup_seconds or 0.0,
            device=torch.cuda.get_device_name(self._device)
            if self._device.type == "cuda"
            else self._device.type,
            workers=self._workers,
        )

    def go_on(self, record: StepRecord, *, until: int, every: int) -> None:
        """Take over an earlier record, up to a step."""
        self.startup_seconds = record.startup_seconds
        rows = zip(record.steps, record.seconds, record.images, strict=True)
        kept = [(int(s), (row, int(images))) for s, row, images in rows if s <= until]
        self.kept.refill(kept, every)

    def _read_passed(self) -> None:
        while self._waiting and self._clock.passed(self._waiting[0][2][-1][1]):
            self._read(*self._waiting.popleft())

    def _read(self, step: int, images: int, laps: list[tuple[str, Any]]) -> None:
        seconds = np.zeros(len(STEP_PARTS), np.float32)
        for (_, earlier), (part, later) in pairwise(laps):
            if part != _RECORDING_PART:
                seconds[STEP_PARTS.index(part)] += self._clock.seconds(earlier, later)
        self.kept.add(step, (seconds, images))

    def _count(self, what: str) -> None:
        now = time.perf_counter()
        if self._left is not None:
            self.other_seconds[what] += now - self._left
        self._left = now


# A profiler's trace of a few steps, for Perfetto (ui.perfetto.dev) or chrome://tracing.


_log = logging.getLogger(__name__)


class Trace(TrainingCallback):
    """Traces whole steps into `trace.json.gz` in a trial's folder; close it at the end.

    Args:
        first, last: steps, from 1 through all epochs.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.path = folder / TRACE_FILE
        self._first, self._last = first, last
        self._profiler: profile | None = None
        self._step = ExitStack()
        self._last_seen = 0

    def step_begins(self, step: int, inputs: Tensor) -> None:
        if step == self._first:
            self._begin(inputs.device)
        if self._profiler is not None:
            self._step.enter_context(record_function(f"step {step}"))
            self._last_seen = step

    def step_ends(self) -> None:
        if self._profiler is not None:
            self._step.close()
            if self._last_seen >= self._last:
                self.close()

    def close(self) -> None:
        """End the trace here, if it has begun; a training that fails in it leaves what there is."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._step.close()
        try:
            profiler.stop()
            part = self.path.with_name(f"{self.path.name}.part.gz")
            profiler.export_chrome_trace(str(part))
            part.replace(self.path)
        except Exception as problem:  # of the profiler or the disk: the training goes on
            _log.warning("The trace could not be written: %s", problem)

    def _begin(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Else the library below reports its own state on the terminal, as if it were a failure.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        try:
            self._profiler = profile(activities=activities)
            self._profiler.start()
        except Exception as problem:
            self._profiler = None
            _log.warning("No trace: %s", problem)


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


class Recorder(TrainingCallback):
    """Records a training in `recording.npz` of its trial's folder; close it at the end.

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
            decimation = int(about["tensors_every_steps"]) // int(about["every_steps"])
            every = self._tensors.kept.every * decimation
            self._tensors.go_on(earlier.tensors, until=steps, every=every)
        if earlier.steps is not None:
            every = int(about["times_every_steps"])
            self._steps.go_on(earlier.steps, until=steps, every=every)
        if earlier.system is not None:
            self._system.go_on(earlier.system)
