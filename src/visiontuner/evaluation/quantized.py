"""What an int8 network answers beside its float32 form, on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from visiontuner.evaluation.baselines import Baseline
from visiontuner.evaluation.calibration import (
    choose_threshold,
    fit_temperature,
    match_temperature,
    probabilities_of,
)
from visiontuner.evaluation.intervals import Interval, paired_test, share_interval
from visiontuner.evaluation.report import evaluate_predictions


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a classifier's logits become answers, see `Classifier`."""

    temperature: float
    threshold: float | None
    abstains: bool


@dataclass(frozen=True, kw_only=True)
class FormAnswers:
    """Of one form for N images: logits float64 (N, C), features float64 (N, D)."""

    logits: NDArray[np.float64]
    features: NDArray[np.float64]

    def of_head(self, head: Baseline | None) -> NDArray[np.float64]:
        """The logits of another head on the features; the kept one's if None."""
        if head is None or head.weights is None or head.biases is None:
            return self.logits
        return self.features @ head.weights.T + head.biases


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answers of int8 beside those of float32 on the same validation images.

    A head that was trained on them too is replaced by one that was not; a note says so.

    Args:
        images: how many.
        agreement: share of images on which both name the same class.
        accuracy_fp32, accuracy_int8, nll_fp32, nll_int8: nll in nats an image, each with its own
            temperature.
        loss: accuracy of float32 minus that of int8, with its paired interval; a fraction.
        calibration: of the int8 form.
        notes: sentences without which the numbers mislead.
    """

    images: int
    agreement: Interval
    accuracy_fp32: Interval
    accuracy_int8: Interval
    nll_fp32: Interval
    nll_int8: Interval
    loss: Interval
    calibration: Calibration
    notes: tuple[str, ...] = ()

    @property
    def intervals(self) -> dict[str, Interval]:
        """All figures that have one, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Interval)}


def compare_forms(
    fp32: FormAnswers,
    int8: FormAnswers,
    labels: NDArray[np.int64],
    *,
    class_names: Sequence[str],
    temperatures: tuple[float, float],
    calibration: Calibration,
    head: Baseline | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Accuracy, loss and agreement of both forms.

    Args:
        labels: int64, shape (N,), N > 0.
        temperatures: of float32 and int8; with a `head` they are fitted for it.
        head: compared in the kept one's place.
    """
    a, b = fp32.of_head(head), int8.of_head(head)
    if head is not None:
        temperatures = fit_temperature(a, labels), fit_temperature(b, labels)
    before, after = (
        evaluate_predictions(
            logits=logits,
            labels=labels,
            class_names=class_names,
            temperature=temperature,
            threshold=None,
        ).metrics
        for logits, temperature in zip((a, b), temperatures, strict=True)
    )
    answer, other = a.argmax(axis=1), b.argmax(axis=1)
    return Comparison(
        images=len(labels),
        agreement=share_interval(int((answer == other).sum()), len(labels)),
        accuracy_fp32=before["accuracy"],
        accuracy_int8=after["accuracy"],
        nll_fp32=before["nll"],
        nll_int8=after["nll"],
        loss=paired_test(answer == labels, other == labels).difference,
        calibration=calibration,
        notes=tuple(notes),
    )


def calibrate_int8(
    fp32: NDArray[np.float64],
    int8: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    fitted_before: Calibration,
    wanted_precision: float | None,
) -> Calibration:
    """Temperature and threshold of the int8 form.

    Args:
        fp32, int8: the kept head's logits, float64, shape (N, C).
        labels: int64, shape (N,).
        fitted_before: of float32.
        wanted_precision: of the threshold, which is chosen anew as the temperature is; None where
            nothing was fitted on images that the head had not seen: then the probabilities follow
            the float32 ones, and the threshold stays.
    """
    if wanted_precision is None:
        target = probabilities_of(fp32, fitted_before.temperature)
        return Calibration(
            temperature=match_temperature(int8, target),
            threshold=fitted_before.threshold,
            abstains=fitted_before.abstains,
        )
    temperature = fit_temperature(int8, labels)
    chosen = choose_threshold(probabilities_of(int8, temperature), labels, wanted_precision)
    return Calibration(
        temperature=temperature, threshold=chosen.value, abstains=chosen.value is None
    )
