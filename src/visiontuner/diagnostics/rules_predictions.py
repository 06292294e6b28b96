"""Rules on classes and on what the best epoch said about the validation images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from visiontuner.diagnostics import thresholds as limits
from visiontuner.diagnostics.history import Predictions, TrainingHistory
from visiontuner.journal import Finding, Severity

_NAMED = 5


def class_imbalance(history: TrainingHistory) -> Finding | None:
    """One class has over ten times another's training images; an error where it shows.

    It shows where over 70 % of a rare class's validation images get another name.
    """
    if not _is_imbalanced(history):
        return None
    counts = np.asarray(history.class_counts)
    rare = np.flatnonzero((counts > 0) & (counts * limits.IMBALANCE_RATIO < counts.max()))
    missed = _missed(history.predictions, rare)
    if not missed and history.configuration.get("class_weights") == "balanced":
        return None
    fewest = int(rare[counts[rare].argmin()])
    evidence = (
        f"{_name(history, int(counts.argmax()))} has {counts.max()} training images, "
        f"{_name(history, fewest)} has {counts[fewest]}"
    )
    if missed:
        worst = max(missed, key=lambda label: missed[label])
        evidence += (
            f"; {len(missed)} of {len(rare)} rare classes are mostly missed, "
            f"{_name(history, worst)} in {missed[worst]:.0%} of its validation images"
        )
    return Finding(
        rule="class_imbalance",
        severity="error" if missed else "warning",
        evidence=evidence,
        advice="Add images of the rare classes, or set training.class_weights: balanced; judge "
        "by validation_macro_f1.",
    )


def class_not_predicted(history: TrainingHistory) -> Finding | None:
    """A class that is in the validation images, and that the model names for none of them.

    Not in a trial that learned little: see `learning_rate_to_blame`.
    """
    return None if _says_nothing_of_the_data(history) else _class_never_named(history)


def _class_never_named(history: TrainingHistory) -> Finding | None:
    predictions = history.predictions
    if predictions is None or len(predictions.class_names) < 2:
        return None
    support = predictions.support()
    named = np.bincount(predictions.predicted, minlength=len(support))
    never = np.flatnonzero((named == 0) & (support > 0))
    if not len(never):
        return None
    # A class recalled like the others would be missed every time with this probability.
    luck = (1 - predictions.accuracy) ** float(support[never].max())
    sure = luck < limits.LUCK / len(support)
    shown = ", ".join(_described(history, predictions, int(c)) for c in never[:_NAMED])
    more = f" and {len(never) - _NAMED} more" if len(never) > _NAMED else ""
    return Finding(
        rule="class_not_predicted",
        severity="error" if sure else "warning",
        evidence=f"never predicted: {shown}{more}",
        advice="See that these classes have training images with right labels, and as many as "
        "others.",
    )


def label_noise(history: TrainingHistory) -> Finding | None:
    """The model is sure that many labels are wrong, or the labels say nothing about the images.

    The second: training images are learned by heart while validation stays as good as guessing.
    Not in a trial that learned little: see `learning_rate_to_blame`.

    Source: that confident disagreement points at wrong labels, Northcutt et al. 2021,
    https://arxiv.org/abs/1911.00068
    """
    if history.far_from_best:
        return None
    certain = _labels_say_nothing(history)
    return certain or (None if history.stopped_early else _confident_disagreement(history))


def learning_rate_to_blame(history: TrainingHistory) -> Finding | None:
    """What looks like bad data in a trial that is far from its search's best: the settings are bad.

    Said of a trial that ran to its end, where another rule would say that a class is never
    predicted or that labels are wrong.
    """
    best = history.best
    if best is None or history.stopped_early or not history.far_from_best:
        return None
    blamed = _class_never_named(history) or _confident_disagreement(history)
    if blamed is None:
        return None
    accuracy, loss = (history.curve(f"validation_{name}") for name in ("accuracy", "loss"))
    rate = "" if best.learning_rate is None else f" with learning rate {best.learning_rate:.3g}"
    settings = f" ({history.settings()})" if history.settings() else ""
    return Finding(
        rule="learning_rate_to_blame",
        severity="info",
        evidence=f"{blamed.evidence}; but accuracy {max(accuracy.values):.3f} and loss "
        f"{min(loss.values):.3g}{settings}, where another trial{rate} reached "
        f"{best.accuracy:.3f}, and {best.loss:.3g} is the lowest loss",
        advice="Judge the data by the best trials: here the learning rate explains it.",
        step=accuracy.steps[-1],
    )


def _says_nothing_of_the_data(history: TrainingHistory) -> bool:
    return history.stopped_early or history.far_from_best


def _labels_say_nothing(history: TrainingHistory) -> Finding | None:
    train, valid = history.curve("train_loss"), history.curve("validation_loss")
    accuracy = history.curve("validation_accuracy")
    guess, classes = history.guess_loss, history.num_classes
    if guess is None or classes is None or _is_imbalanced(history):
        return None
    if len(train.values) < limits.LOSS_FEWEST_EPOCHS or not valid.values or not accuracy.values:
        return None
    bounds = history.training_bounds
    least = bounds.least if bounds else 0.0
    start = min(train.values[0], bounds.guess if bounds else guess) - least
    memorised = train.values[-1] - least <= limits.MEMORISED_LOSS * start
    guessing = (
        min(valid.values) >= limits.GUESS_LOSS * guess
        and accuracy.values[-1] <= limits.GUESS_ACCURACY / classes
        and accuracy.values[-1] < 0.5
    )
    if not (memorised and guessing):
        return None
    return Finding(
        rule="label_noise",
        severity="error",
        evidence=f"the training loss fell from {train.values[0]:.3g} to {train.values[-1]:.3g}, "
        f"validation stayed at guessing: accuracy {accuracy.values[-1]:.3f} of {classes} classes",
        advice="Look at some images with their labels: they do not seem to belong together.",
        step=accuracy.steps[-1],
    )


def _confident_disagreement(history: TrainingHistory) -> Finding | None:
    predictions = history.predictions
    if predictions is None or not len(predictions.labels):
        return None
    rows = np.arange(len(predictions.labels))
    of_label = predictions.probabilities[rows, predictions.labels]
    loss = -float(np.log(np.clip(of_label, 1e-30, 1)).mean())
    if predictions.accuracy < limits.NOISE_ACCURACY or loss > np.log(len(predictions.class_names)):
        return None  # a model that knows little, or is sure of everything, cannot judge labels
    doubtful = of_label < limits.CONFIDENT_SHARE_OF_GUESS / len(predictions.class_names)
    count, share = int(doubtful.sum()), float(doubtful.mean())
    if count < limits.FEWEST_IMAGES or share < limits.NOISE_WARNING:
        return None
    severity: Severity = "error" if share >= limits.NOISE_ERROR else "warning"
    worst = np.bincount(predictions.labels[doubtful], minlength=len(predictions.class_names))
    return Finding(
        rule="label_noise",
        severity=severity,
        evidence=f"the model is sure that {count} of {len(rows)} validation labels ({share:.0%}) "
        f"are wrong, most often {predictions.class_names[int(worst.argmax())]}",
        advice="Look at the most confident mistakes (`visiontuner evaluate FOLDER`) and correct "
        "labels.",
    )


def _is_imbalanced(history: TrainingHistory) -> bool:
    present = [count for count in history.class_counts if count]
    return len(present) > 1 and max(present) > limits.IMBALANCE_RATIO * min(present)


def _missed(predictions: Predictions | None, classes: NDArray[np.int64]) -> dict[int, float]:
    """By class: the share of its validation images with another name, where it is too high."""
    if predictions is None:
        return {}
    wrong = predictions.predicted != predictions.labels
    found = {}
    for label in map(int, classes):
        rows = predictions.labels == label
        if rows.sum() >= limits.FEWEST_IMAGES and wrong[rows].mean() > limits.MISPREDICTION:
            found[label] = float(wrong[rows].mean())
    return found


def _described(history: TrainingHistory, predictions: Predictions, label: int) -> str:
    images = f"{predictions.support()[label]} validation images"
    if len(history.class_counts) == len(predictions.class_names):
        images += f", {history.class_counts[label]} for training"
    return f"{predictions.class_names[label]} ({images})"


def _name(history: TrainingHistory, label: int) -> str:
    return history.class_names[label] if label < len(history.class_names) else f"class {label}"
