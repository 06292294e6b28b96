"""From test predictions to the numbers of one evaluation, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from visiontuner.evaluation.calibration import ChosenThreshold, probabilities_of
from visiontuner.evaluation.intervals import Interval, resampled_sums
from visiontuner.evaluation.scores import (
    METRICS,
    ClassScore,
    Threshold,
    apply_threshold,
    score_answers,
    score_classes,
)

_FEW_IMAGES = 30
_NAMES_IN_A_NOTE = 5


def image_count(report: Mapping[str, Any]) -> int | None:
    """How many test images a `report.json` is about, one of an earlier version included."""
    count: int | None = report.get("num_images", report.get("num_pictures"))
    return count


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport:
    """Everything that the test images say about one classifier.

    Args:
        temperature: by which logits were divided.
        metrics: accuracy, top5_accuracy (from 6 classes on), macro_f1, nll and nll_uncalibrated
            (nats an image), ece and ece_uncalibrated.
        confusion: int64, shape (C, C); rows are true classes, columns predicted ones.
        notes: sentences without which the numbers mislead.
    """

    class_names: tuple[str, ...]
    num_images: int
    temperature: float
    metrics: dict[str, Interval]
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    threshold: Threshold | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes null."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`; other keys are passed over.

        Raises:
            ValueError: it is no evaluation, or one of another form.
        """
        try:
            return cls(
                class_names=tuple(raw["class_names"]),
                num_images=int(raw["num_images"] if "num_images" in raw else raw["num_pictures"]),
                temperature=float(raw["temperature"]),
                metrics={str(k): _metric(v) for k, v in raw["metrics"].items()},
                classes=tuple(_class_score(score) for score in raw["classes"]),
                confusion=np.array(raw["confusion"], dtype=np.int64),
                threshold=_threshold(raw["threshold"]),
                notes=tuple(raw["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no evaluation ({type(error).__name__}: {error})") from None


def evaluate_predictions(
    *,
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    temperature: float,
    threshold: ChosenThreshold | None,
    notes: Sequence[str] = (),
    of: str = "test",
    seed: int = 7,
    resamples: int = 1000,
) -> EvaluationReport:
    """Score the answers to test images.

    Args:
        logits: float, shape (N, C), as the network gave them; finite.
        labels: int, shape (N,), values in [0, C).
        class_names: C names, in the order of the logits.
        temperature: fitted on validation.
        threshold: chosen on validation, on probabilities with this temperature; None: none wanted.
        notes: sentences that come first, such as `calibration_notes`.
        of: which images they are, for sentences; empty for any.
        resamples: of the bootstrap; 10,000 images of 133 classes take some seconds with 1,000.

    Raises:
        ValueError: no images, or shapes, labels or logits that break the rules above.
    """
    answers, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    _check(answers, truth, class_names, temperature)
    draw = partial(resampled_sums, seed=seed, resamples=resamples)
    confusion = np.zeros((len(class_names),) * 2, dtype=np.int64)
    np.add.at(confusion, (truth, answers.argmax(axis=1)), 1)
    metrics = score_answers(answers, truth, temperature, draw)
    classes, metrics["macro_f1"] = score_classes(class_names, answers, truth, draw)
    on_test = None
    if threshold is not None:
        on_test = apply_threshold(threshold, probabilities_of(answers, temperature), truth)
    return EvaluationReport(
        class_names=tuple(class_names),
        num_images=len(labels),
        temperature=float(temperature),
        metrics={name: metrics[name] for name in METRICS if name in metrics},
        classes=classes,
        confusion=confusion,
        threshold=on_test,
        notes=(*notes, *_notes(classes, metrics["accuracy"], on_test, of)),
    )


def _check(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    temperature: float,
) -> None:
    if not len(labels):
        raise ValueError("cannot score an empty split")
    if logits.shape != (len(labels), len(class_names)):
        raise ValueError(
            f"logits must have the shape {(len(labels), len(class_names))}, one row an image and "
            f"one column a class, got {logits.shape}"
        )
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"labels must be in [0, {len(class_names)}), got {labels.max()}")
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be > 0, got {temperature}")


def _notes(
    classes: Sequence[ClassScore], accuracy: Interval, threshold: Threshold | None, of: str
) -> list[str]:
    notes = []
    image = f"{of} image".strip()
    where = f"on {of}" if of else "here"
    total = sum(score.support for score in classes)
    if total < _FEW_IMAGES:
        notes.append(f"Only {_count(total, image)}: no number here means much.")
    if accuracy.value in (0.0, 1.0):
        how = "correctly" if accuracy.value else "wrongly"
        notes.append(
            f"Every {image} was classified {how}: no resample differs, so intervals other than "
            "those of accuracy, precision and recall have no width or too little."
        )
    present = [score.name for score in classes if score.support]
    absent = [score.name for score in classes if not score.support]
    if len(present) == 1:
        notes.append(f"All {image}s are of one class, {present[0]}.")
    if absent:
        notes.append(f"No {image}s of {_names(absent)}: recall is unknown there.")
    unused = [score.name for score in classes if not score.predicted and score.support]
    if unused:
        notes.append(f"Never predicted {where}: {_names(unused)}.")
    return notes + ([] if threshold is None else _threshold_notes(threshold, image, where))


def abstention_notes(threshold: ChosenThreshold | Threshold | None) -> list[str]:
    """What has to be said where no confidence gave the wanted precision on validation."""
    if threshold is None or threshold.value is not None:
        return []
    return [
        f"Validation cannot show a precision of {threshold.wanted_precision:g} at any confidence: "
        "every answer abstains. Ask for less, or add validation images."
    ]


def _threshold_notes(threshold: Threshold, image: str, where: str) -> list[str]:
    wanted = f"{threshold.wanted_precision:g}"
    if threshold.value is None:
        return abstention_notes(threshold)
    if threshold.precision is None:
        return [f"No {image} reaches the threshold {threshold.value:.3f}."]
    if threshold.precision.high < threshold.wanted_precision:
        return [f"The threshold was to give a precision of {wanted}; {where} it does not."]
    return []


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _names(names: Sequence[str]) -> str:
    if len(names) <= _NAMES_IN_A_NOTE:
        return ", ".join(names)
    shown = ", ".join(names[:_NAMES_IN_A_NOTE])
    return f"{len(names):,} classes ({shown}, …)"


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as JSON has them."""
    if is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(raw: Mapping[str, Any] | None) -> Interval | None:
    return None if raw is None else Interval(**{k: float(raw[k]) for k in ("value", "low", "high")})


def _metric(raw: Mapping[str, Any]) -> Interval:
    return Interval(value=float(raw["value"]), low=float(raw["low"]), high=float(raw["high"]))


def _class_score(raw: Mapping[str, Any]) -> ClassScore:
    return ClassScore(
        name=str(raw["name"]),
        **{name: _number(raw[name]) for name in ("precision", "recall", "f1")},
        support=int(raw["support"]),
        predicted=int(raw["predicted"]),
        precision_interval=_interval(raw.get("precision_interval")),
        recall_interval=_interval(raw.get("recall_interval")),
    )


def _threshold(raw: Mapping[str, Any] | None) -> Threshold | None:
    if raw is None:
        return None
    return Threshold(
        wanted_precision=float(raw["wanted_precision"]),
        value=None if raw["value"] is None else float(raw["value"]),
        validation_precision=_number(raw["validation_precision"]),
        validation_coverage=_number(raw["validation_coverage"]),
        precision=_interval(raw["precision"]),
        coverage=_metric(raw["coverage"]),
    )


def _number(raw: float | None) -> float:
    return math.nan if raw is None else float(raw)
