"""Where the time of every training step goes, without waiting for the device.

On a CPU a stamp is the clock's. On a GPU it is an event in its stream: between two of them lies
what the GPU took for the work, or for waiting for it. Events are read when the GPU has passed them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from visiontuner.training.recording.records import STEP_PARTS, StepRecord
from visiontuner.training.recording.thinned import Thinned
from visiontuner.training.watch import Part

MOST_STEPS = 4096
_NOT_ITS_OWN = "recording"


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
            self._laps.append((_NOT_ITS_OWN, self._clock.stamp()))

    def step_begins(self, step: int, pictures: int) -> None:
        if self.startup_seconds is None:
            self.startup_seconds = time.perf_counter() - self._began
        self._step = step, pictures

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
            pictures=np.array([pictures for _, pictures in rows], np.int64),
            startup_seconds=self.startup_seconds or 0.0,
            device=torch.cuda.get_device_name(self._device)
            if self._device.type == "cuda"
            else self._device.type,
            workers=self._workers,
        )

    def go_on(self, record: StepRecord, *, until: int, every: int) -> None:
        """Take over an earlier record, up to a step."""
        self.startup_seconds = record.startup_seconds
        rows = zip(record.steps, record.seconds, record.pictures, strict=True)
        kept = [(int(s), (row, int(pictures))) for s, row, pictures in rows if s <= until]
        self.kept.refill(kept, every)

    def _read_passed(self) -> None:
        while self._waiting and self._clock.passed(self._waiting[0][2][-1][1]):
            self._read(*self._waiting.popleft())

    def _read(self, step: int, pictures: int, laps: list[tuple[str, Any]]) -> None:
        seconds = np.zeros(len(STEP_PARTS), np.float32)
        for (_, earlier), (part, later) in pairwise(laps):
            if part != _NOT_ITS_OWN:
                seconds[STEP_PARTS.index(part)] += self._clock.seconds(earlier, later)
        self.kept.add(step, (seconds, pictures))

    def _count(self, what: str) -> None:
        now = time.perf_counter()
        if self._left is not None:
            self.other_seconds[what] += now - self._left
        self._left = now
