"""Where a model comes from, and whether what was recorded of it still holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from visiontuner.aws.endpoint import deployed_model
from visiontuner.errors import ClassifierError, TrackingError, UserMistake, VisiontunerError
from visiontuner.experiment.schema import Experiment
from visiontuner.io.aws import Aws
from visiontuner.io.files import temporary_folder
from visiontuner.journal import (
    SearchRecord,
    TrialRecord,
    newest_search,
    packaged_trial,
)
from visiontuner.model.classifier import INT8_TOLERANCE, Classifier
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EVALUATION_FOLDER,
    EVALUATION_REPORT,
    EXPERIMENT_FILE,
    JOURNAL_FILE,
    MLFLOW_FILE,
)
from visiontuner.serving.lineage import (
    Facts,
    Lineage,
    download_classifier,
    evaluation_facts,
    trace_run,
    trace_version,
)
from visiontuner.serving.registry import ModelReference, classifier_digest, find_version, is_missing
from visiontuner.text import next_command
from visiontuner.workflow.inputs import Inputs, Observer, Silent
from visiontuner.workflow.promote import open_store
from visiontuner.workflow.run import describe_code, describe_machine

# Where a model comes from, from whichever end one holds: model, run or search folder.


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
    if not (folder / JOURNAL_FILE).is_file() and not (subject.endswith("/") and folder.is_dir()):
        return None

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
    run_id = subject.removeprefix("runs:/").strip("/")
    return trace_run(open_store(), run_id) if _RUN_ID.fullmatch(run_id) else None


def _from_model(subject: str) -> Lineage:
    reference, mlflow = ModelReference.parse(subject), open_store()
    return trace_version(mlflow, find_version(mlflow, reference))


def _from_endpoint(name: str, region: str | None, assume_role: str | None) -> Lineage:
    """Its tags name the model version."""

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

    record = SearchRecord.load(folder)
    started, machine = record.started, record.started.get("machine") or {}
    trial_id = packaged_trial(folder)
    trial = record.named(trial_id)
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
            "from": (started.get("from") or {}).get("description"),
            "experiment_file": str(folder / EXPERIMENT_FILE),
        },
        experiment=started.get("experiment"),
        network=record.network_of(trial or record.kept) or None,
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


def _evaluation(folder: Path) -> dict[str, Any] | None:
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


# Does what a lineage says still hold? Everything that can be is computed again.


# Other processors round differently; a class never changes by so little.
REFERENCE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class LineageCheck:
    """One thing that was looked at again; `unknown` if it cannot be, `detail` says why."""

    what: str
    state: Literal["ok", "differs", "unknown"]
    detail: str


def verify(lineage: Lineage, *, observer: Observer | None = None) -> list[LineageCheck]:
    """Compare the artifact, the images, the code and the packages with what was recorded.

    The classifier is downloaded, and the images are read where the experiment found them; an
    archive at a URL that is not in the cache is downloaded again.
    """
    return [
        *_check_classifier(lineage),
        _check_data(lineage, observer or Silent()),
        _check_code(lineage.code or {}),
        _check_packages((lineage.environment or {}).get("packages") or {}),
    ]


def _check_classifier(lineage: Lineage) -> Iterator[LineageCheck]:
    """The artifact's digest, and its answers to its reference images."""
    with temporary_folder() as temporary:
        try:
            folder = _fetch_classifier(lineage, temporary)
        except TrackingError as error:
            if is_missing(error):
                yield _differs("classifier", "its files are gone from MLflow")
            else:
                yield _unknown("classifier", str(error))
            return
        if folder is None:
            yield _unknown("classifier", "no version is registered, and no classifier/ is here")
            return
        yield _check_digest(folder, (lineage.model or {}).get("classifier_digest"))
        yield _check_reference(folder)


def _fetch_classifier(lineage: Lineage, temporary: Path) -> Path | None:
    """The registered artifact, else the search folder's own."""

    model_id = (lineage.model or {}).get("model_id")
    if model_id:
        return download_classifier(open_store(), model_id, temporary)
    folder = (lineage.search or {}).get("folder")
    local = Path(folder) / CLASSIFIER_FOLDER if folder else None
    return local if local and local.is_dir() else None


def _check_digest(folder: Path, recorded: str | None) -> LineageCheck:
    what = "classifier digest"
    if recorded is None:
        return _unknown(what, "it was never registered")
    try:
        digest = classifier_digest(folder)
    except VisiontunerError:
        return _differs(what, "classifier.json is gone")
    if digest != recorded:
        return _differs(what, f"{digest[:12]} instead of {recorded[:12]}")
    return _ok(what, recorded[:12])


def _check_reference(folder: Path) -> LineageCheck:
    what = "reference images"
    try:
        classifier = Classifier.load(folder)
        difference = classifier.verify_reference()
    except VisiontunerError as error:
        # The text names a temporary folder, which is gone when it is read.
        return _differs(what, str(error).replace(f"{folder}/", "").replace(str(folder), "it"))
    tolerance = INT8_TOLERANCE if classifier.is_int8 else REFERENCE_TOLERANCE
    if not difference <= tolerance:
        return _differs(what, f"probabilities are off by up to {difference:.2g}")
    return _ok(what, f"the same probabilities within {tolerance:g}")


def _check_data(lineage: Lineage, observer: Observer) -> LineageCheck:
    what, data = "data digest", lineage.data or {}
    recorded = data.get("digest")
    if recorded is None or lineage.experiment is None:
        return _unknown(what, "no digest or no experiment file was recorded")
    try:
        dataset = Inputs(Experiment.parse(lineage.experiment), observer).dataset
    except VisiontunerError as error:
        return _unknown(what, str(error))
    if dataset.digest == recorded:
        return _ok(what, f"{recorded[:12]}, {dataset.root}")
    counts = {name: len(samples) for name, samples in dataset.splits.items()}
    detail = f"{dataset.digest[:12]} instead of {recorded[:12]}"
    return _differs(what, detail + _changes(data.get("counts") or {}, counts))


def _changes(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    changed = [
        f"{now.get(name, 0):,} {name} instead of {count:,}"
        for name, count in before.items()
        if now.get(name, 0) != count
    ]
    return f"; {', '.join(changed)}" if changed else "; as many images, but not the same"


def _check_code(recorded: Facts) -> LineageCheck:
    what, now = "code", describe_code()
    then, commit = recorded.get("commit"), now["commit"]
    if then is None:
        return _unknown(what, "no commit was recorded: it ran from no git checkout")
    if commit is None:
        return _unknown(what, f"commit {then[:12]}; this visiontuner runs from no git checkout")
    if then != commit:
        return _differs(what, f"commit {commit[:12]} instead of {then[:12]}")
    if now["dirty"]:
        return _differs(what, f"commit {then[:12]}, and this checkout has changes")
    if recorded.get("dirty"):
        return _unknown(what, f"commit {then[:12]} with changes of which only their being is known")
    return _ok(what, f"commit {then[:12]}")


def _check_packages(recorded: Mapping[str, Any]) -> LineageCheck:
    what, machine = "packages", describe_machine()
    if not recorded:
        return _unknown(what, "no versions were recorded")
    installed = {"python": machine["python"], **machine["packages"]}
    changed = [
        f"{name} {installed.get(name, 'missing')} instead of {version}"
        for name, version in recorded.items()
        if version is not None and installed.get(name) != version
    ]
    if changed:
        return _differs(what, ", ".join(changed))
    return _ok(what, f"{len(recorded)} versions as recorded")


def _ok(what: str, detail: str) -> LineageCheck:
    return LineageCheck(what=what, state="ok", detail=detail)


def _differs(what: str, detail: str) -> LineageCheck:
    return LineageCheck(what=what, state="differs", detail=detail)


def _unknown(what: str, detail: str) -> LineageCheck:
    return LineageCheck(what=what, state="unknown", detail=detail)
