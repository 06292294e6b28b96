"""Where a model comes from, from whichever end one holds: model, run or search folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.commands import next_command
from visiontuner.errors import ClassifierError, TrackingError, UserMistake
from visiontuner.journal import FILE_NAME, SearchRecord, TrialRecord, read_events
from visiontuner.layout import (
    CLASSIFIER_FOLDER,
    EVALUATION_FOLDER,
    EVALUATION_REPORT,
    EXPERIMENT_FILE,
    MLFLOW_FILE,
)
from visiontuner.locations import newest_search
from visiontuner.workflow.packaging import packaged_trial
from visiontuner.workflow.promote import open_store

if TYPE_CHECKING:
    from visiontuner.serving.lineage import Lineage

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_ENDPOINT = "endpoint:"


def trace(
    subject: str | None = None, *, region: str | None = None, assume_role: str | None = None
) -> Lineage:
    """Where a model comes from.

    Args:
        subject: a search folder, an MLflow run, a model (NAME, NAME/VERSION, NAME@ALIAS,
            models:/…), or endpoint:NAME; the newest search if None.
        region: of an endpoint; the one that AWS's own settings name if None.
        assume_role: ARN of a role to look at an endpoint as.

    Raises:
        UserMistake: there is no such thing, or visiontuner did not make it.
        TrackingError: MLflow is away and nothing else tells.
        ServingError: AWS refuses or cannot be reached.
    """
    subject = subject or str(newest_search())
    if subject.startswith(_ENDPOINT):
        return _from_endpoint(subject.removeprefix(_ENDPOINT).strip("/"), region, assume_role)
    for resolve in _RESOLVERS:
        traced = resolve(subject)
        if traced is not None:
            return traced
    raise AssertionError("the last resolver takes everything")


def _from_folder(subject: str) -> Lineage | None:
    """The journal knows most of it, and without MLflow too."""
    folder = Path(subject)
    if not (folder / FILE_NAME).is_file() and not (subject.endswith("/") and folder.is_dir()):
        return None
    from visiontuner.serving.lineage import trace_run

    own = trace_folder(folder)
    run_id = _parent_run(folder)
    if run_id is None:
        note = f"This search is not in MLflow yet; `{next_command('sync', folder)}` writes it."
        return replace(own, notes=(*own.notes, note))
    try:
        tracked = trace_run(open_store(), run_id)
    except (TrackingError, UserMistake) as error:  # the folder's own facts stand without
        return replace(own, notes=(*own.notes, str(error)))
    return _of_one_trial(own, tracked).over(tracked)


def _of_one_trial(own: Lineage, tracked: Lineage) -> Lineage:
    """Without the folder's trial if the newest registered version is of another."""
    ours, theirs = ((lineage.trial or {}).get("trial_id") for lineage in (own, tracked))
    if theirs is None or ours == theirs:
        return own
    note = f"classifier/ is of {ours} now, and the newest registered version of {theirs}."
    return replace(own, trial=None, evaluation=None, notes=(*own.notes, note))


def _from_run(subject: str) -> Lineage | None:
    from visiontuner.serving.lineage import trace_run

    run_id = subject.removeprefix("runs:/").strip("/")
    return trace_run(open_store(), run_id) if _RUN_ID.fullmatch(run_id) else None


def _from_model(subject: str) -> Lineage:
    from visiontuner.serving.lineage import trace_version
    from visiontuner.serving.versions import ModelReference, find_version

    reference, mlflow = ModelReference.parse(subject), open_store()
    return trace_version(mlflow, find_version(mlflow, reference))


def _from_endpoint(name: str, region: str | None, assume_role: str | None) -> Lineage:
    """Its tags name the model version."""
    from visiontuner.aws import Aws
    from visiontuner.serving.endpoint_listing import deployed_model

    aws = Aws(region, assume_role)
    model = deployed_model(aws, name)
    traced = _from_model(f"models:/{model}")
    note = f"Endpoint {name} in {aws.region}, account {aws.account}, serves models:/{model}."
    return replace(traced, notes=(note, *traced.notes))


# Asked in this order; each answers None to what it does not know.
_RESOLVERS: tuple[Callable[[str], Lineage | None], ...] = (
    _from_folder,
    _from_run,
    _from_model,
)


def trace_folder(folder: Path) -> Lineage:
    """What a search folder alone says.

    Raises:
        JournalError: it holds no search.
    """
    from visiontuner.serving.lineage import Lineage

    record = SearchRecord.load(folder)
    started, machine = record.started, record.started.get("machine") or {}
    trial_id = packaged_trial(folder)
    trial = record.trials.get(trial_id) if trial_id else None
    return Lineage(
        evaluation=_evaluation(folder),
        trial=_trial(trial, record.objective) if trial else None,
        search={
            "name": started.get("name"),
            "search_id": record.search_id,
            "folder": str(folder),
            "state": record.ended["state"] if record.ended else "running or interrupted",
            "objective": record.objective,
            "started": _moment(started.get("time")),
            "experiment_file": str(folder / EXPERIMENT_FILE),
        },
        experiment=started.get("experiment"),
        network=_network(folder),
        data=started.get("data"),
        code=started.get("code"),
        environment={
            **{key: machine.get(key) for key in ("host", "platform")},
            "packages": {"python": machine.get("python"), **(machine.get("packages") or {})},
        },
    )


def _trial(trial: TrialRecord, objective: str) -> dict[str, Any]:
    return {
        "trial_id": trial.trial_id,
        "state": trial.state,
        "configuration": trial.configuration,
        "best_epoch": trial.best_epoch,
        "best": {f"best_{objective}": trial.best_value},
    }


def _network(folder: Path) -> dict[str, Any] | None:
    kinds = ("features_ready", "pictures_ready")
    ready = [e for e in read_events(folder).events if e["event"] in kinds]
    # A resumed search finds its features in the cache: the first time says how they were made.
    first = ready[0] if ready else {}
    return {k: first[k] for k in ("backbone", "weights_digest", "engine") if k in first} or None


def _evaluation(folder: Path) -> dict[str, Any] | None:
    from visiontuner.serving.lineage import evaluation_facts
    from visiontuner.serving.registry import classifier_digest

    try:
        text = (folder / EVALUATION_FOLDER / EVALUATION_REPORT).read_text(encoding="utf-8")
        return evaluation_facts(json.loads(text), classifier_digest(folder / CLASSIFIER_FOLDER))
    except (OSError, ValueError, AttributeError, ClassifierError):
        return None


def _parent_run(folder: Path) -> str | None:
    try:
        text = (folder / MLFLOW_FILE).read_text(encoding="utf-8")
        run_id = json.loads(text)["parent_run_id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(run_id) if run_id else None


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
