"""Rules on curves: one finding, or None where there is nothing to say."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from statistics import median

from visiontuner.diagnostics import thresholds as limits
from visiontuner.diagnostics.history import LossBounds, TrainingHistory, times_over
from visiontuner.journal import Finding, Severity


def not_a_number(history: TrainingHistory) -> Finding | None:
    """A recorded value, or the loss that ended the training, is NaN or infinite."""
    advice = (
        "Use a learning rate ten times smaller; if that does not help, look for damaged images "
        "or features."
    )
    for name, curve in history.metrics.items():
        for step, value in zip(*curve, strict=True):
            if not math.isfinite(value):
                return _finding("not_a_number", "error", f"{name} is {value}", advice, step)
    if history.error and re.search(r"\bis (nan|-?inf)\b", history.error):
        evidence = f"the training ended: {history.error.rstrip('.')}"
        return _finding("not_a_number", "error", evidence, advice, history.last_step)
    return None


def loss_not_decreasing(history: TrainingHistory) -> Finding | None:
    """The training loss is high and over the last epochs it fell by less than 0.1 %, or rose."""
    loss = history.curve("train_loss")
    if len(loss.values) < limits.LOSS_FEWEST_EPOCHS:
        return None
    left = _left(history)
    if left is None or left <= limits.LEARNED_SHARE:
        return None
    above = [value - _least(history) for value in loss.values]
    before = above[max(-len(above), -1 - limits.LOSS_EPOCHS)]
    fell = (before - above[-1]) / before if before > 0 else 1.0
    rose = above[-1] > above[0] * (1 + limits.LOSS_INCREASE)
    if fell >= limits.LOSS_DECREASE and not rose:
        return None
    epochs = min(len(loss.values) - 1, limits.LOSS_EPOCHS)
    change = f"fell by {fell:.2%}" if fell >= 0 else f"rose by {times_over(-100 * fell)} %"
    return _finding(
        "loss_not_decreasing",
        "error",
        f"over the last {epochs} epochs the training loss {change}, to {loss.values[-1]:.3g}"
        f"{_guess(history)}",
        "Try learning rates ten times larger and smaller; if none helps, see whether labels and "
        "images belong together.",
        loss.steps[-1],
    )


def overfit(history: TrainingHistory) -> Finding | None:
    """Training images are known far better than validation images."""
    losses = _together(history, "train_loss", "validation_loss")
    if len(losses) < limits.LOSS_FEWEST_EPOCHS - 1:
        return None
    gaps = _together(history, "train_accuracy", "validation_accuracy")
    recent = losses[-1 - limits.OVERFIT_PATIENCE :]
    if not history.train_loss_is_plain:
        # The losses cannot be compared: the accuracies decide alone.
        if not gaps:
            return None
    elif any(valid - train <= limits.OVERFIT_RATIO * train for _, train, valid in recent):
        return None
    step, train, valid = losses[-1]
    said = f"validation loss {valid:.3g} against training loss {train:.3g}"
    if gaps:
        gap = min(a - b for _, a, b in gaps[-1 - limits.OVERFIT_PATIENCE :])
        if gap < limits.OVERFIT_GAP_WARNING:
            return None
        severity: Severity = "error" if gap >= limits.OVERFIT_GAP_ERROR else "warning"
        said = f"accuracy {gaps[-1][1]:.3f} in training, {gaps[-1][2]:.3f} in validation; {said}"
    elif valid <= min(v for _, _, v in losses) * (1 + limits.OVERFIT_RATIO):
        return None
    else:
        severity = "warning"
    advice = (
        "Add images or augmentation; more training.weight_decay, training.dropout or fewer "
        "epochs help a little."
    )
    return _finding("overfit", severity, said, advice, step)


def overtraining(history: TrainingHistory) -> Finding | None:
    """Many epochs after the best one, while the validation loss rose again.

    With the learning rate near 0 nothing changes any more: epochs below half of the highest rate do
    not count, unless the validation accuracy was lost.
    """
    loss = history.curve("validation_loss")
    if len(loss.values) <= limits.OVERTRAINING_PATIENCE:
        return None
    best = _last_better(loss.values, limits.OVERTRAINING_DELTA)
    objective = history.curve(history.objective)
    if objective.steps == loss.steps and history.objective != "validation_loss":
        falling = tuple(-value for value in objective.values)
        best = max(best, _last_better(falling, limits.ACCURACY_DELTA))
    idle = len(loss.values) - 1 - best
    lowest = min(loss.values)
    if idle < limits.OVERTRAINING_PATIENCE or loss.values[-1] <= lowest + limits.OVERTRAINING_DELTA:
        return None
    rates = dict(zip(*history.curve("learning_rate"), strict=True))
    half = max(rates.values(), default=0.0) / 2
    learning = sum(rates.get(step, half) >= half for step in loss.steps[best + 1 :])
    if learning < limits.OVERTRAINING_PATIENCE and not _lost_accuracy(history):
        return None
    long = idle >= limits.OVERTRAINING_LONG and idle >= len(loss.values) / 2
    return _finding(
        "overtraining",
        "error" if long else "warning",
        f"{idle} of {len(loss.values)} epochs came after the last that helped (epoch "
        f"{loss.steps[best]}); validation loss rose from {lowest:.3g} to {loss.values[-1]:.3g}",
        f"Set training.epochs to about {loss.steps[best]}, or training.early_stop.",
        loss.steps[-1],
    )


def _lost_accuracy(history: TrainingHistory) -> bool:
    accuracy = history.curve("validation_accuracy").values
    return bool(accuracy) and max(accuracy) - accuracy[-1] > limits.ACCURACY_LOST


def learning_rate_too_high(history: TrainingHistory) -> Finding | None:
    """The loss of an epoch is far above a guess's, or it keeps jumping up."""
    loss = history.curve("train_loss")
    if not loss.values:
        return None
    reference = _reference(history)
    worst = max(loss.values)
    times = worst / reference if reference > 0 else 1.0
    if times >= limits.HIGH_LOSS_WARNING:
        severity: Severity = "error" if times >= limits.HIGH_LOSS_ERROR else "warning"
        evidence = (
            f"the training loss reached {worst:.3g}, {times_over(times)} times {_start(history)}"
        )
        step = loss.steps[loss.values.index(worst)]
    elif (share := _rising_share(history)) >= limits.HIGH_RISING_SHARE:
        severity, step = "warning", loss.steps[-1]
        evidence = f"the training loss rose by over 5 % in {share:.0%} of the epochs"
    else:
        return None
    advice = (
        "Use a learning rate ten times smaller, a larger batch, or training.warmup_fraction: 0.1."
    )
    return _finding("learning_rate_too_high", severity, _with(history, evidence), advice, step)


def learning_rate_too_low(history: TrainingHistory) -> Finding | None:
    """The loss falls steadily, in validation too, but hardly leaves where it began."""
    loss, validation = history.curve("train_loss"), history.curve("validation_loss")
    if len(loss.values) < limits.LOW_FEWEST_EPOCHS or loss.values[0] <= 0:
        return None
    left = _left(history)
    falling = sum(b < a for a, b in pairwise(loss.values))
    steady = falling >= limits.LOW_FALLING_SHARE * (len(loss.values) - 1)
    if validation.values:
        steady = steady and validation.values[-1] <= min(validation.values) * 1.001
        steady = steady and validation.values[-1] < validation.values[0]
    if left is None or not steady or not limits.LOW_LOSS_WARNING <= left <= 1.1:
        return None
    sure = left >= limits.LOW_LOSS_ERROR and history.guess_loss is not None
    evidence = (
        f"after {len(loss.values)} epochs the training loss still falls, to {loss.values[-1]:.3g}: "
        f"{left:.0%} of {_start(history)} is left"
    )
    return _finding(
        "learning_rate_too_low",
        "error" if sure else "warning",
        _with(history, evidence),
        "Use a learning rate ten times larger, a smaller batch, or more epochs.",
        loss.steps[-1],
    )


def stalled(history: TrainingHistory) -> Finding | None:
    """No epoch for half an hour, and for three times the longest one before."""
    times = history.times
    if not times:
        return None
    gaps = history.gaps()
    usual = median(gaps) if gaps else 0.0
    limit = max(limits.STALLED_SECONDS, limits.STALLED_FACTOR * max(gaps, default=0.0))
    advice = "See whether the process lives and what it waits for: disk, network or memory."
    if history.now is not None and history.now - times[-1] > limit:
        minutes = (history.now - times[-1]) / 60
        evidence = f"no epoch for {minutes:.0f} minutes; the usual one took {usual:.0f} s"
        return _finding("stalled", "error", evidence, advice, history.last_step)
    longest = max(gaps, default=0.0)
    if longest > max(limits.STALLED_SECONDS, limits.STALLED_FACTOR * usual):
        evidence = f"one epoch came {longest / 60:.0f} minutes after the last; usual: {usual:.0f} s"
        return _finding("stalled", "warning", evidence, advice, history.last_step)
    return None


def _finding(
    rule: str, severity: Severity, evidence: str, advice: str, step: int | None
) -> Finding:
    return Finding(rule=rule, severity=severity, evidence=evidence, advice=advice, step=step)


def _together(history: TrainingHistory, first: str, second: str) -> list[tuple[int, float, float]]:
    """(step, value of `first`, value of `second`) where both are known."""
    one, two = history.curve(first), history.curve(second)
    other = dict(zip(*two, strict=True))
    return [(s, v, other[s]) for s, v in zip(*one, strict=True) if s in other]


def _last_better(values: tuple[float, ...], delta: float) -> int:
    """Index of the last value that beats the best before it by more than `delta`."""
    best, index = values[0], 0
    for position, value in enumerate(values):
        if value < best - delta:
            best, index = value, position
    return index


def _rising_share(history: TrainingHistory) -> float:
    """Share of epochs whose loss is 5 % above the last one's, and not near the least."""
    loss, least = history.curve("train_loss"), _least(history)
    if len(loss.values) < limits.HIGH_FEWEST_EPOCHS:
        return 0.0
    near = least + 0.1 * (_reference(history) - least)
    pairs = list(pairwise(loss.values))
    rising = [b > a * (1 + limits.LOSS_INCREASE) and b > near for a, b in pairs]
    return sum(rising) / len(pairs)


def _left(history: TrainingHistory) -> float | None:
    """The share of a guess's loss that is left to learn: 1 for a guess, 0 for a perfect model.

    Where the least training loss is unknown, validation decides; None without that.
    """
    if _bounds_are_known(history):
        least, reference = _least(history), _reference(history)
        last = history.curve("train_loss").values[-1]
        return (last - least) / (reference - least) if reference > least else 0.0
    loss = history.curve("validation_loss").values
    accuracy = history.curve("validation_accuracy").values
    shares = []
    if loss and (reference := history.guess_loss or loss[0]) > 0:
        shares.append(loss[-1] / reference)
    if accuracy and history.num_classes and history.num_classes > 1:
        shares.append((1 - max(accuracy)) / (1 - 1 / history.num_classes))
    return min(shares, default=None)


def _bounds_are_known(history: TrainingHistory) -> bool:
    if history.train_loss_is_plain:
        return True
    return not history.mixes_images and history.training_bounds is not None


def _least(history: TrainingHistory) -> float:
    """The training loss of a perfect model."""
    bounds = history.training_bounds
    return bounds.least if bounds else 0.0


def _reference(history: TrainingHistory) -> float:
    """The training loss of a guess; where the classes are unknown the first epoch's."""
    bounds = history.training_bounds
    return bounds.guess if bounds else history.curve("train_loss").values[0]


def _start(history: TrainingHistory) -> str:
    bounds = history.training_bounds
    if bounds is None:
        return "the first epoch's"
    return f"the {bounds.guess:.3g} of guessing" + _smoothed(bounds)


def _guess(history: TrainingHistory) -> str:
    bounds = history.training_bounds
    return f"; guessing gives {bounds.guess:.3g}{_smoothed(bounds)}" if bounds else ""


def _smoothed(bounds: LossBounds) -> str:
    return f" (with smoothed labels nothing is below {bounds.least:.3g})" if bounds.least else ""


def _with(history: TrainingHistory, evidence: str) -> str:
    settings = history.settings()
    return f"{evidence} ({settings})" if settings else evidence
