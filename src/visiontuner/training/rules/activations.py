"""Rules on the recorded statistics of what enters the network and what its layers put out."""

from __future__ import annotations

import math

import numpy as np

from visiontuner.journal import Finding, Severity
from visiontuner.training.recording.records import TensorRecord
from visiontuner.training.rules import thresholds as limits
from visiontuner.training.rules.history import TrainingHistory
from visiontuner.training.rules.recorded import (
    CONVOLUTION,
    LINEAR,
    NORM,
    epoch_of,
    last_step,
    lasting,
    layer_name,
    named,
    of_kind,
    tensors_of,
)


def tensor_variance(history: TrainingHistory) -> Finding | None:
    """The outputs of a layer hardly differ from each other, or are far too large.

    Source: Debugger's TensorVariance, which has no limits of its own.
    """
    record = tensors_of(history)
    if record is None:
        return None
    std = np.where(of_kind(record, CONVOLUTION, LINEAR, NORM), record.of("activation_std"), np.nan)
    large, small = lasting(std > limits.LARGEST_STD), lasting(std < limits.SMALLEST_STD)
    if not (large | small).any():
        return None
    layers, what = (large, "large") if large.any() else (small, "small")
    extreme = np.where(layers, std[-1], np.nan)
    layer = int(np.nanargmax(extreme) if large.any() else np.nanargmin(extreme))
    return Finding(
        rule="tensor_variance",
        severity="error",
        evidence=f"outputs vary too {'much' if what == 'large' else 'little'} in "
        f"{named(record, layers)} at the last {limits.LAST_STEPS} recorded steps; "
        f"{layer_name(record, layer)} has a standard deviation of {std[-1, layer]:.2g}",
        advice="Use a ten times smaller training.learning_rate or training.gradient_clip: 1.0."
        if what == "large"
        else "The network answers every picture alike: use a smaller training.learning_rate, and "
        "pretrained weights (model.weights: default).",
        step=epoch_of(history, last_step(record)),
    )


def saturated_activation(history: TrainingHistory) -> Finding | None:
    """Over half of a sigmoid's or tanh's outputs lie where it is flat: no gradient passes.

    Source: Debugger's SaturatedActivation, threshold_layer 50 %.
    """
    record = tensors_of(history)
    if record is None:
        return None
    # A hard sigmoid is a gate: shut and open are what it is for.
    bounded = of_kind(record, "^Sigmoid$", "^Tanh$")
    shares = np.where(bounded, record.of("activation_saturated"), np.nan)
    layers = lasting(shares > limits.SATURATED_SHARE)
    if not layers.any():
        return None
    return _share_finding(
        history,
        record,
        "saturated_activation",
        "error",
        shares,
        layers,
        "of the outputs are saturated",
        "Use a smaller training.learning_rate; if it begins so, a backbone with ReLU and "
        "normalisation.",
    )


def dead_relu(history: TrainingHistory) -> Finding | None:
    """Most units of a ReLU are at most 0 for every picture of a batch.

    Source: Debugger's DeadRelu, threshold_layer 50 %; that the error needs more is our own.
    """
    record = tensors_of(history)
    if record is None:
        return None
    shares = np.where(of_kind(record, "ReLU"), record.of("activation_dead"), np.nan)
    layers = lasting(shares > limits.DEAD_SHARE_WARNING)
    if not layers.any() or _pictures_a_step(history) < limits.DEAD_FEWEST_PICTURES:
        return None
    worse = lasting(shares > limits.DEAD_SHARE_ERROR)
    return _share_finding(
        history,
        record,
        "dead_relu",
        "error" if worse.any() else "warning",
        shares,
        worse if worse.any() else layers,
        "of the units are 0 for a whole batch",
        "Use a smaller training.learning_rate or training.warmup_fraction: 0.1; units that died do "
        "not come back.",
    )


def check_input_images(history: TrainingHistory) -> Finding | None:
    """Pictures enter the network with other values than its weights were trained on.

    Source: after Debugger's CheckInputImages, threshold_mean 0.2, for pictures as a whole: where
    black and white lie tells what was done to them, while a set of dark pictures is no mistake.
    """
    record = tensors_of(history)
    known = history.recording.about if history.recording else {}
    mean, std = known.get("mean"), known.get("std")
    if record is None or not mean or not std or not np.isfinite(record.input_max).any():
        return None
    black = min(-m / s for m, s in zip(mean, std, strict=True))
    white = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    low, high = float(np.nanmin(record.input_min)), float(np.nanmax(record.input_max))
    what = _kind_of_pixels(low, high, black, white)
    if what is None:
        return None
    centre = ", ".join(f"{value:.2f}" for value in np.nanmean(record.input_mean, axis=0))
    return Finding(
        rule="check_input_images",
        severity="error",
        evidence=f"values from {low:.3g} to {high:.3g}, mean {centre} by channel, enter the "
        f"network: {what}; black is {black:.3g} and white {white:.3g} where it was pretrained",
        advice="Normalise pictures as the backbone expects: (x / 255 - mean) / std with mean "
        f"{_listed(mean)} and std {_listed(std)}.",
        step=epoch_of(history, int(record.steps[0])),
    )


def _pictures_a_step(history: TrainingHistory) -> float:
    """The usual size of a batch; infinite if it is unknown."""
    steps = history.recording.steps if history.recording else None
    return float(np.median(steps.pictures)) if steps and len(steps.pictures) else math.inf


def _kind_of_pixels(low: float, high: float, black: float, white: float) -> str | None:
    """What the values look like, if they are not those that are expected."""
    room = limits.INPUT_ROOM * (white - black)
    if low < black - room or high > white + room:
        return "pixels from 0 to 255" if low >= 0 and high > 2 else "outside what pictures can have"
    for bottom, what in ((0.0, "pixels from 0 to 1"), (-1.0, "pixels from -1 to 1")):
        expected = abs(bottom - black) < room and abs(1 - white) < room
        fits = bottom <= low < bottom + room and 1 - room < high <= 1
        if fits and not expected:
            return what
    return None


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _share_finding(
    history: TrainingHistory,
    record: TensorRecord,
    rule: str,
    severity: Severity,
    shares: np.ndarray,
    layers: np.ndarray,
    what: str,
    advice: str,
) -> Finding:
    worst = int(np.where(layers, np.nan_to_num(shares[-1]), -1).argmax())
    return Finding(
        rule=rule,
        severity=severity,
        evidence=f"at step {last_step(record)} {shares[-1, worst]:.0%} {what} in "
        f"{layer_name(record, worst)}, and too many in {layers.sum()} layers at the last "
        f"{limits.LAST_STEPS} recorded steps: {named(record, layers)}",
        advice=advice,
        step=epoch_of(history, last_step(record)),
    )
