"""Runs a backbone in eval mode: torch on a GPU, ONNX Runtime on a CPU, torch where that fails."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from visiontuner.data.cores import available_cpus
from visiontuner.errors import ExportError
from visiontuner.float32 import full_float32
from visiontuner.model.backbone import Backbone
from visiontuner.model.export import export_backbone
from visiontuner.model.store import Precision

Images = NDArray[np.float32]
Features = NDArray[np.float32]

# Largest difference between ONNX Runtime and torch, as a share of the largest feature.
RELATIVE_TOLERANCE = 1e-4

# Each holds what the layers of a call hand on: 100 MB for a large network.
_MOST_LANES = 16


class Engine(Protocol):
    """Maps network input to features."""

    description: str
    """What runs where, for people: `ONNX Runtime fp32 on 2 CPU threads`."""

    batch_size: int
    """Pictures at a time at which it is fast."""

    lanes: int
    """Threads that may call `features` at the same time, and have to for it to be fast."""

    def features(self, images: Images) -> Features:
        """Feature vectors of a batch.

        Args:
            images: float32, shape (B, 3, size, size), normalised.

        Returns:
            float32, shape (B, feature_dim).
        """
        ...


def make_engine(
    backbone: Backbone, *, precision: Precision, cache: Path, threads: int | None = None
) -> Engine:
    """The fastest engine that answers as torch does on this machine.

    ONNX Runtime is chosen on a CPU in fp32 after it has been compared with torch once; where the
    network does not export or answers differently, torch runs it and `description` says so.

    Args:
        cache: where the exported network is kept.
        threads: CPU threads; default: the cores that this process may use.
    """
    threads = threads or available_cpus()
    if torch.cuda.is_available():
        return TorchEngine(backbone, precision=precision, device="cuda", threads=threads)
    if precision == "bf16":
        return TorchEngine(backbone, precision=precision, device="cpu", threads=threads)
    try:
        path = export_backbone(backbone, cache=cache)
        engine = OnnxEngine(path, threads=threads)
        _check_against_torch(engine, backbone, path)
    except ExportError as error:
        reason = str(error).split(". Choose another")[0]
        return TorchEngine(
            backbone, precision=precision, device="cpu", threads=threads, because=reason
        )
    return engine


class OnnxEngine:
    """An exported backbone in ONNX Runtime on the CPU, in fp32."""

    # A core with pictures of its own waits for no other, and what a layer hands on stays in its
    # cache: on 2 cores, 2 pictures for each, 250 pictures/s where both cores with 4 pictures give
    # 225 and with 8 220 (EfficientNet-Lite0); 360, 300 and 305 (MobileNetV3); 46, 45 and 45
    # (ResNet-50).
    batch_size = 2

    def __init__(self, path: Path, *, threads: int) -> None:
        self.description = f"ONNX Runtime fp32 on {threads} CPU thread{'s' * (threads > 1)}"
        self.lanes = min(threads, _MOST_LANES)
        self._session = _open_session(path, threads // self.lanes)

    def features(self, images: Images) -> Features:
        (features,) = self._session.run(["features"], {"image": images})
        return np.asarray(features, dtype=np.float32)


class TorchEngine:
    """A backbone in torch, channels last; bf16 by autocast."""

    lanes = 1

    def __init__(
        self,
        backbone: Backbone,
        *,
        precision: Precision,
        device: Literal["cpu", "cuda"],
        threads: int,
        because: str = "",
    ) -> None:
        place = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
        self.description = f"torch {precision} on {place}" + (f" ({because})" if because else "")
        self._device = torch.device(device)
        self.batch_size = 64 if device == "cuda" else 16
        self._bf16 = precision == "bf16"
        self._threads = threads
        # A copy: the backbone itself stays on the CPU, where it is exported and compared.
        module = copy.deepcopy(backbone.module) if device == "cuda" else backbone.module
        self._module = module.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: Images) -> Features:
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        batch = torch.from_numpy(images).to(
            self._device, memory_format=torch.channels_last, non_blocking=True
        )
        with (
            torch.inference_mode(),
            full_float32(),
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16),
        ):
            features: torch.Tensor = self._module(batch)  # (B, D)
        return features.float().cpu().numpy()


def _open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """One in which so many threads work on a call, who calls it among them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Waiting threads would spin and take the cores from those that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no base
        raise ExportError(
            f"ONNX Runtime does not open the exported network ({type(error).__name__})"
        ) from None


def _check_against_torch(engine: OnnxEngine, backbone: Backbone, path: Path) -> None:
    """Compare once per exported file; the result is kept beside it."""
    note = path.with_suffix(f".checked-{onnxruntime.__version__}.json")
    try:
        difference = float(json.loads(note.read_text())["relative_difference"])
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged
        difference = _difference(engine, backbone)
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"relative_difference": difference}))
        temporary.replace(note)
    if not difference <= RELATIVE_TOLERANCE:  # NaN too
        raise ExportError(
            f"ONNX Runtime differs from torch by {difference:.1e}, more than {RELATIVE_TOLERANCE:g}"
        )


def _difference(engine: OnnxEngine, backbone: Backbone) -> float:
    size = backbone.preprocessing.size
    # Three pictures, not the two of the export: a batch size that was frozen shows.
    images = np.random.default_rng(0).standard_normal((3, 3, size, size), dtype=np.float32)
    with torch.inference_mode():
        expected = backbone.module(torch.from_numpy(images)).numpy()
    got = engine.features(images)
    return float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-12))
