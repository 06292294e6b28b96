"""Runs that MLflow holds, as histories for the diagnostic rules: visiontuner's or any tool's."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlflow.entities import Metric, RunTag

from visiontuner.data.files import temporary_folder
from visiontuner.evaluation.compare import RunSummary
from visiontuner.journal import Finding
from visiontuner.tracking.client import Store
from visiontuner.tracking.reading import PARENT, Reader
from visiontuner.tracking.runs import findings_text
from visiontuner.training.recording.records import RECORDING_FILE, Recording, find_recording
from visiontuner.training.rules import Curve, TrainingHistory

_ADVICE = "Try again later, or name a search folder: that needs no MLflow."

# Names that Keras, Lightning, transformers, fastai and ultralytics log under, after `_plain`.
_METRICS: Mapping[str, tuple[str, ...]] = {
    "train_loss": (
        *("train_loss", "training_loss", "loss", "train_loss_epoch", "loss_train", "loss_epoch"),
        "train_cls_loss",
    ),
    "validation_loss": (
        *("validation_loss", "val_loss", "valid_loss", "eval_loss", "loss_val", "val_loss_epoch"),
        "val_cls_loss",
    ),
    "train_accuracy": (
        *("train_accuracy", "training_accuracy", "train_acc", "accuracy", "acc"),
        *("train_acc_epoch", "train_accuracy_epoch", "acc_train", "categorical_accuracy"),
    ),
    "validation_accuracy": (
        *("validation_accuracy", "val_accuracy", "val_acc", "valid_acc", "valid_accuracy"),
        *("eval_accuracy", "acc_val", "val_acc_epoch", "val_categorical_accuracy"),
        "metrics_accuracy_top1",
    ),
    "gradient_norm": ("gradient_norm", "grad_norm", "train_grad_norm", "global_norm"),
}
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("learning_rate", "lr", "lr0", "opt_lr", "training_learning_rate"),
    "batch_size": (
        *("batch_size", "train_batch_size", "per_device_train_batch_size", "bs", "batch"),
        "training_batch_size",
    ),
    "class_weights": ("training_class_weights",),
    "label_smoothing": (
        *("label_smoothing", "smoothing", "label_smoothing_factor"),
        "training_label_smoothing",
    ),
    "mixup": ("mixup", "mixup_alpha", "training_augmentation_mixup"),
    "cutmix": ("cutmix", "cutmix_alpha", "training_augmentation_cutmix"),
    "micro_batch_size": ("training_micro_batch_size",),
    "freeze_batch_norm": ("training_freeze_batch_norm",),
}
_WORDS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """One run of MLflow and its recorded numbers.

    Attributes:
        known: names of its metrics that the rules understand, as the run has them.
        findings: rules that fired earlier, from the run's tag.
        own: visiontuner made it.
    """

    name: str
    run_id: str
    state: str
    history: TrainingHistory
    known: tuple[str, ...]
    metrics: tuple[str, ...]
    findings: tuple[str, ...]
    own: bool

    @property
    def running(self) -> bool:
        return self.history.now is not None


def read_histories(tracking_uri: str, target: str) -> list[RunHistory]:
    """The runs that a target means, oldest first; a parent run means its children.

    Args:
        target: whatever `Reader.runs` takes: a run id, an experiment's or a search's name, a model.

    Raises:
        UserMistake: MLflow holds nothing of that name.
        TrackingError: MLflow is away or refuses.
    """
    summaries = Reader(tracking_uri, advice=_ADVICE).runs(target)
    store, classes = Store(tracking_uri, advice=_ADVICE), _Classes()
    return [_read(store, summary, classes) for summary in summaries]


def read_history(tracking_uri: str, run_id: str) -> TrainingHistory:
    """The history of one run; the same errors as `read_histories`."""
    found = read_histories(tracking_uri, run_id)
    return next((r.history for r in found if r.run_id == run_id), TrainingHistory())


def write_findings(tracking_uri: str, run_id: str, findings: Sequence[Finding]) -> None:
    """Put findings on a run: the tag `visiontuner.findings` and the artifact `findings.json`.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    store = Store(tracking_uri, advice=_ADVICE)
    names = ", ".join(sorted({finding.rule for finding in findings}))
    store.call("log_batch", run_id, tags=[RunTag("visiontuner.findings", names)])
    store.call("log_text", run_id, findings_text(findings), "findings.json")


class _Classes:
    """How many classes a search had, asked once a search."""

    def __init__(self) -> None:
        self._known: dict[str, int | None] = {}

    def of(self, store: Store, summary: RunSummary) -> int | None:
        if not summary.search_id:
            return None
        if summary.search_id not in self._known:
            parent_id = store.call("get_run", summary.run_id).data.tags.get(PARENT)
            parent = store.call("get_run", parent_id) if parent_id else None
            self._known[summary.search_id] = _number_of_classes(parent)
        return self._known[summary.search_id]


def _number_of_classes(parent: Any) -> int | None:
    """From the dataset entry of a search's run."""
    try:
        return int(json.loads(parent.inputs.dataset_inputs[0].dataset.profile)["classes"]) or None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _read(store: Store, summary: RunSummary, classes: _Classes) -> RunHistory:
    names = _match(_METRICS, summary.metrics)
    points = {
        ours: _in_order(store.call("get_metric_history", summary.run_id, theirs))
        for ours, theirs in names.items()
    }
    timed = points.get("validation_loss") or points.get("train_loss") or []
    history = TrainingHistory(
        metrics=_curves(points),
        configuration=_configuration(summary.params),
        objective=summary.objective or "validation_accuracy",
        num_classes=classes.of(store, summary),
        times=() if _is_resumed(store, summary) else _times(timed),
        now=time.time() if summary.state == "running" else None,
        error=summary.reason or None,
        recording=_recording(store, summary) if summary.search_id else None,
    )
    return RunHistory(
        name=summary.run,
        run_id=summary.run_id,
        state=summary.state,
        history=history,
        known=tuple(names.values()),
        metrics=tuple(sorted(summary.metrics)),
        findings=summary.findings,
        own=bool(summary.search_id),
    )


def _is_resumed(store: Store, summary: RunSummary) -> bool:
    """Whether a trial had several attempts: MLflow does not hold when the breaks between were."""
    if not summary.search_id:
        return False
    tags = store.call("get_run", summary.run_id).data.tags
    return bool(tags.get("visiontuner.attempt", "1") != "1")


def _times(points: Sequence[Metric]) -> tuple[float, ...]:
    return tuple(point.timestamp / 1000 for point in points)


def _recording(store: Store, summary: RunSummary) -> Recording | None:
    """What a trial's run holds of it as an artifact."""
    if not any(
        file.path == RECORDING_FILE for file in store.call("list_artifacts", summary.run_id)
    ):
        return None
    with temporary_folder() as folder:
        store.download(f"runs:/{summary.run_id}/{RECORDING_FILE}", folder)
        return find_recording(folder)


def _match(wanted: Mapping[str, tuple[str, ...]], given: Iterable[str]) -> dict[str, str]:
    """Our name -> the name it has there; the first spelling of a list that is there wins."""
    plain = {_plain(name): name for name in sorted(given, reverse=True)}
    found = {
        ours: next((plain[spelling] for spelling in spellings if spelling in plain), None)
        for ours, spellings in wanted.items()
    }
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _plain(name: str) -> str:
    """`train/Loss`, `train loss` and `train_loss` are one name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _in_order(points: Iterable[Metric]) -> list[Metric]:
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    if len({point.step for point in ordered}) == 1:
        return ordered  # a tool that counts no steps
    return list({point.step: point for point in ordered}.values())


def _curves(points: Mapping[str, Sequence[Metric]]) -> dict[str, Curve]:
    """Curves with one point an epoch: those logged every step are averaged to fit validation's."""
    epochs = len(points.get("validation_loss") or points.get("validation_accuracy") or ())
    finer = {name for name, held in points.items() if 2 <= epochs < len(held) / 2}
    return {
        name: _averaged([_value(p) for p in held], epochs) if name in finer else _curve(held)
        for name, held in points.items()
    }


def _curve(points: Sequence[Metric]) -> Curve:
    """Points as epochs from 1, whatever the tool counted."""
    return Curve(tuple(range(1, len(points) + 1)), tuple(_value(point) for point in points))


def _value(point: Metric) -> float:
    """As it was logged: MLflow's databases hold infinity as the largest number there is."""
    value = float(point.value)
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _averaged(values: Sequence[float], parts: int) -> Curve:
    edges = [round(part * len(values) / parts) for part in range(parts + 1)]
    pieces = [values[a:b] for a, b in pairwise(edges)]
    return Curve(tuple(range(1, parts + 1)), tuple(sum(piece) / len(piece) for piece in pieces))


def _configuration(params: Mapping[str, object]) -> dict[str, object]:
    """What the rules look at, under the names of an experiment's `training`."""
    names = _match(_SETTINGS, params)
    found = {ours: _plain_value(str(params[theirs])) for ours, theirs in names.items()}
    mixing = {name: found.pop(name) for name in ("mixup", "cutmix") if name in found}
    return {**found, "augmentation": mixing} if mixing else found


def _plain_value(text: str) -> object:
    """A number, a truth value or None as MLflow's parameters spell it; else the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text
