"""What MLflow holds of runs, as summaries: of visiontuner's and of any other tool.

A table needs no metric histories: one search brings parameters, tags and last values of hundreds of
runs. Curves are fetched run by run, for those that are drawn.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlflow.entities import Run, ViewType

from visiontuner.errors import TrackingError, UserMistake
from visiontuner.evaluation.compare import RunSummary
from visiontuner.text import without_secrets
from visiontuner.tracking.client import Store, TrackingRefused
from visiontuner.tracking.plan import KIND, SEARCH_ID, STATE, TRIAL_ID
from visiontuner.tracking.runs import deleted_experiment

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
    settings = {k: v for k, v in parent.data.params.items() if "." in k} if parent else {}
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
