"""Searches of other tools as MLflow runs: one parent, a child for each training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visiontuner.tracking import runs
from visiontuner.tracking.client import Store
from visiontuner.tracking.plan import KIND, SEARCH_ID, STATE, STATUS_OF, TRIAL_ID, Point

_PARENT = "mlflow.parentRunId"


@dataclass(frozen=True, kw_only=True)
class ForeignTrial:
    """One training; times are milliseconds since the epoch, `ended` None while it runs."""

    name: str
    state: str
    started: int
    ended: int | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ForeignSearch:
    """A search; `search_id` finds its runs again."""

    search_id: str
    name: str
    state: str
    started: int
    ended: int | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    trials: Sequence[ForeignTrial]


def write_foreign_search(store: Store, search: ForeignSearch) -> str:
    """Write the runs that MLflow does not hold yet; repeating it changes nothing.

    Returns:
        The parent's run id.
    """
    held = {
        run.data.tags.get(TRIAL_ID, ""): run
        for run in runs.search_runs(store, search.search_id)
        if run.info.lifecycle_stage == "active"
    }
    experiment = _experiment(store, search.name)
    tags = {KIND: "search", SEARCH_ID: search.search_id, **search.tags}
    parent = held[""].info.run_id if "" in held else None
    if parent is None:
        parent = _create(store, experiment, search.name, search.started, tags)
    for trial in search.trials:
        known = held.get(trial.name)
        if known is not None and known.info.status == STATUS_OF[trial.state] != "RUNNING":
            continue
        own = {KIND: "trial", SEARCH_ID: search.search_id, TRIAL_ID: trial.name, _PARENT: parent}
        run_id = (
            known.info.run_id
            if known is not None
            else _create(store, experiment, trial.name, trial.started, own)
        )
        _fill(store, run_id, trial, {STATE: trial.state, **trial.tags})
    _fill(store, parent, search, {**search.tags, STATE: search.state})
    return parent


def _fill(
    store: Store, run_id: str, what: ForeignTrial | ForeignSearch, tags: Mapping[str, str]
) -> None:
    time = what.ended or what.started
    points = [Point(name, value, time, 0) for name, value in what.metrics.items()]
    runs.log_batch(store, run_id, points, what.params, tags)
    status = STATUS_OF.get(what.state, "FINISHED")
    if status == "RUNNING":
        store.call("update_run", run_id, status=status)
    else:
        store.call("set_terminated", run_id, status=status, end_time=time)


def _experiment(store: Store, name: str) -> str:
    found = store.call("get_experiment_by_name", name)
    if found is None:
        return str(store.call("create_experiment", name))
    if found.lifecycle_stage == "deleted":
        raise runs.deleted_experiment(name, found.experiment_id)
    return str(found.experiment_id)


def _create(store: Store, experiment: str, name: str, started: int, tags: Mapping[str, str]) -> str:
    run = store.call(
        "create_run",
        experiment,
        start_time=started,
        tags={**tags, "mlflow.runName": name},
        run_name=name,
    )
    return str(run.info.run_id)
