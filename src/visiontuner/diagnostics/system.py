"""Samples the machine's use from a thread: CPU, memory, disk, GPU, and this training's processes.

The names are those of MLflow's own system metrics, without `system/`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pynvml
import torch

from visiontuner.diagnostics.history import SystemRecord

# What NVML says of the GPU that a training runs on.


_MEGABYTE = 1e6


class Gpu:
    """One GPU, numbered as MLflow does: as NVML counts all of the machine's."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._prefix = f"gpu_{nvml.nvmlDeviceGetIndex(handle)}"

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """The GPU that torch knows as this device.

        Raises:
            Exception: NVML's own kinds, made when it is imported: it is not installed, finds no
                driver, or does not know the device.
        """

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))

    def untold(self) -> list[str]:
        """What the rules look at and this GPU does not tell, as a slice of one may not."""
        told = self.sample()
        looked_at = {"use": "utilization_percentage", "memory": "memory_usage_percentage"}
        return [what for what, name in looked_at.items() if f"{self._prefix}_{name}" not in told]

    def sample(self) -> dict[str, float]:
        """Use, memory and power; without what this GPU does not tell."""
        nvml, handle, values = self._nvml, self._handle, dict[str, float]()
        with suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            values["memory_usage_percentage"] = memory.used / memory.total * 100
            values["memory_usage_megabytes"] = memory.used / _MEGABYTE
        with suppress(nvml.NVMLError):
            values["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        with suppress(nvml.NVMLError):
            milliwatts = nvml.nvmlDeviceGetPowerUsage(handle)
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
            values["power_usage_watts"] = milliwatts / 1000
            values["power_usage_percentage"] = milliwatts / limit * 100
        return {f"{self._prefix}_{name}": value for name, value in values.items()}


MOST_SAMPLES = 720
"""24 minutes at two seconds each; those of a longer training lie further apart."""
_LOOK_FOR_PROCESSES = 5  # samples between two looks at all of the machine's: 5 ms each

_Sample = tuple[float, Mapping[str, float]]


class SystemSampler:
    """A sample at the start, one every few seconds, and one at the end.

    Args:
        folder: whose disk is watched.
        device: whose use is sampled too, if it is a GPU and NVML can be asked.
        interval_seconds: between two samples, to begin with.

    Attributes:
        problem: what cannot be sampled, and why.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        interval_seconds: float = 2.0,
        most_samples: int = MOST_SAMPLES,
    ) -> None:
        self._folder = folder
        self._interval = interval_seconds
        self._most = most_samples
        self._samples: list[_Sample] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._processes = _Processes()
        self.problem: str | None = None
        self._gpu = self._find_gpu(device)
        psutil.cpu_percent()  # the next one is of the time since this
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, with a last sample."""
        self._ended.set()
        self._thread.join(10)

    def record(self) -> SystemRecord:
        """What is sampled so far; NaN where a value could not be read."""
        with self._lock:
            samples = list(self._samples)
        names = dict.fromkeys(name for _, values in samples for name in values)
        columns = {name: [values.get(name, np.nan) for _, values in samples] for name in names}
        return SystemRecord(
            times=np.array([moment for moment, _ in samples], np.float64),
            values={name: np.array(column, np.float32) for name, column in columns.items()},
        )

    def go_on(self, record: SystemRecord) -> None:
        """Put what was sampled before the training was interrupted in front."""
        earlier = [
            (float(moment), {name: float(column[n]) for name, column in record.values.items()})
            for n, moment in enumerate(record.times)
        ]
        with self._lock:
            self._samples = earlier + self._samples
            self._thin()

    def _find_gpu(self, device: torch.device) -> Gpu | None:
        if device.type != "cuda":
            return None
        try:
            gpu = Gpu.of(device)
            untold = gpu.untold()
        except Exception as problem:  # NVML's own errors are made when it is imported
            self.problem = f"use of the GPU, {type(problem).__name__}: {problem}"
            return None
        if untold:
            self.problem = f"{' and '.join(untold)} of the GPU, which NVML does not tell"
        return gpu

    def _run(self) -> None:
        while True:
            self._sample()
            if self._ended.wait(self._interval):
                break
        self._sample()

    def _sample(self) -> None:
        values: dict[str, float] = {}
        with suppress(psutil.Error, OSError):  # a process may end while it is asked
            values |= _of_machine(self._folder)
            values |= self._processes.sample()
        if self._gpu is not None:
            values |= self._gpu.sample()
        with self._lock:
            self._samples.append((time.time(), values))
            self._thin()

    def _thin(self) -> None:
        while len(self._samples) > self._most:
            self._samples = self._samples[::2]
            self._interval *= 2


class _Processes:
    """The memory of this process's own and of all that it started."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._known: list[psutil.Process] = []
        self._asked = 0

    def sample(self) -> dict[str, float]:
        if self._asked % _LOOK_FOR_PROCESSES == 0:
            self._known = self._own.children(recursive=True)
        self._asked += 1
        total = _private(self._own)
        for process in self._known:
            with suppress(psutil.Error):
                total += _private(process)
        return {"process_memory_megabytes": total / _MEGABYTE}


def _private(process: psutil.Process) -> int:
    """Bytes without what is mapped from files: pages of images are the system's to take back.

    Exact numbers (`memory_full_info`) cost 80 ms for a process of one gigabyte, these 10 µs.
    """
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))  # Linux alone tells


def _of_machine(folder: Path) -> dict[str, float]:
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / _MEGABYTE,
        "disk_available_megabytes": disk.free / _MEGABYTE,
    }
