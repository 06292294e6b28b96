"""What a search's page says about the test pictures: an evaluation -> words and rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontuner.evaluation.report import ClassScore, EvaluationReport, Interval, Threshold

METRICS = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Accuracy among the first five answers",
    "macro_f1": "Macro F1",
    "nll": "Negative log-likelihood, after temperature",
    "nll_uncalibrated": "Negative log-likelihood, before",
    "ece": "Expected calibration error, after temperature",
    "ece_uncalibrated": "Expected calibration error, before",
}


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    label: str
    value: str
    interval: str


@dataclass(frozen=True, kw_only=True)
class TestPart:
    """Everything that the page says about the test pictures."""

    accuracy: str
    accuracy_detail: str
    summary: str
    notes: tuple[str, ...]
    metrics: tuple[MetricRow, ...]
    threshold: str
    classes: tuple[ClassScore, ...]
    pairs: tuple[Mapping[str, Any], ...]
    mistakes: tuple[Mapping[str, Any], ...]
    choice: tuple[str, ...]


def describe_test(evaluation: Mapping[str, Any]) -> TestPart:
    """Put what `evaluation/report.json` holds into words.

    Raises:
        ValueError: it is no evaluation.
    """
    from visiontuner.evaluation.report import EvaluationReport  # scipy: only where there is one

    report = EvaluationReport.from_dict(evaluation)
    accuracy = report.metrics.get("accuracy")
    return TestPart(
        accuracy=percent(accuracy.value) if accuracy else "",
        accuracy_detail=f"{_interval(accuracy)} on {report.num_pictures:,} pictures"
        if accuracy
        else "",
        summary=_summary(report, evaluation),
        notes=report.notes,
        metrics=tuple(_metric_rows(report.metrics)),
        threshold=_threshold(report.threshold) if report.threshold else "",
        classes=tuple(sorted(report.classes, key=_weakest_first)),
        pairs=tuple(_complete(evaluation.get("confused_pairs"), _PAIR)),
        mistakes=tuple(_complete(evaluation.get("mistakes"), _MISTAKE)),
        choice=tuple(_choice(evaluation)),
    )


def percent(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{decimals}%}"


_PAIR = ("true", "predicted", "count", "share")
_MISTAKE = ("path", "true", "predicted", "probability")


def _complete(rows: object, keys: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    """Rows that hold every key; another version's rows are passed over."""
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and all(key in row for key in keys):
            yield row


def _summary(report: EvaluationReport, evaluation: Mapping[str, Any]) -> str:
    looks = evaluation.get("looks") or 1
    trial = evaluation.get("trial_id") or "the best trial"
    text = f"{trial}, its probabilities calibrated on validation (T = {report.temperature:.3g})"
    if report.num_pictures:
        text += f", on {report.num_pictures:,} pictures that no choice was made with."
    else:
        text += "; no test picture was looked at."
    if looks != 1:
        text += (
            f" This was look number {looks} at these pictures: the best of several looks is too "
            "good to be true."
        )
    if evaluation.get("model"):
        text += f" Registered as {evaluation['model']}."
    return text


def _metric_rows(metrics: Mapping[str, Interval]) -> Iterable[MetricRow]:
    for name, interval in metrics.items():
        yield MetricRow(
            label=METRICS.get(name, name),
            value=_number(name, interval.value),
            interval=f"{_number(name, interval.low)} to {_number(name, interval.high)}",
        )


def _number(name: str, value: float) -> str:
    return f"{value:.3f}" if name.startswith("nll") else percent(value)


def _interval(interval: Interval) -> str:
    return f"{percent(interval.low)} to {percent(interval.high)}"


def _threshold(threshold: Threshold) -> str:
    wanted = percent(threshold.wanted_precision)
    if threshold.value is None or threshold.precision is None:
        return (
            f"A precision of {wanted} was wanted; no confidence reached it on validation with "
            "enough pictures, so every answer abstains."
            if threshold.value is None
            else f"A precision of {wanted} was wanted; no test picture reached the confidence "
            f"{threshold.value:.3f} that gave it on validation."
        )
    return (
        f"Answers with a confidence of at least {threshold.value:.3f}, chosen on validation for a "
        f"precision of {wanted}, are right in {percent(threshold.precision.value)} of the cases "
        f"({_interval(threshold.precision)}) and cover {percent(threshold.coverage.value)} of the "
        f"test pictures ({_interval(threshold.coverage)})."
    )


def _weakest_first(score: ClassScore) -> tuple[bool, float, str]:
    return math.isnan(score.f1), score.f1 if not math.isnan(score.f1) else 0.0, score.name


def _choice(evaluation: Mapping[str, Any]) -> Iterable[str]:
    """The choice with its reason, ties, and what the edges of the space suggest."""
    choice = evaluation.get("choice")
    if isinstance(choice, Mapping):
        if choice.get("reason"):
            yield str(choice["reason"])
        tied = [str(trial) for trial in choice.get("tied") or () if trial != choice.get("chosen")]
        if tied:
            yield f"Cannot be told apart from it on the validation pictures: {', '.join(tied)}."
    edges = evaluation.get("edges")
    for edge in edges if isinstance(edges, list) else ():
        yield str(edge.get("sentence", edge)) if isinstance(edge, Mapping) else str(edge)
