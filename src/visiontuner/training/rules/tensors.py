"""Rules on the recorded statistics of weights and gradients."""

from __future__ import annotations

import numpy as np

from visiontuner.journal import Finding
from visiontuner.training.recording.records import TensorRecord
from visiontuner.training.rules.history import TrainingHistory


def exploding_tensor(history: TrainingHistory) -> Finding | None:
    """A gradient or an activation holds NaN or infinities.

    Source: Debugger's ExplodingTensor.
    """
    record = tensors_of(history)
    if record is None:
        return None
    for statistic, what in (("activation", "output"), ("gradient", "gradient")):
        shares = np.nan_to_num(record.of(f"{statistic}_nonfinite"))
        if not shares.any():
            continue
        row = int(shares.any(axis=1).argmax())
        layer = int((shares[row] > 0).argmax())
        count = int((shares[row] > 0).sum())
        return Finding(
            rule="exploding_tensor",
            severity="error",
            evidence=f"NaN or infinity in the {what} of {layer_name(record, layer)} at step "
            f"{record.steps[row]}, and of {count} of {len(record.layers)} layers in all",
            advice="Use a ten times smaller training.learning_rate, training.warmup_fraction: 0.1 "
            "or training.gradient_clip: 1.0; look for damaged pictures.",
            step=epoch_of(history, int(record.steps[row])),
        )
    return None


def tensors_of(history: TrainingHistory) -> TensorRecord | None:
    """What was recorded of tensors; None where that is nothing."""
    record = history.recording.tensors if history.recording else None
    return record if record is not None and len(record.steps) and len(record.layers) else None


def layer_name(record: TensorRecord, layer: int) -> str:
    """`backbone.layer1.0.conv1 (Conv2d)`."""
    return f"{record.layers[layer]} ({record.kinds[layer]})"


def epoch_of(history: TrainingHistory, step: int) -> int | None:
    """The epoch, from 1, of an optimizer step, from 1; None if an epoch's length is unknown."""
    steps = history.recording.about.get("steps_per_epoch") if history.recording else None
    return (step - 1) // int(steps) + 1 if steps else None
