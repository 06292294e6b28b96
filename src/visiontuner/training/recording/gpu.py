"""What NVML says of the GPU that a training runs on."""

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
    def of(cls, device: torch.device) -> Self:
        """The GPU that torch knows as this device.

        Raises:
            Exception: NVML's own kinds, made when it is imported: it is not installed, finds no
                driver, or does not know the device.
        """
        import pynvml

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
