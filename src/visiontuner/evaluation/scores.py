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
    picture_losses,
    probabilities_of,
)
from visiontuner.evaluation.intervals import Interval, fraction_interval, percentile_interval

# Which answers were wrong, and between which classes.


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One wrong answer.

    Args:
        index: the picture's row.
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
    """Pictures of the class `true` that were taken for `predicted`.

    Args:
        share: of all pictures of the class `true`, in (0, 1].
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
        recall: NaN for a class without test pictures; so is `f1` if it was not predicted either.
        support: test pictures of the class.
        predicted: test pictures that were taken for it.
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
        coverage: on test, the fraction of pictures whose answer counts.
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
    losses = {
        "nll": picture_losses(logits, labels, temperature),
        "nll_uncalibrated": picture_losses(logits, labels),
    }
    samples = draw(np.column_stack([*hits.values(), *losses.values()]).astype(np.float64)) / total
    columns = dict(zip([*hits, *losses], samples.T, strict=True))
    return {
        **{n: fraction_interval(int(hit.sum()), total, columns[n]) for n, hit in hits.items()},
        **{n: percentile_interval(float(v.mean()), columns[n]) for n, v in losses.items()},
        "ece": _calibration_error(probabilities_of(logits, temperature), labels, draw),
        "ece_uncalibrated": _calibration_error(probabilities_of(logits), labels, draw),
    }


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
    columns = _class_columns(logits.argmax(axis=1), labels, len(class_names))
    counts = columns.sum(axis=0).reshape(3, -1)  # (hits, support, predicted) x C
    samples = draw(columns).reshape(-1, 3, len(class_names))
    with np.errstate(invalid="ignore"):  # 0 / 0 is a class without pictures: NaN
        recall, precision = counts[0] / counts[1:]
        f1 = 2 * counts[0] / counts[1:].sum(axis=0)
        drawn_recall, drawn_precision = (samples[:, 0] / samples[:, part] for part in (1, 2))
        drawn_f1 = 2 * samples[:, 0] / samples[:, 1:].sum(axis=1)
    scores = tuple(
        ClassScore(
            name=name,
            precision=float(precision[c]),
            recall=float(recall[c]),
            f1=float(f1[c]),
            support=int(counts[1, c]),
            predicted=int(counts[2, c]),
            precision_interval=_share(counts[0, c], counts[2, c], drawn_precision[:, c]),
            recall_interval=_share(counts[0, c], counts[1, c], drawn_recall[:, c]),
        )
        for c, name in enumerate(class_names)
    )
    return scores, percentile_interval(float(np.nanmean(f1)), np.nanmean(drawn_f1, axis=1))


def _class_columns(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int
) -> csr_array:
    """Which class each picture is a hit of, belongs to and was taken for: sparse, (N, 3 C)."""
    rows, hit = np.arange(len(labels)), predicted == labels
    columns = np.concatenate([labels[hit], num_classes + labels, 2 * num_classes + predicted])
    places = (np.concatenate([rows[hit], rows, rows]), columns)
    return csr_array((np.ones(len(columns)), places), shape=(len(labels), 3 * num_classes))


def _share(hits: float, total: float, samples: NDArray[np.float64]) -> Interval | None:
    return fraction_interval(int(hits), int(total), samples) if total else None


def apply_threshold(
    chosen: ChosenThreshold,
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    draw: Draw,
) -> Threshold:
    answered = probabilities.max(axis=1) >= (math.inf if chosen.value is None else chosen.value)
    right = answered & (probabilities.argmax(axis=1) == labels)
    drawn = draw(np.column_stack([answered, right]).astype(np.float64))
    with np.errstate(invalid="ignore"):
        precisions = drawn[:, 1] / drawn[:, 0]
    coverage = fraction_interval(int(answered.sum()), len(labels), drawn[:, 0] / len(labels))
    if chosen.value is None:  # not a measurement: it will be so for every picture
        coverage = Interval(value=0.0, low=0.0, high=0.0)
    return Threshold(
        wanted_precision=chosen.wanted_precision,
        value=chosen.value,
        validation_precision=chosen.precision,
        validation_coverage=chosen.coverage,
        precision=_share(right.sum(), answered.sum(), precisions),
        coverage=coverage,
    )
