"""A classic hyperparameter tuning job of SageMaker's as MLflow runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from visiontuner.commands import next_command
from visiontuner.errors import TrackingError
from visiontuner.locations import tracking_uri
from visiontuner.text import without_secrets

if TYPE_CHECKING:
    from visiontuner.sagemaker.classic import TunedJob, TuningJob
    from visiontuner.tracking.tuning_job import ForeignSearch, ForeignTrial

_SECONDS = "seconds"


def write_tuning_job(tuning: TuningJob, *, flags: str) -> tuple[str, ...]:
    """Write what MLflow does not hold of it yet; returns lines for a person.

    Args:
        flags: what `attach` needs beside the name to find it again.

    Raises:
        TrackingError: it has trained nothing yet, or MLflow is away or refuses.
    """
    from visiontuner.tracking.client import Store
    from visiontuner.tracking.tuning_job import write_foreign_search

    uri, again = tracking_uri(), f"`{next_command('attach', tuning.name, flags=flags)}`"
    if not tuning.jobs:
        raise TrackingError(f"{tuning.name} has trained nothing yet: {again} later.")
    store = Store(uri, advice=f"{again} goes on where it stopped.")
    write_foreign_search(store, _as_search(tuning))
    lines = [f"{tuning.name}: {len(tuning.jobs)} training jobs are in {without_secrets(uri)}."]
    for objective in tuning.objectives:
        best = tuning.best(objective)
        if best is not None:
            lines.append(f"Best: {best.name} with {objective.name} {best.value:.4f}.")
    if tuning.status in ("InProgress", "Stopping"):
        lines.append(f"It is still running: {again} later writes the rest.")
    lines.append(f"Compare them: {next_command('compare', tuning.name)}")
    return tuple(lines)


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What metrics and parameters are called in MLflow, by their names in SageMaker."""

    metrics: Mapping[str, str]
    parameters: Mapping[str, str]

    @classmethod
    def of(cls, tuning: TuningJob) -> _Names:
        from visiontuner.tracking.tuning_job import valid_names

        metrics = {name for job in tuning.jobs for name in (*job.metrics, job.objective.name)}
        parameters = {name for job in tuning.jobs for name in job.parameters}
        return cls(
            metrics=valid_names(sorted(metrics), taken=[_SECONDS]),
            parameters=valid_names(sorted(parameters)),
        )

    def tags(self, job: TunedJob) -> dict[str, str]:
        """The names in SageMaker that MLflow does not take."""
        metrics = {self.metrics[name]: name for name in (*job.metrics, job.objective.name)}
        parameters = {self.parameters[name]: name for name in job.parameters}
        return {
            f"visiontuner.{kind}_name.{name}": original
            for kind, names in (("metric", metrics), ("parameter", parameters))
            for name, original in names.items()
            if name != original
        }


def _as_search(tuning: TuningJob) -> ForeignSearch:
    from visiontuner.tracking.tuning_job import ForeignSearch

    states = {"Completed": "completed", "Failed": "failed", "Stopped": "interrupted"}
    names = _Names.of(tuning)
    best = {names.metrics[aim.name]: tuning.best(aim) for aim in tuning.objectives}
    tags = {"visiontuner.job": tuning.name}
    if len(best) == 1:
        ((name, job),) = best.items()
        tags |= {"visiontuner.objective": name}
        tags |= {"visiontuner.best_trial": job.name} if job else {}
    return ForeignSearch(
        search_id=f"sagemaker-{tuning.name}",
        name=tuning.name,
        state=states.get(tuning.status, "running"),
        started=_milliseconds(tuning.started),
        ended=_milliseconds(tuning.ended) if tuning.ended else None,
        params={"strategy": tuning.strategy},
        metrics={
            f"best_{name}": job.value for name, job in best.items() if job and job.value is not None
        },
        tags=tags,
        trials=[_as_trial(job, names) for job in tuning.jobs],
    )


def _as_trial(job: TunedJob, names: _Names) -> ForeignTrial:
    from visiontuner.tracking.tuning_job import ForeignTrial

    metrics = {names.metrics[name]: value for name, value in job.metrics.items()}
    metrics[_SECONDS] = job.seconds
    if job.value is not None:
        objective = names.metrics[job.objective.name]
        metrics |= {objective: job.value, f"best_{objective}": job.value}
    return ForeignTrial(
        name=job.name,
        state=job.state,
        started=_milliseconds(job.started),
        ended=_milliseconds(job.ended) if job.ended else None,
        params={names.parameters[name]: value for name, value in job.parameters.items()},
        metrics=metrics,
        tags={
            **names.tags(job),
            "visiontuner.instances": f"{job.instances} x {job.instance_type}",
            **({"visiontuner.model_archive": job.model} if job.model else {}),
            **({"visiontuner.error": job.error} if job.error else {}),
        },
    )


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
