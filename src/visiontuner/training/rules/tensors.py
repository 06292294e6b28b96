"""Rules on the recorded statistics of weights, their gradients and their updates."""

from __future__ import annotations

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
    trained,
)


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
        "or training.gradient_clip: 1.0; look for damaged pictures.",
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
