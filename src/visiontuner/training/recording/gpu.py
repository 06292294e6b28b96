"""What NVML says of the GPU that a training runs on; nothing where there is none to ask."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Self

import torch

_MEGABYTE = 1e6


class Gpu:
    """One GPU, numbered as MLflow does: as NVML counts all of the machine's."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._prefix = f"gpu_{nvml.nvmlDeviceGetIndex(handle)}"

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """None on a CPU, without NVML, or where it does not know the device (a slice of one)."""
        if device.type != "cuda":
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except Exception:  # NVML's own errors are made when it is imported
            return None

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
