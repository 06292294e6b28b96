"""A profiler's trace of a few steps, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from visiontuner.training.recording.records import TRACE_FILE
from visiontuner.training.watch import Watch

_log = logging.getLogger(__name__)


class Trace(Watch):
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
