"""What the writer asks of MLflow, in as few calls as it allows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType

from visiontuner.journal import Finding
from visiontuner.plain_json import encode_json
from visiontuner.tracking.client import Store, TrackingRefused
from visiontuner.tracking.plan import SEARCH_ID, Point, ProjectRun

# MLflow takes 1,000 metrics, 100 parameters and 100 tags a call, 1,000 of all together.
_METRICS_A_CALL = 800
_PARAMS_A_CALL = 90
_TAGS_A_CALL = 90


def search_runs(store: Store, search_id: str) -> Iterator[Run]:
    """All runs of a search, in whichever experiment they lie, deleted ones included.

    Raises:
        TrackingRefused: their experiment is deleted.
    """
    experiments = list(
        _pages(store, "search_experiments", view_type=ViewType.ALL, max_results=1000)
    )
    deleted = {e.experiment_id: e.name for e in experiments if e.lifecycle_stage == "deleted"}
    for run in _pages(
        store,
        "search_runs",
        [experiment.experiment_id for experiment in experiments],
        filter_string=f"tags.`{SEARCH_ID}` = '{search_id}'",
        run_view_type=ViewType.ALL,
        max_results=1000,
    ):
        if run.info.experiment_id in deleted:
            raise deleted_experiment(deleted[run.info.experiment_id], run.info.experiment_id)
        yield run


def why_not_adopted(store: Store, project: ProjectRun, search_id: str) -> str | None:
    """Why a run is not the one that `mlflow run` opened for this search; None if it is.

    `MLFLOW_RUN_ID` stays set in many shells and notebooks. A run that something else has written or
    ended would get a search's parameters, and trials of two searches would lie below one run.

    Raises:
        TrackingError: MLflow is away.
    """
    try:
        run: Run = store.call("get_run", project.run_id)
    except TrackingRefused as error:
        return str(error).rstrip(".")
    tags = run.data.tags
    if tags.get("mlflow.source.type") != "PROJECT":
        return "`mlflow run` did not open it"
    if run.info.experiment_id != project.experiment_id:
        return "it is not in the experiment of MLFLOW_EXPERIMENT_ID"
    if run.info.lifecycle_stage == "deleted":
        return "it is deleted"
    if run.info.status != "RUNNING":
        return f"it is {run.info.status}, not RUNNING"
    if tags.get(SEARCH_ID) != search_id and any(tag.startswith("visiontuner.") for tag in tags):
        return "it belongs to another search"
    return None


def log_batch(
    store: Store,
    run_id: str,
    points: Sequence[Point],
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> None:
    """As few calls as MLflow's limits allow; the last tags travel in the last one."""
    metrics = [Metric(p.key, p.value, p.time, p.step) for p in points]
    rows = [Param(key, value) for key, value in params.items()]
    while len(metrics) > _METRICS_A_CALL or len(rows) > _PARAMS_A_CALL:
        store.call(
            "log_batch", run_id, metrics=metrics[:_METRICS_A_CALL], params=rows[:_PARAMS_A_CALL]
        )
        metrics, rows = metrics[_METRICS_A_CALL:], rows[_PARAMS_A_CALL:]
    labels = [RunTag(key, value) for key, value in tags.items()]
    while len(labels) > _TAGS_A_CALL:
        store.call("log_batch", run_id, tags=labels[:_TAGS_A_CALL])
        labels = labels[_TAGS_A_CALL:]
    if metrics or rows or labels:
        store.call("log_batch", run_id, metrics=metrics, params=rows, tags=labels)


def findings_text(findings: Iterable[Finding]) -> str:
    """The artifact `findings.json`: a list of rule, severity, evidence, advice and step."""
    return encode_json([asdict(finding) for finding in findings], indent=1).decode()


def dataset_input(data: Mapping[str, Any]) -> DatasetInput:
    """A dataset entry made from the journal alone: no picture is looked at."""
    source = str(data.get("source") or data.get("root") or "")
    profile = {"counts": data.get("counts"), "classes": len(data.get("class_names") or ())}
    return DatasetInput(
        Dataset(
            name=source.rstrip("/").rsplit("/", 1)[-1][:500] or "pictures",
            digest=str(data["digest"])[:36],  # MLflow's limit; the tag has all of it
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
    )


def _pages(store: Store, method: str, /, *args: Any, **kwargs: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = store.call(method, *args, page_token=token, **kwargs)
        yield from page
        token = page.token
        if not token:
            return


def refuse_deleted(run: Run, what: str) -> None:
    if run.info.lifecycle_stage == "deleted":
        raise TrackingRefused(
            f"The {what} of this search is deleted in MLflow; bring it back with "
            f"`mlflow runs restore --run-id {run.info.run_id}`, or remove it for good with "
            f"`mlflow gc --run-ids {run.info.run_id}`."
        )


def deleted_experiment(name: str, experiment_id: str) -> TrackingRefused:
    return TrackingRefused(
        f"The MLflow experiment {name!r} is deleted; bring it back with "
        f"`mlflow experiments restore --experiment-id {experiment_id}`, or choose another name."
    )
