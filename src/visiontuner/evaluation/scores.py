"""The scores of test answers, each with its interval: of all, of every class, above a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from visiontuner.evaluation.calibration import (
    ChosenThreshold,
    bin_of,
    expected_calibration_error,
    image_losses,
    probabilities_of,
)
from visiontuner.evaluation.intervals import (
    Interval,
    percentile_interval,
    share_interval,
    studentised_interval,
)

# Which answers were wrong, and between which classes.


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One wrong answer.

    Args:
        index: the image's row.
        true, predicted: class names.
        probability: of the predicted class, in [0, 1].
        true_probability: of the true class.
    """

    index: int
    true: str
    predicted: str
    probability: float
    true_probability: float


def confident_mistakes(
    probabilities: NDArray[np.floating],
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    count: int = 24,
) -> list[Mistake]:
    """The wrong answers that were given with the highest probability, highest first.

    Args:
        probabilities: float, shape (N, C), calibrated.
        labels: int, shape (N,), values in [0, C).
        count: at most so many.
    """
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")
    return [
        Mistake(
            index=int(i),
            true=class_names[labels[i]],
            predicted=class_names[predicted[i]],
            probability=float(probabilities[i, predicted[i]]),
            true_probability=float(probabilities[i, labels[i]]),
        )
        for i in wrong[order][:count]
    ]


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Images of the class `true` that were taken for `predicted`.

    Args:
        share: of all images of the class `true`, in (0, 1].
    """

    true: str
    predicted: str
    count: int
    share: float


def confused_pairs(
    confusion: NDArray[np.integer], class_names: Sequence[str], count: int = 15
) -> list[ConfusedPair]:
    """The most frequent confusions, most frequent first; of equals the larger share, then by name.

    Args:
        confusion: int, shape (C, C); rows are true classes, columns predicted ones.
        count: at most so many.
    """
    support = confusion.sum(axis=1)
    pairs = [
        ConfusedPair(
            true=class_names[true],
            predicted=class_names[predicted],
            count=int(confusion[true, predicted]),
            share=float(confusion[true, predicted] / support[true]),
        )
        for true, predicted in np.argwhere(confusion > 0)
        if true != predicted
    ]
    pairs.sort(key=lambda pair: (-pair.count, -pair.share, pair.true, pair.predicted))
    return pairs[:count]


METRICS = (
    "accuracy",
    "top5_accuracy",
    "macro_f1",
    "nll",
    "nll_uncalibrated",
    "ece",
    "ece_uncalibrated",
)
CALIBRATION_BINS = 15
_TOP = 5

Draw = Callable[[NDArray[np.float64] | csr_array], NDArray[np.float64]]
"""`bootstrap.resampled_sums` with its seed: columns (N, K) -> sums (resamples, K)."""


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class on test; fractions in [0, 1].

    Args:
        precision: NaN for a class that was never predicted.
        recall: NaN for a class without test images; so is `f1` if it was not predicted either.
        support: test images of the class.
        predicted: test images that were taken for it.
        precision_interval, recall_interval: None where the value is NaN.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int
    precision_interval: Interval | None = None
    recall_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What a confidence threshold that was chosen on validation is worth on test.

    Args:
        value: None: the wanted precision was not reached on validation, so every answer abstains.
        precision: on test, of the answers that count; None if none does.
        coverage: on test, the fraction of images whose answer counts.
    """

    wanted_precision: float
    value: float | None
    validation_precision: float
    validation_coverage: float
    precision: Interval | None
    coverage: Interval


def score_answers(
    logits: NDArray[np.float64], labels: NDArray[np.int64], temperature: float, draw: Draw
) -> dict[str, Interval]:
    total = len(labels)
    hits = {"accuracy": logits.argmax(axis=1) == labels}
    if logits.shape[1] > _TOP:
        best = np.argsort(-logits, axis=1, kind="stable")[:, :_TOP]
        hits["top5_accuracy"] = (best == labels[:, None]).any(axis=1)
    return {
        **{name: share_interval(int(hit.sum()), total) for name, hit in hits.items()},
        "nll": _mean_loss(logits, labels, temperature, draw),
        "nll_uncalibrated": _mean_loss(logits, labels, 1.0, draw),
        "ece": _calibration_error(probabilities_of(logits, temperature), labels, draw),
        "ece_uncalibrated": _calibration_error(probabilities_of(logits), labels, draw),
    }


def _mean_loss(
    logits: NDArray[np.float64], labels: NDArray[np.int64], temperature: float, draw: Draw
) -> Interval:
    """The mean loss; its standard error is at least what the probabilities themselves imply.

    Most of the loss is in rare mistakes, and a few images may hold none of them. The
    probabilities say how often to expect one, and what it costs.
    """
    losses, total = image_losses(logits, labels, temperature), len(labels)
    value, error = float(losses.mean()), math.sqrt(losses.var() / max(total - 1, 1))
    if not error:  # all images alike: no resample differs
        return Interval(value=value, low=value, high=value)
    means, squares = (draw(np.column_stack([losses, losses**2])) / total).T
    errors = np.sqrt(np.maximum(squares - means**2, 0) / (total - 1))
    expected, variance = _expected_losses(probabilities_of(logits, temperature))
    implied = math.sqrt((variance.mean() + expected.var()) / total)
    return studentised_interval(value, error, means, errors, implied_error=implied)


def _expected_losses(
    probabilities: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each image's loss, shape (N,), if labels follow the probabilities."""
    losses = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    expected = (probabilities * losses).sum(axis=1)
    variance = (probabilities * (losses - expected[:, None]) ** 2).sum(axis=1)
    return expected, variance


def _calibration_error(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], draw: Draw
) -> Interval:
    """`expected_calibration_error` with its interval: a sum over bins of |right - confident|."""
    confidence = probabilities.max(axis=1)
    gaps = np.zeros((len(labels), CALIBRATION_BINS))
    correct = probabilities.argmax(axis=1) == labels
    gaps[np.arange(len(labels)), bin_of(confidence, CALIBRATION_BINS)] = correct - confidence
    return percentile_interval(
        expected_calibration_error(probabilities, labels, CALIBRATION_BINS),
        np.abs(draw(gaps)).sum(axis=1) / len(labels),
    )


def score_classes(
    class_names: Sequence[str], logits: NDArray[np.float64], labels: NDArray[np.int64], draw: Draw
) -> tuple[tuple[ClassScore, ...], Interval]:
    """Every class's scores, and macro F1: their mean over classes that occur or are predicted."""
    predicted, classes = logits.argmax(axis=1), len(class_names)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    support, answers = (np.bincount(rows, minlength=classes) for rows in (labels, predicted))
    with np.errstate(invalid="ignore"):  # 0 / 0 is a class without images: NaN
        precision, recall, f1 = hits / answers, hits / support, 2 * hits / (support + answers)
    scores = tuple(
        ClassScore(
            name=name,
            precision=float(precision[c]),
            recall=float(recall[c]),
            f1=float(f1[c]),
            support=int(support[c]),
            predicted=int(answers[c]),
            precision_interval=_share(hits[c], answers[c]),
            recall_interval=_share(hits[c], support[c]),
        )
        for c, name in enumerate(class_names)
    )
    return scores, _macro_f1(predicted, labels, classes, draw)


def macro_f1(predicted: NDArray[np.integer], labels: NDArray[np.integer]) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); classes that occur in neither are left out.

    Args:
        predicted, labels: int, shape (N,).
    """
    hits = np.bincount(labels[predicted == labels], minlength=int(max(*predicted, *labels)) + 1)
    seen = np.bincount(labels, minlength=len(hits)) + np.bincount(predicted, minlength=len(hits))
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def _macro_f1(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int, draw: Draw
) -> Interval:
    """Images of one class with one answer are alike, so their numbers are all there is to draw.

    Without a mistake, or with nothing else, no resample differs. There it has the ends of the
    accuracy's interval.
    """
    pairs, of = np.unique(np.stack([labels, predicted]), axis=1, return_inverse=True)
    one_each = csr_array(
        (np.ones(len(of)), (np.arange(len(of)), of)), shape=(len(of), pairs.shape[1])
    )
    value, error = _f1_and_error(one_each.sum(axis=0)[None], pairs, num_classes)
    accuracy = share_interval(int((predicted == labels).sum()), len(labels))
    if accuracy.value in (0.0, 1.0):
        return accuracy
    samples, errors = _f1_and_error(draw(one_each), pairs, num_classes)
    if not error[0]:  # every class wholly right or wholly wrong
        return percentile_interval(float(value[0]), samples)
    return studentised_interval(float(value[0]), float(error[0]), samples, errors, highest=1.0)


def _f1_and_error(
    counts: NDArray[np.float64], pairs: NDArray[np.int64], num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Macro F1 and its standard error by the delta method, each of shape (R,).

    Args:
        counts: float64, shape (R, K), images of each pair.
        pairs: int64, shape (2, K), label and answer.
    """
    number, hit = np.arange(pairs.shape[1]), pairs[0] == pairs[1]
    shape = (pairs.shape[1], num_classes)
    hits = csr_array((np.ones(hit.sum()), (number[hit], pairs[0, hit])), shape=shape)
    # An image counts in the support of its class, and among the answers of the one it was given.
    sides = csr_array((np.ones(pairs.size), (np.tile(number, 2), pairs.ravel())), shape=shape)
    size = counts @ sides  # (R, C), 2 TP + FP + FN
    present = np.maximum((size > 0).sum(axis=1, keepdims=True), 1)
    size = np.maximum(size, 1)
    f1 = 2 * (counts @ hits) / size
    # What one more image of a pair changes, (R, K).
    change = ((2 / size) @ hits.T - (f1 / size) @ sides.T) / present
    variance = (counts * change**2).sum(axis=1)
    return f1.sum(axis=1) / present[:, 0], np.sqrt(variance)


def _share(hits: float, total: float) -> Interval | None:
    return share_interval(int(hits), int(total)) if total else None


def apply_threshold(
    chosen: ChosenThreshold,
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
) -> Threshold:
    answered = probabilities.max(axis=1) >= (math.inf if chosen.value is None else chosen.value)
    right = answered & (probabilities.argmax(axis=1) == labels)
    coverage = share_interval(int(answered.sum()), len(labels))
    if chosen.value is None:  # not a measurement: it will be so for every image
        coverage = Interval(value=0.0, low=0.0, high=0.0)
    return Threshold(
        wanted_precision=chosen.wanted_precision,
        value=chosen.value,
        validation_precision=chosen.precision,
        validation_coverage=chosen.coverage,
        precision=_share(right.sum(), answered.sum()),
        coverage=coverage,
    )
