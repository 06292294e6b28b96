"""Where a model comes from: version -> trial -> search -> experiment, images, code, machine.

Read from what every step wrote into MLflow, as sections of plain JSON values. A section that nobody
can fill is None; what is missing and why is in the notes. An endpoint joins by its model version:
whoever knows the version calls `trace_version`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from visiontuner.errors import TrackingError, UserMistake
from visiontuner.evaluation.report import image_count
from visiontuner.io.files import temporary_folder
from visiontuner.journal import NETWORK_FACTS
from visiontuner.model.classifier import read_threshold
from visiontuner.paths import CLASSIFIER_FOLDER, EXPERIMENT_FILE
from visiontuner.serving.promotion import DECISION_TAG, REASON_TAG, read_report
from visiontuner.serving.registry import (
    DIGEST_TAG,
    QUANTIZED_FROM_TAG,
    Mlflow,
    is_missing,
    logged_model_id,
    versions_of_run,
)
from visiontuner.text import one_line

Facts = dict[str, Any]

_OURS = "visiontuner."
_CLASSIFIER = f"artifacts/{CLASSIFIER_FOLDER}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Lineage:
    """Where a model comes from; each section a dictionary of JSON values, or None.

    Attributes:
        model: name, version, uri, aliases, registered, model_id, classifier_digest, class_names,
            temperature, threshold, abstains, promotion, promotion_reason, quantized_from.
        evaluation: accuracy, low, high, images, looks, data_digest, same_classifier.
        trial: trial_id, run_id, stage, state, configuration, best_epoch, best (by metric).
        search: name, search_id, run_id, folder, state, objective, started, from (what it began
            with), experiment_file.
        experiment: the resolved experiment file.
        network: backbone, weights_digest, weights_licence, engine.
        data: source, root, digest, counts, class_names.
        code: version, commit, dirty.
        environment: host, platform, packages (with Python's own version).
        notes: what could not be read, one sentence each.
    """

    model: Facts | None = None
    evaluation: Facts | None = None
    trial: Facts | None = None
    search: Facts | None = None
    experiment: Facts | None = None
    network: Facts | None = None
    data: Facts | None = None
    code: Facts | None = None
    environment: Facts | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        model, trial, search = self.model or {}, self.trial or {}, self.search or {}
        data, code = self.data or {}, self.code or {}
        return (
            f"Lineage of {model.get('uri') or 'no registered model'}\n"
            f"trial {trial.get('trial_id') or '?'} of search {search.get('name') or '?'}\n"
            f"data {data.get('source') or '?'} ({(data.get('digest') or '?')[:12]}), "
            f"code {(code.get('commit') or '?')[:12]}"
        )

    def over(self, other: Lineage) -> Lineage:
        """Both together; where both know a fact, this one's."""
        sections = {
            part.name: {**(getattr(other, part.name) or {}), **(getattr(self, part.name) or {})}
            for part in fields(self)
            if part.name != "notes"
        }
        filled: dict[str, Any] = {name: facts or None for name, facts in sections.items()}
        return Lineage(**filled, notes=tuple(dict.fromkeys((*self.notes, *other.notes))))


def trace_version(mlflow: Mlflow, version: ModelVersion) -> Lineage:
    """From a model version on; what its runs no longer say, its own tags do.

    Raises:
        UserMistake: visiontuner did not register it.
        TrackingError: MLflow is away or refuses.
    """
    if DIGEST_TAG not in version.tags:
        raise UserMistake(
            f"Version {version.version} of {version.name} was not registered by visiontuner: it "
            "says nothing about where it comes from."
        )
    own = Lineage(model=_model(version), **_tagged(version.tags))
    own = own.over(_packaged(mlflow, version))
    run, notes = _run(mlflow, version.run_id)
    if run is None:
        return replace(own, notes=(*own.notes, *notes))
    return own.over(_trial_run(mlflow, run, version.tags[DIGEST_TAG]))


def trace_run(mlflow: Mlflow, run_id: str) -> Lineage:
    """From a trial's or a search's run on, with the newest version registered from it.

    Raises:
        UserMistake: there is no such run, or another tool wrote it.
        TrackingError: MLflow is away or refuses.
    """
    run, notes = _run(mlflow, run_id)
    if run is None:
        raise UserMistake(f"{notes[0]} Is MLFLOW_TRACKING_URI the right one?")
    kind, search_id = (run.data.tags.get(f"{_OURS}{name}") for name in ("kind", "search_id"))
    if kind == "trial":
        versions = versions_of_run(mlflow, run_id)
        note = f"No model version is registered from run {run_id}."
    elif kind == "search":
        found = mlflow.call(
            "search_model_versions", f"tags.`{_OURS}search_id` = '{search_id}'"
        )  # of whichever trial was packaged
        versions = sorted(found, key=lambda v: v.creation_timestamp)
        note = "No model version is registered from this search."
    else:
        raise UserMistake(
            f"Run {run_id} was not written by `visiontuner tune`: it says nothing about where it "
            "comes from."
        )
    if versions:
        newest = versions[-1]
        full = mlflow.call("get_model_version", newest.name, str(newest.version))  # with aliases
        return trace_version(mlflow, full)
    traced = _trial_run(mlflow, run, None) if kind == "trial" else _search_run(mlflow, run)
    return replace(traced, notes=(*traced.notes, note))


def evaluation_facts(report: Mapping[str, Any], classifier_digest: str | None) -> Facts:
    """What an evaluation's report says, in a few words."""
    accuracy = (report.get("metrics") or {}).get("accuracy") or {}
    return {
        "accuracy": accuracy.get("value"),
        "low": accuracy.get("low"),
        "high": accuracy.get("high"),
        "images": image_count(report),
        "looks": report.get("looks"),
        "data_digest": report.get("data_digest"),
        # False for the version from before calibration: the same answers, other probabilities.
        "same_classifier": report.get("classifier_digest") == classifier_digest
        if classifier_digest
        else None,
    }


def download_classifier(mlflow: Mlflow, model_id: str, folder: Path) -> Path:
    """Bring the classifier folder of a logged model into an existing folder.

    Raises:
        TrackingError: MLflow is away, or the model or its files are gone.
    """
    return _download(mlflow, model_id, _CLASSIFIER, folder)


def _run(mlflow: Mlflow, run_id: str | None) -> tuple[Run | None, list[str]]:
    if not run_id:
        return None, []
    try:
        return mlflow.call("get_run", run_id), []
    except TrackingError as error:
        if is_missing(error):
            return None, [f"MLflow has no run {run_id}."]
        raise


def _model(version: ModelVersion) -> Facts:
    return {
        "name": version.name,
        "version": str(version.version),
        "uri": f"models:/{version.name}/{version.version}",
        "aliases": sorted(version.aliases or ()),
        "registered": _moment(version.creation_timestamp),
        "model_id": logged_model_id(version),
        "classifier_digest": version.tags[DIGEST_TAG],
        "promotion": version.tags.get(DECISION_TAG),
        "promotion_reason": version.tags.get(REASON_TAG),
        "quantized_from": version.tags.get(QUANTIZED_FROM_TAG),
    }


def _packaged(mlflow: Mlflow, version: ModelVersion) -> Lineage:
    """What the artifact says of itself, in classifier.json."""
    model_id = logged_model_id(version)
    if model_id is None:
        return Lineage(notes=("The version was not made from a logged model.",))

    def read(folder: Path) -> Any:
        path = _download(mlflow, model_id, f"{_CLASSIFIER}/classifier.json", folder)
        return json.loads(path.read_text(encoding="utf-8"))

    described, notes = _read(read, "the model's classifier.json")
    names = described.get("class_names") or []
    return Lineage(
        model=_answering(described) if described else None,
        data={"class_names": names} if names else None,
        notes=notes,
    )


def _answering(described: Facts) -> Facts:
    """What a classifier.json says of its answers."""

    facts = {key: described.get(key) for key in ("class_names", "temperature", "threshold")}
    with suppress(ValueError, TypeError, KeyError):  # damaged: shown as it is
        facts["threshold"], facts["abstains"] = read_threshold(described)
    return facts


def _trial_run(mlflow: Mlflow, run: Run, classifier_digest: str | None) -> Lineage:
    tags, metrics = run.data.tags, run.data.metrics
    trial = {
        "trial_id": tags.get(f"{_OURS}trial_id"),
        "run_id": run.info.run_id,
        "stage": tags.get(f"{_OURS}stage"),
        "state": tags.get(f"{_OURS}state"),
        "configuration": dict(run.data.params),
        "best_epoch": _whole(tags.get(f"{_OURS}best_epoch")),
        "best": {key: value for key, value in metrics.items() if key.startswith("best_")},
    }
    evaluation, notes = None, []
    try:
        report = read_report(mlflow, run.info.run_id)
        evaluation = evaluation_facts(report, classifier_digest) if report else None
    except UserMistake as error:  # a damaged report must not hide the rest
        notes.append(str(error))
    parent_id = tags.get("mlflow.parentRunId")
    parent, gone = _run(mlflow, parent_id)
    if not parent_id:
        gone.append(
            f"Run {run.info.run_id} has no parent run, so nothing in MLflow tells of its search; "
            "`visiontuner lineage FOLDER` asks the search's own folder."
        )
    own = Lineage(trial=trial, evaluation=evaluation, notes=(*notes, *gone))
    return own.over(_search_run(mlflow, parent)) if parent else own


def _search_run(mlflow: Mlflow, run: Run) -> Lineage:
    tags, run_id = run.data.tags, run.info.run_id
    experiment, notes = _read(
        lambda folder: yaml.safe_load(
            Path(mlflow.call("download_artifacts", run_id, EXPERIMENT_FILE, str(folder))).read_text(
                encoding="utf-8"
            )
        ),
        f"{EXPERIMENT_FILE} of run {run_id}",
    )
    search = {
        "name": run.info.run_name,
        "search_id": tags.get(f"{_OURS}search_id"),
        "run_id": run_id,
        "state": tags.get(f"{_OURS}state"),
        "objective": tags.get(f"{_OURS}objective"),
        "started": _moment(run.info.start_time),
        "from": tags.get(f"{_OURS}from"),
        "experiment_file": f"artifact {EXPERIMENT_FILE} of run {run_id}" if experiment else None,
    }
    sections = _tagged(tags)
    sections["data"] = {**(sections["data"] or {}), **_dataset(run)}
    return Lineage(search=search, experiment=experiment or None, notes=notes, **sections)


def _tagged(tags: Mapping[str, str]) -> dict[str, Any]:
    """The sections that tags tell of; on a search's run and, fewer, on a version."""
    packages = _packages(tags.get(f"{_OURS}packages"))
    dirty = tags.get(f"{_OURS}code_dirty")
    sections: dict[str, Facts] = {
        "network": _known(tags, NETWORK_FACTS),
        "data": _known(tags, ("source", "digest"), "data_"),
        "code": {
            **_known(tags, ("version",)),
            **_known(tags, ("commit",), "code_"),
            **({} if dirty is None else {"dirty": dirty == "True"}),
        },
        "environment": {
            **_known(tags, ("host", "platform")),
            **({"packages": packages} if packages else {}),
        },
    }
    return {name: facts or None for name, facts in sections.items()}


def _known(tags: Mapping[str, str], names: Iterable[str], prefix: str = "") -> Facts:
    wanted = {name: tags.get(f"{_OURS}{prefix}{name}") for name in names}
    return {name: value for name, value in wanted.items() if value is not None}


def _packages(text: str | None) -> dict[str, str]:
    try:
        raw = json.loads(text or "{}")
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in raw.items()} if isinstance(raw, dict) else {}


def _dataset(run: Run) -> Facts:
    """Counts by split, from MLflow's own dataset input."""
    inputs: Any = run.inputs.dataset_inputs if run.inputs else ()
    try:
        counts = json.loads(inputs[0].dataset.profile)["counts"]
    except (LookupError, ValueError, TypeError):
        return {}
    return {"counts": counts} if isinstance(counts, dict) else {}


def _download(mlflow: Mlflow, model_id: str, path: str, folder: Path) -> Path:
    location = mlflow.call("get_logged_model", model_id).artifact_location
    return mlflow.download(f"{location.rstrip('/')}/{path}", folder)


def _read(read: Callable[[Path], Any], what: str) -> tuple[Facts, tuple[str, ...]]:
    """A JSON or YAML object, or nothing and the reason: one lost file must not hide the rest."""
    try:
        with temporary_folder() as folder:
            raw = read(folder)
        if not isinstance(raw, dict):
            raise TypeError("it is not an object")
    except (TrackingError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = one_line(error, 150)
        return {}, (f"Cannot read {what}: {reason}",)
    return raw, ()


def _moment(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
