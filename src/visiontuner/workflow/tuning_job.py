"""A classic hyperparameter tuning job of SageMaker's as MLflow runs."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from visiontuner.errors import TrackingError
from visiontuner.locations import tracking_uri

if TYPE_CHECKING:
    from visiontuner.sagemaker.classic import TunedJob, TuningJob
    from visiontuner.tracking.tuning_job import ForeignSearch, ForeignTrial


def write_tuning_job(tuning: TuningJob) -> tuple[str, ...]:
    """Write what MLflow does not hold of it yet; returns lines for a person.

    Raises:
        TrackingError: it has trained nothing yet, or MLflow is away or refuses.
    """
    from visiontuner.tracking.client import Store, without_secrets
    from visiontuner.tracking.tuning_job import write_foreign_search

    uri = tracking_uri()
    if not tuning.jobs:
        raise TrackingError(f"{tuning.name} has trained nothing yet; attach again later.")
    write_foreign_search(Store(uri), _as_search(tuning))
    best = max(
        (job for job in tuning.jobs if job.objective is not None),
        key=lambda job: (job.objective or 0.0) * (-1 if tuning.mode == "min" else 1),
        default=None,
    )
    lines = [f"{tuning.name}: {len(tuning.jobs)} training jobs are in {without_secrets(uri)}."]
    if best is not None:
        lines.append(f"Best: {best.name} with {tuning.objective} {best.objective:.4f}.")
    if tuning.status in ("InProgress", "Stopping"):
        lines.append("It is still running: attach again to write the rest.")
    lines.append(f"Compare them: visiontuner compare {tuning.name}")
    return tuple(lines)


def _as_search(tuning: TuningJob) -> ForeignSearch:
    from visiontuner.tracking.tuning_job import ForeignSearch

    states = {"Completed": "completed", "Failed": "failed", "Stopped": "interrupted"}
    values = [job.objective for job in tuning.jobs if job.objective is not None]
    choose = min if tuning.mode == "min" else max
    return ForeignSearch(
        search_id=f"sagemaker-{tuning.name}",
        name=tuning.name,
        state=states.get(tuning.status, "running"),
        started=_milliseconds(tuning.started),
        ended=_milliseconds(tuning.ended) if tuning.ended else None,
        params={"strategy": tuning.strategy},
        metrics={f"best_{tuning.objective}": choose(values)} if values else {},
        tags={
            "visiontuner.objective": tuning.objective,
            "visiontuner.job": tuning.name,
            **({"visiontuner.best_trial": tuning.best} if tuning.best else {}),
        },
        trials=[_as_trial(job, tuning.objective) for job in tuning.jobs],
    )


def _as_trial(job: TunedJob, objective: str) -> ForeignTrial:
    from visiontuner.tracking.tuning_job import ForeignTrial

    metrics = {**job.metrics, "seconds": job.seconds}
    if job.objective is not None:
        metrics |= {objective: job.objective, f"best_{objective}": job.objective}
    return ForeignTrial(
        name=job.name,
        state=job.state,
        started=_milliseconds(job.started),
        ended=_milliseconds(job.ended) if job.ended else None,
        params=job.parameters,
        metrics=metrics,
        tags={
            "visiontuner.instances": f"{job.instances} x {job.instance_type}",
            **({"visiontuner.model_archive": job.model} if job.model else {}),
            **({"visiontuner.error": job.error} if job.error else {}),
        },
    )


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
