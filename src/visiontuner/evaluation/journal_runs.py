"""The trials of a search's journal as rows of a comparison: no MLflow needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visiontuner.evaluation.compare import RunSummary
from visiontuner.journal import SearchRecord, TrialRecord


def runs_of_record(record: SearchRecord, *, name: str, running: bool) -> list[RunSummary]:
    """One summary a trial, the same that MLflow's runs of this search give.

    Args:
        name: shown as the search's.
        running: whether some process is still at it; if none is, its open trials are interrupted.
    """
    experiment = record.started.get("experiment")
    settings = flat(experiment) if isinstance(experiment, Mapping) else {}
    data = record.started.get("data")
    digest = str(data.get("digest") or "") if isinstance(data, Mapping) else ""
    return [
        _summary(record, trial, name=name, running=running, settings=settings, digest=digest)
        for trial in record.trials.values()
    ]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"training": {"epochs": 5}}` -> `{"training.epochs": "5"}`, named as MLflow's parameters."""
    held: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            held |= flat(value, f"{prefix}{key}.")
        else:
            held[f"{prefix}{key}" if prefix else f"experiment.{key}"] = (
                "null" if value is None else str(value)
            )
    return held


def _summary(
    record: SearchRecord,
    trial: TrialRecord,
    *,
    name: str,
    running: bool,
    settings: Mapping[str, str],
    digest: str,
) -> RunSummary:
    over = not running or record.ended is not None
    state = "interrupted" if trial.state == "running" and over else trial.state
    last = trial.epochs[-1] if trial.epochs else None
    ended = trial.ended
    if state == "interrupted" and ended is None:
        ended = last.time if last else trial.started
    return RunSummary(
        run=trial.trial_id,
        state=state,
        search=name,
        params={**trial.configuration, **settings},
        metrics=dict(last.metrics) if last else {},
        objective=record.objective,
        best_value=trial.best_value,
        best_epoch=trial.best_epoch,
        epochs=len({epoch.step for epoch in trial.epochs}),
        started=trial.started,
        ended=ended,
        search_started=record.started.get("time"),
        findings=tuple(sorted({finding.rule for finding in trial.findings})),
        reason=trial.error or trial.reason or "",
        trial_id=trial.trial_id,
        search_id=record.search_id,
        data_digest=digest,
    )
