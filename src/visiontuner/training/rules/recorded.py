"""What rules on recordings share: which layers are meant, when, and how they are named."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from visiontuner.training.recording.records import TensorRecord
from visiontuner.training.rules import thresholds as limits
from visiontuner.training.rules.history import TrainingHistory

Layers = NDArray[np.bool_]
"""One truth value a layer, (L,)."""

# A block may be called ConvNeXtBlock or LinearAttention, and a gate HardSigmoid.
CONVOLUTION = r"Conv(Transpose)?\dd"
LINEAR = r"Linear$"
NORM = r"Norm"

_NAMED = 3


def tensors_of(history: TrainingHistory) -> TensorRecord | None:
    """What was recorded of tensors; None where that is nothing."""
    record = history.recording.tensors if history.recording else None
    return record if record is not None and len(record.steps) and len(record.layers) else None


def lasting(holds: NDArray[np.bool_]) -> Layers:
    """Which layers it holds of, (S, L), at the last three recorded steps; none of fewer steps."""
    steps = limits.LAST_STEPS
    if len(holds) < steps:
        return np.zeros(holds.shape[1], bool)
    return np.asarray(holds[-steps:].all(axis=0))


def trained(record: TensorRecord) -> Layers:
    """Layers whose weight got a gradient at some step."""
    return np.asarray((~np.isnan(record.of("gradient_norm"))).any(axis=0))


def of_kind(record: TensorRecord, *patterns: str) -> Layers:
    """Layers in whose class name one of the patterns is found: `CONVOLUTION`, `LINEAR`, …"""
    found = re.compile("|".join(patterns)).search
    return np.array([found(kind) is not None for kind in record.kinds], bool)


def layer_name(record: TensorRecord, layer: int) -> str:
    """`backbone.layer1.0.conv1 (Conv2d)`."""
    return f"{record.layers[layer]} ({record.kinds[layer]})"


def named(record: TensorRecord, layers: Layers) -> str:
    """`first (Conv2d), relu (ReLU) and 3 more`, in the order in which they run."""
    found = np.flatnonzero(layers)
    names = ", ".join(layer_name(record, int(layer)) for layer in found[:_NAMED])
    return names + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def last_step(record: TensorRecord) -> int:
    return int(record.steps[-1])


def epoch_of(history: TrainingHistory, step: int) -> int | None:
    """The epoch, from 1, of an optimizer step, from 1; None if an epoch's length is unknown."""
    steps = history.recording.about.get("steps_per_epoch") if history.recording else None
    return (step - 1) // int(steps) + 1 if steps else None
