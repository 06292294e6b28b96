"""Runs that MLflow holds, read as summaries and as histories for the diagnostic rules."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlflow.entities import Metric, Run, RunTag, ViewType

from visiontuner.diagnostics.history import (
    RECORDING_FILE,
    Curve,
    Recording,
    TrainingHistory,
    find_recording,
)
from visiontuner.errors import TrackingError, UserMistake
from visiontuner.evaluation.compare import RunSummary
from visiontuner.io.files import temporary_folder
from visiontuner.journal import Finding
from visiontuner.text import without_secrets
from visiontuner.tracking.run_plans import KIND, SEARCH_ID, STATE, TRIAL_ID
from visiontuner.tracking.store import Store, TrackingRefused, deleted_experiment, findings_text

# What MLflow holds of runs, as summaries: of visiontuner's and of any other tool.
#
# A table needs no metric histories: one search brings parameters, tags and last values of hundreds
# of runs. Curves are fetched run by run, for those that are drawn.


PARENT = "mlflow.parentRunId"
_ADVICE = "Try again later, or compare search folders: they need no MLflow."
_MODEL = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
# Hundreds of runs are a second's work for a server, and one call may take three.
_PAGE, _PAGE_OF_A_SERVER = 1000, 200


class Reader:
    """Reads runs from one MLflow store; writes nothing and makes no database.

    Raises:
        TrackingRefused: for a file store, or a database that is not there.
    """

    def __init__(self, tracking_uri: str, *, advice: str = _ADVICE) -> None:
        self._store = Store(tracking_uri, advice=advice, must_exist=True)
        self._where = without_secrets(tracking_uri)
        self._page = _PAGE_OF_A_SERVER if tracking_uri.startswith("http") else _PAGE
        self._experiments: dict[str, str] = {}
        self._parents: dict[str, Run | None] = {}

    def runs(self, target: str) -> list[RunSummary]:
        """The runs that a target means, oldest first; a search's own run is not among them.

        Args:
            target: a run id (one with children means those), `models:/NAME/VERSION` or
                `models:/NAME@ALIAS` (the run that made it), an experiment's name, or the name
                that a search's run has.

        Raises:
            UserMistake: MLflow holds nothing of that name.
            TrackingError: MLflow is away or refuses, or the run or experiment is deleted.
        """
        if target.startswith("models:"):
            return [self._summary(self._run(self._run_of_model(target)))]
        if _RUN_ID.fullmatch(target):
            run = self._run(target)
            children = self._children(run)
            return self._summaries(children) if children else self._alone(run)
        return self._summaries(self._named(target))

    def curve(self, run_id: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of a run, in order; empty if it was never logged.

        Points that were all logged at one step are numbered by their times instead.
        """
        points = self._store.call("get_metric_history", run_id, metric)
        ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
        if len({point.step for point in ordered}) == 1:
            return list(range(1, len(ordered) + 1)), [point.value for point in ordered]
        latest = {point.step: point.value for point in ordered}
        return list(latest), list(latest.values())

    def _run(self, run_id: str) -> Run:
        try:
            run: Run = self._store.call("get_run", run_id)
        except TrackingRefused as error:
            if "RESOURCE_DOES_NOT_EXIST" not in _codes(error):
                raise
            raise UserMistake(f"MLflow at {self._where} has no run {run_id}.") from None
        if run.info.lifecycle_stage == "deleted":
            raise TrackingRefused(
                f"The run {run_id} is deleted in MLflow; bring it back with "
                f"`mlflow runs restore --run-id {run_id}`."
            )
        return run

    def _run_of_model(self, target: str) -> str:
        match = _MODEL.fullmatch(target)
        if match is None:
            raise UserMistake(f"{target} is no model; write models:/NAME/VERSION.")
        name, version, alias = match.groups()
        method = "get_model_version" if version else "get_model_version_by_alias"
        try:
            found = self._store.call(method, name, version or alias)
        except TrackingRefused as error:
            if not {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"} & _codes(error):
                raise
            raise UserMistake(f"MLflow at {self._where} has no model {target}.") from None
        if not found.run_id:
            raise UserMistake(f"{target} does not say which run made it.")
        return str(found.run_id)

    def _children(self, run: Run) -> list[Run]:
        if run.data.tags.get(KIND) == "trial":
            return []
        self._parents[run.info.run_id] = run
        condition = f"tags.`{PARENT}` = '{run.info.run_id}'"
        return list(self._search([run.info.experiment_id], condition))

    def _alone(self, run: Run) -> list[RunSummary]:
        """A run without children; a search without trials is no row."""
        return [] if _is_search(run) else [self._summary(run)]

    def _named(self, name: str) -> list[Run]:
        experiment = self._store.call("get_experiment_by_name", name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise deleted_experiment(name, experiment.experiment_id)
        if experiment is not None:
            self._experiments[experiment.experiment_id] = name
            return list(self._search([experiment.experiment_id], ""))
        known = self._all_experiments()
        quoted = name.replace("'", "")  # MLflow's filters cannot quote a quote
        for parent in self._search(known, f"attributes.run_name = '{quoted}'"):
            if _is_search(parent) and parent.info.run_name == name:
                return self._children(parent)
        near = difflib.get_close_matches(name, list(known.values()), n=3, cutoff=0.4)
        told = f" Nearest: {', '.join(near)}." if near else ""
        raise UserMistake(
            f"{name!r} is no search folder, and MLflow at {self._where} has no run, experiment "
            f"or search of that name.{told}"
        )

    def _all_experiments(self) -> dict[str, str]:
        found = self._store.call("search_experiments", max_results=1000)
        self._experiments |= {e.experiment_id: e.name for e in found}
        return self._experiments

    def _search(self, experiments: Iterable[str], condition: str) -> Iterator[Run]:
        ids, token = list(experiments), None
        while ids:
            page = self._store.call(
                "search_runs",
                ids,
                condition,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=self._page,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _summaries(self, runs: Sequence[Run]) -> list[RunSummary]:
        self._parents |= {run.info.run_id: run for run in runs if _is_search(run)}
        return [self._summary(run) for run in runs if not _is_search(run)]

    def _summary(self, run: Run) -> RunSummary:
        return summarise(run, parent=self._parent(run), experiment=self._experiment(run))

    def _parent(self, run: Run) -> Run | None:
        """The search's run of a trial; None for other tools' runs and where it is gone."""
        parent_id = run.data.tags.get(PARENT)
        if parent_id is None or KIND not in run.data.tags:
            return None
        if parent_id not in self._parents:
            try:
                self._parents[parent_id] = self._run(parent_id)
            except (UserMistake, TrackingRefused):
                self._parents[parent_id] = None
        return self._parents[parent_id]

    def _experiment(self, run: Run) -> str:
        number = run.info.experiment_id
        if number not in self._experiments:
            self._experiments[number] = str(self._store.call("get_experiment", number).name)
        return self._experiments[number]


def summarise(run: Run, *, parent: Run | None = None, experiment: str = "") -> RunSummary:
    """One run of MLflow as a row of a table.

    Args:
        parent: the search's run of a trial, for the settings that all its trials share.
        experiment: shown as the search of a run that has no parent.
    """
    tags, shared = run.data.tags, (parent.data.tags if parent else {})
    info, objective = run.info, _objective(run, shared)
    best = run.data.metrics.get(f"best_{objective}") if objective else None
    shared_params = parent.data.params if parent else {}
    # Earlier versions wrote what is not set, and the space.
    settings = {
        k: v
        for k, v in shared_params.items()
        if "." in k and v != "null" and not k.startswith("search.space.")
    }
    return RunSummary(
        run=info.run_name or info.run_id,
        state=tags.get(STATE) or str(info.status).lower(),
        search=str(parent.info.run_name if parent else experiment),
        params={**run.data.params, **settings},
        metrics=dict(run.data.metrics),
        objective=objective,
        best_value=best,
        best_epoch=_whole(tags.get("visiontuner.best_epoch")),
        epochs=_whole(tags.get("visiontuner.epochs")),
        started=_seconds(info.start_time),
        ended=_seconds(info.end_time),
        search_started=_seconds(parent.info.start_time) if parent else None,
        findings=tuple(name for name in tags.get("visiontuner.findings", "").split(", ") if name),
        reason=tags.get("visiontuner.error") or tags.get("visiontuner.reason") or "",
        run_id=info.run_id,
        trial_id=tags.get(TRIAL_ID, ""),
        search_id=tags.get(SEARCH_ID, ""),
        data_digest=shared.get("visiontuner.data_digest", ""),
    )


def _objective(run: Run, shared: dict[str, str]) -> str | None:
    """What the search optimised; a trial alone shows it by `best_NAME` beside `NAME`."""
    if "visiontuner.objective" in shared:
        return shared["visiontuner.objective"]
    if KIND not in run.data.tags:
        return None
    metrics = run.data.metrics
    return next((n[5:] for n in metrics if n.startswith("best_") and n[5:] in metrics), None)


def _is_search(run: Run) -> bool:
    return run.data.tags.get(KIND) in ("search", "resume")


def _codes(error: TrackingError) -> set[str]:
    return {str(getattr(error.__cause__, "error_code", ""))}


def _seconds(milliseconds: Any) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else None


# Runs that MLflow holds, as histories for the diagnostic rules: visiontuner's or any tool's.


_NO_HISTORY_ADVICE = "Try again later, or name a search folder: that needs no MLflow."

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
    summaries = Reader(tracking_uri, advice=_NO_HISTORY_ADVICE).runs(target)
    store, classes = Store(tracking_uri, advice=_NO_HISTORY_ADVICE), _Classes()
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
    store = Store(tracking_uri, advice=_NO_HISTORY_ADVICE)
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
