"""What was recorded of one training, as arrays; without torch, since rules and figures read it.

trials/ID/recording.npz        the three records of a trial in one file, no pickle
trials/ID/trace.json.gz        a profiler's trace of some steps, where one was asked for
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RECORDING_FILE = "recording.npz"
TRACE_FILE = "trace.json.gz"

# Weights are those before the step; a layer without a gradient (frozen, or unused) has NaN in the
# statistics of gradients and updates.
TENSOR_STATISTICS: Mapping[str, str] = {
    "weight_norm": "L2 norm of the layer's weight",
    "weight_std": "standard deviation of the layer's weight",
    "weight_absmax": "largest absolute value of the layer's weight",
    "weight_zeros": "share of exact zeros in the layer's weight",
    "weight_unchanged": "share of the weight that one step left within 1e-8 + 1e-5 x its value",
    "gradient_norm": "L2 norm of the weight's gradient, before clipping",
    "gradient_mean": "mean absolute value of the weight's gradient, before clipping",
    "gradient_absmax": "largest absolute value of the weight's gradient, before clipping",
    "gradient_zeros": "share of exact zeros in the weight's gradient",
    "gradient_nonfinite": "share of NaN and infinities in the weight's gradient",
    "update_norm": "L2 norm of what one step added to the weight",
    "update_mean": "mean absolute value of what one step added to the weight",
    "update_absmax": "largest absolute value of what one step added to the weight's sample",
    "update_ratio": "L2 norm of what one step added to the weight, by the weight's own norm",
    "activation_mean": "mean of the layer's output",
    "activation_std": "standard deviation of the layer's output",
    "activation_min": "smallest value of the layer's output",
    "activation_max": "largest value of the layer's output",
    "activation_zeros": "share of exact zeros in the layer's output",
    "activation_saturated": "share of a bounded activation's output in its flat parts",
    "activation_dead": "share of an activation's units that were at most 0 for the whole batch",
    "activation_nonfinite": "share of NaN and infinities in the layer's output",
}
"""Names of the statistics by layer; a share is in [0, 1]."""

STEP_PARTS = ("data", "to_device", "forward", "backward", "optimizer", "reporting")
"""What a training step's time is spent on, in the order of the columns of `StepRecord.seconds`."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """Statistics of the tensors of every layer, at some steps.

    Attributes:
        steps: int64, (S,), optimizer steps, from 1, counted through all epochs.
        layers: L names, in the order in which the layers first ran.
        kinds: L class names: `Conv2d`, `BatchNorm2d`, `ReLU`, …
        values: by name in `TENSOR_STATISTICS`, float32, (S, L); NaN where a layer has none.
        input_mean: float32, (S, C), of what entered the network, by channel.
        input_std: float32, (S, C).
        input_min: float32, (S,).
        input_max: float32, (S,).
        inputs: float16, (N, C, H, W): some of the first recorded batch, as they entered.
        notes: what could not be recorded, and why; a line each.
    """

    steps: NDArray[np.int64]
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: Mapping[str, Floats]
    input_mean: Floats
    input_std: Floats
    input_min: Floats
    input_max: Floats
    inputs: NDArray[np.float16]
    notes: tuple[str, ...] = ()

    def of(self, statistic: str) -> Floats:
        """Float32, (S, L); all NaN if it was not recorded."""
        missing = np.full((len(self.steps), len(self.layers)), np.nan, np.float32)
        return self.values.get(statistic, missing)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Where the time of training steps went.

    Attributes:
        steps: int64, (S,), optimizer steps, from 1; not every one in a long training.
        seconds: float32, (S, 6), by `STEP_PARTS`. On a GPU the parts are its own times.
        pictures: int64, (S,), in each step's batch.
        startup_seconds: from the training's start to its first step: network, loaders, first batch.
            Pictures were decoded, or features computed, before.
        device: `cpu` or the GPU's name.
        workers: processes that prepare pictures.
    """

    steps: NDArray[np.int64]
    seconds: Floats
    pictures: NDArray[np.int64]
    startup_seconds: float
    device: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class SystemRecord:
    """Use of the machine while the training ran.

    Attributes:
        times: float64, (T,), seconds since the epoch.
        values: by MLflow's names without `system/` (`cpu_utilization_percentage`,
            `system_memory_usage_megabytes`, `gpu_0_utilization_percentage`, …) and
            `process_memory_megabytes` of the training with its workers, without mapped files:
            float32, (T,).
    """

    times: NDArray[np.float64]
    values: Mapping[str, Floats]

    def of(self, name: str) -> Floats:
        """Float32, (T,); all NaN if it was not sampled."""
        return self.values.get(name, np.full(len(self.times), np.nan, np.float32))


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All that was recorded of one training; None for what was not."""

    tensors: TensorRecord | None = None
    steps: StepRecord | None = None
    system: SystemRecord | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a reader may want to know besides, small plain values, where they are known:

    `mean` and `std`, lists by channel: pixels in [0, 1] become network input by (x - mean) / std.
    `steps_per_epoch`: optimizer steps; findings name the epoch that a recorded step was in.
    """

    def save(self, path: Path) -> None:
        """Write one compressed file; a reader meets the old one or the new one, whole."""
        arrays: dict[str, NDArray[Any]] = {}
        words: dict[str, Any] = {"about": dict(self.about)}
        for name in ("tensors", "steps", "system"):
            record = getattr(self, name)
            if record is None:
                continue
            words[name] = {}
            for key, value in vars(record).items():
                if isinstance(value, np.ndarray):
                    arrays[f"{name}/{key}"] = value
                elif key == "values":
                    arrays |= {f"{name}/values/{each}": array for each, array in value.items()}
                else:
                    words[name][key] = value
        arrays["words"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """What `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is not one of ours.
        """
        try:
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
            words = json.loads(arrays.pop("words").tobytes())
            parts = {name: _fields(name, arrays, words) for name in words if name != "about"}
            return cls(
                tensors=TensorRecord(**parts["tensors"]) if "tensors" in parts else None,
                steps=StepRecord(**parts["steps"]) if "steps" in parts else None,
                system=SystemRecord(**parts["system"]) if "system" in parts else None,
                about=words["about"],
            )
        except OSError:
            raise
        except Exception as problem:  # zipfile, zlib and numpy have many for a damaged file
            raise ValueError(f"{path} is no recording of a training: {problem}") from None


def find_recording(folder: Path) -> Recording | None:
    """What was recorded of the trial whose folder this is; None where nothing can be read."""
    try:
        return Recording.load(folder / RECORDING_FILE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        logging.getLogger(__name__).info("%s", problem)
        return None


def _fields(name: str, arrays: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        key.removeprefix(f"{name}/"): array
        for key, array in arrays.items()
        if key.startswith(f"{name}/")
    }
    values = {
        key.removeprefix("values/"): array
        for key, array in own.items()
        if key.startswith("values/")
    }
    plain = {key: array for key, array in own.items() if not key.startswith("values/")}
    listed = {k: tuple(v) if isinstance(v, list) else v for k, v in words[name].items()}
    return plain | listed | ({"values": values} if name != "steps" else {})
