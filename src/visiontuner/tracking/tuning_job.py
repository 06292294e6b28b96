"""Searches of other tools as MLflow runs: one parent, a child for each training."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from mlflow.entities import Run

from visiontuner.errors import TrackingError
from visiontuner.tracking import runs
from visiontuner.tracking.client import Store
from visiontuner.tracking.plan import KIND, SEARCH_ID, STATE, STATUS_OF, TRIAL_ID, Point

_PARENT = "mlflow.parentRunId"
# MLflow takes 250 characters; some are for `best_`, for the names of tags and for a digest.
_LONGEST_NAME = 200
_NOT_ALLOWED = re.compile(r"[^\w.\- :/]+")


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


def valid_names(originals: Iterable[str], *, taken: Iterable[str] = ()) -> dict[str, str]:
    """A name that MLflow takes for every metric or parameter of another tool, each its own.

    Args:
        taken: names that are used for something else.
    """
    names = {original: _valid(original) for original in originals}
    shared = {name for name, uses in Counter([*names.values(), *taken]).items() if uses > 1}
    kept = {name for original, name in names.items() if name == original} - set(taken)
    return {
        original: _apart(original, name) if name in shared - ({original} & kept) else name
        for original, name in names.items()
    }


def _valid(original: str) -> str:
    name = _NOT_ALLOWED.sub("_", original)
    if name != original:
        name = name.strip("_ ")
    # MLflow refuses what would be another path as a file's name.
    if re.search(r"^/|/$|//|(^|/)\.{1,2}(/|$)|^\.\.", name):
        name = name.replace("/", "_").lstrip(".")
    return name[:_LONGEST_NAME] or "_"


def _apart(original: str, name: str) -> str:
    return f"{name}-{hashlib.sha256(original.encode()).hexdigest()[:6]}"


def write_foreign_search(store: Store, search: ForeignSearch) -> str:
    """Write the runs that MLflow does not hold yet; repeating it changes nothing.

    What breaks it off leaves its runs KILLED, and the next call completes them.

    Returns:
        The parent's run id.

    Raises:
        TrackingError: MLflow is away or refuses.
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
    with _none_left_running(store, parent):
        for trial in search.trials:
            known = held.get(trial.name)
            if known is not None and _is_written(known, trial):
                continue
            own = {SEARCH_ID: search.search_id, TRIAL_ID: trial.name, _PARENT: parent}
            run_id = (
                known.info.run_id
                if known is not None
                else _create(store, experiment, trial.name, trial.started, {KIND: "trial", **own})
            )
            with _none_left_running(store, run_id):
                _fill(store, run_id, trial)
        _fill(store, parent, search)
    return parent


def _is_written(run: Run, trial: ForeignTrial) -> bool:
    """Whether all of a training that has ended is there: its state is written last."""
    status = STATUS_OF[trial.state]
    return run.info.status == status != "RUNNING" and run.data.tags.get(STATE) == trial.state


@contextmanager
def _none_left_running(store: Store, run_id: str) -> Iterator[None]:
    """A run that is not written to its end does not look as if it were still training."""
    try:
        yield
    except BaseException:
        with suppress(TrackingError):
            store.call("set_terminated", run_id, status="KILLED")
        raise


def _fill(store: Store, run_id: str, what: ForeignTrial | ForeignSearch) -> None:
    time = what.ended or what.started
    points = [Point(name, value, time, 0) for name, value in what.metrics.items()]
    runs.log_batch(store, run_id, points, what.params, {**what.tags, STATE: what.state})
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
