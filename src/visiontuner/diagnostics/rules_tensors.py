"""Rules on recorded statistics of weights, gradients, updates and activations."""

from __future__ import annotations

import math
from statistics import median

import numpy as np

from visiontuner.diagnostics import thresholds as limits
from visiontuner.diagnostics.history import (
    CONVOLUTION,
    LINEAR,
    NORM,
    TensorRecord,
    TrainingHistory,
    epoch_of,
    last_step,
    lasting,
    layer_name,
    named,
    of_kind,
    tensors_of,
    times_over,
    trained,
)
from visiontuner.journal import Finding, Severity

# Rules on gradients.


def exploding_gradient(history: TrainingHistory) -> Finding | None:
    """The gradient norm is many times that of the first epoch and of the usual one before it."""
    norm = history.curve("gradient_norm")
    worst, at, usual = 0.0, 0, 0.0
    for position in range(1, len(norm.values)):
        # The first epoch's as well: near the end a usual norm is so small that noise is "large".
        before = max(norm.values[0], median(norm.values[:position]))
        times = norm.values[position] / before if before > 0 else 0.0
        if times > worst:
            worst, at, usual = times, position, before
    if worst < limits.GRADIENT_WARNING:
        return None
    return Finding(
        rule="exploding_gradient",
        severity="error" if worst >= limits.GRADIENT_ERROR else "warning",
        evidence=f"gradient norm {norm.values[at]:.3g}, {times_over(worst)} times the "
        f"{usual:.3g} before",
        advice="Use a smaller learning rate or training.warmup_fraction: 0.1; look for images "
        "with broken pixels.",
        step=norm.steps[at],
    )


# Rules on the recorded statistics of weights, their gradients and their updates.


def exploding_tensor(history: TrainingHistory) -> Finding | None:
    """A gradient or a layer's output holds NaN or infinities.

    Source: Debugger's ExplodingTensor.
    """
    record = tensors_of(history)
    if record is None:
        return None
    # Shares are of a sample, extremes and norms of everything.
    output, gradient = (
        (np.nan_to_num(record.of(f"{name}_nonfinite")) > 0)
        | np.any([np.isinf(record.of(f"{name}_{extreme}")) for extreme in extremes], axis=0)
        for name, extremes in (("activation", ("min", "max")), ("gradient", ("norm", "absmax")))
    )
    rows = (output | gradient).any(axis=1)
    if not rows.any():
        return None
    row = int(rows.argmax())
    what, layers = ("output", output[row]) if output[row].any() else ("gradient", gradient[row])
    return Finding(
        rule="exploding_tensor",
        severity="error",
        evidence=f"NaN or infinity at step {record.steps[row]} in the {what} of "
        f"{layer_name(record, int(layers.argmax()))}, first of {layers.sum()} such layers",
        advice="Use a ten times smaller training.learning_rate, training.warmup_fraction: 0.1 "
        "or training.gradient_clip: 1.0; look for damaged images.",
        step=epoch_of(history, int(record.steps[row])),
    )


def vanishing_gradient(history: TrainingHistory) -> Finding | None:
    """Some layers get next to no gradient while others get one.

    Source: Debugger's VanishingGradient; that others get one is our own condition.
    """
    record = tensors_of(history)
    if record is None:
        return None
    mean = np.where(trained(record), record.of("gradient_mean"), np.nan)
    largest = np.nan_to_num(mean).max(axis=1, keepdims=True)
    vanished = lasting(
        (mean > 0) & (mean < limits.VANISHED_GRADIENT) & (mean < limits.VANISHED_SHARE * largest)
    )
    if not vanished.any():
        return None
    lowest = int(np.where(vanished, mean[-1], np.inf).argmin())
    return _finding(
        history,
        record,
        "vanishing_gradient",
        "error",
        f"mean absolute gradient below {limits.VANISHED_GRADIENT:g} in {vanished.sum()} of "
        f"{trained(record).sum()} trained layers at the last {limits.LAST_STEPS} recorded steps, "
        f"lowest {layer_name(record, lowest)} with {mean[-1, lowest]:.2g}; the largest of a layer "
        f"is {largest[-1, 0]:.2g}",
        "These layers do not learn: use a backbone with normalisation and without sigmoid or tanh "
        "between its layers, or model.train: last_stage.",
    )


def all_zero(history: TrainingHistory) -> Finding | None:
    """All of a layer's weights, outputs or gradients are zero.

    Source: Debugger's AllZero.
    """
    record = tensors_of(history)
    if record is None:
        return None
    said, anything = [], np.zeros(len(record.layers), bool)
    for name, what in (("weight", "weights"), ("activation", "outputs"), ("gradient", "gradients")):
        layers = lasting(record.of(f"{name}_zeros") >= limits.ALL_ZERO)
        layers &= ~of_kind(record, "Drop", "StochasticDepth")  # what they are for
        if layers.any():
            said.append(f"the {what} of {named(record, layers)}")
            anything |= layers
    if not anything.any():
        return None
    return _finding(
        history,
        record,
        "all_zero",
        "error",
        f"nothing but zeros at the last {limits.LAST_STEPS} recorded steps: {'; '.join(said)}",
        "Look for a damaged file under model.weights; if the network began well, use a smaller "
        "training.learning_rate.",
    )


def unchanged_tensor(history: TrainingHistory) -> Finding | None:
    """The optimizer no longer changes weights that get a gradient; an error if it changes none.

    Weights of norms are left out: near 1 a small step is within the tolerance.

    Source: Debugger's UnchangedTensor.
    """
    record = tensors_of(history)
    if record is None:
        return None
    weights = trained(record) & ~of_kind(record, NORM)
    still = record.of("weight_unchanged") >= 1
    layers = weights & lasting(still) & (still.mean(axis=0) >= limits.STILL_SHARE)
    if not layers.any():
        return None
    every = bool((layers == weights).all())
    return _finding(
        history,
        record,
        "unchanged_tensor",
        "error" if every else "warning",
        f"{'all' if every else layers.sum()} of {weights.sum()} trained layers were the same "
        f"before and after each of the last {limits.LAST_STEPS} recorded steps: "
        f"{named(record, layers)}",
        "Use a larger training.learning_rate"
        + (" and training.backbone_learning_rate_factor." if not every else "."),
    )


def weight_update_ratio(history: TrainingHistory) -> Finding | None:
    """One step changes a weight by ten times its own norm, or steps change next to nothing.

    Source: Debugger's WeightUpdateRatio.
    """
    record = tensors_of(history)
    if record is None:
        return None
    ratio = record.of("update_ratio")
    ratio = np.where((record.of("weight_norm") > 0) & np.isfinite(ratio), ratio, np.nan)
    large = ratio > limits.UPDATE_LARGE
    if large.any():
        return _too_large(history, record, ratio, large)
    weights = trained(record) & ~of_kind(record, NORM)
    small = weights & lasting(ratio < limits.UPDATE_SMALL)
    small &= (ratio < limits.UPDATE_SMALL).mean(axis=0) >= limits.STILL_SHARE
    if not small.any():
        return None
    return _finding(
        history,
        record,
        "weight_update_ratio",
        "error" if 2 * small.sum() > weights.sum() else "warning",
        f"a step changes {small.sum()} of {weights.sum()} trained layers by less than "
        f"{limits.UPDATE_SMALL:g} of their norm: {named(record, small)}",
        "Use a larger training.learning_rate or training.backbone_learning_rate_factor.",
    )


def _too_large(
    history: TrainingHistory, record: TensorRecord, ratio: np.ndarray, large: np.ndarray
) -> Finding:
    row, layer = (int(index) for index in np.unravel_index(np.nanargmax(ratio), ratio.shape))
    return _finding(
        history,
        record,
        "weight_update_ratio",
        "error",
        f"step {record.steps[row]} changed {layer_name(record, layer)} by "
        f"{ratio[row, layer]:.3g} times its norm; {large.any(axis=0).sum()} layers had more than "
        f"{limits.UPDATE_LARGE:g} times in a step",
        "Use a ten times smaller training.learning_rate, or training.warmup_fraction: 0.1.",
        step=int(record.steps[row]),
    )


def poor_weight_initialisation(history: TrainingHistory) -> Finding | None:
    """The first recorded step shows weights that cannot be trained from.

    All weights of a layer are equal, so that its units stay equal; or outputs, or gradients, of the
    layers differ by orders of magnitude before anything was learned.

    Source: after Debugger's PoorWeightInitialization, whose limits hold for no usual network.
    """
    record = tensors_of(history)
    if record is None or record.steps[0] > limits.FIRST_STEPS:
        return None
    evidence = _equal_weights(record) or _spread(record)
    if evidence is None:
        return None
    return _finding(
        history,
        record,
        "poor_weight_initialisation",
        "error",
        f"at step {record.steps[0]} {evidence}",
        "Begin with pretrained weights (model.weights: default), or choose a backbone with "
        "normalisation.",
        step=int(record.steps[0]),
    )


def _equal_weights(record: TensorRecord) -> str | None:
    equal = (
        trained(record) & of_kind(record, CONVOLUTION, LINEAR) & (record.of("weight_std")[0] == 0)
    )
    equal &= record.of("weight_zeros")[0] < 1  # a layer may begin with zeros: `all_zero`
    return f"all weights are equal in {named(record, equal)}" if equal.any() else None


def _spread(record: TensorRecord) -> str | None:
    """Which layers differ too much in their outputs or gradients at the first step, if any do."""
    for statistic, what, most in (
        ("activation_std", "the standard deviation of outputs", limits.INITIAL_OUTPUTS),
        ("gradient_mean", "the mean absolute gradient", limits.INITIAL_GRADIENTS),
    ):
        values = record.of(statistic)[0].astype(np.float64)
        # A layer of zeros, a new head for one, is `all_zero` if it stays so.
        values[~of_kind(record, CONVOLUTION, LINEAR) | ~(values > 0)] = np.nan
        if np.isfinite(values).sum() < 2:
            continue
        low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
        if values[high] > most * values[low]:
            return (
                f"{what} is {values[low]:.2g} in {layer_name(record, low)} and {values[high]:.2g} "
                f"in {layer_name(record, high)}, {values[high] / values[low]:.0e} times as much"
            )
    return None


def _finding(
    history: TrainingHistory,
    record: TensorRecord,
    rule: str,
    severity: Severity,
    evidence: str,
    advice: str,
    *,
    step: int | None = None,
) -> Finding:
    at = last_step(record) if step is None else step
    return Finding(
        rule=rule,
        severity=severity,
        evidence=evidence,
        advice=advice,
        step=epoch_of(history, at),
    )


# Rules on the recorded statistics of what enters the network and what its layers put out.


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
        else "The network answers every image alike: use a smaller training.learning_rate, and "
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
    """Most units of a ReLU are at most 0 for every image of a batch.

    Source: Debugger's DeadRelu, threshold_layer 50 %; that the error needs more is our own.
    """
    record = tensors_of(history)
    if record is None:
        return None
    shares = np.where(of_kind(record, "ReLU"), record.of("activation_dead"), np.nan)
    layers = lasting(shares > limits.DEAD_SHARE_WARNING)
    if not layers.any() or _images_a_step(history) < limits.DEAD_FEWEST_IMAGES:
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
    """Images enter the network with other values than its weights were trained on.

    Source: after Debugger's CheckInputImages, threshold_mean 0.2, for images as a whole: where
    black and white lie tells what was done to them, while a set of dark images is no mistake.
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
        advice="Normalise images as the backbone expects: (x / 255 - mean) / std with mean "
        f"{_listed(mean)} and std {_listed(std)}.",
        step=epoch_of(history, int(record.steps[0])),
    )


def _images_a_step(history: TrainingHistory) -> float:
    """The usual size of a batch; infinite if it is unknown."""
    steps = history.recording.steps if history.recording else None
    return float(np.median(steps.images)) if steps and len(steps.images) else math.inf


def _kind_of_pixels(low: float, high: float, black: float, white: float) -> str | None:
    """What the values look like, if they are not those that are expected."""
    room = limits.INPUT_MARGIN * (white - black)
    if low < black - room or high > white + room:
        return "pixels from 0 to 255" if low >= 0 and high > 2 else "outside what images can have"
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
