"""A classic hyperparameter tuning job of SageMaker's, read as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from visiontuner.aws import Aws, AwsRefused
from visiontuner.sagemaker.job import paid_seconds

_STATES = {
    "Completed": "completed",
    "Stopped": "interrupted",
    "Stopping": "running",
    "Failed": "failed",
    "InProgress": "running",
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a training was tuned for: a metric's name, and whether less or more of it is better."""

    name: str = "objective"
    mode: Literal["min", "max"] = "max"


@dataclass(frozen=True, kw_only=True)
class TunedJob:
    """One training job of a tuning job.

    Attributes:
        state: as a trial's: completed, interrupted, failed or running.
        parameters: those that were tuned and those that were fixed, as text.
        metrics: the last value of each.
        value: of the objective, as the tuning job saw it; None: there is none.
        seconds: what one of its machines is paid for.
    """

    name: str
    state: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    objective: Objective
    value: float | None
    started: datetime
    ended: datetime | None
    seconds: float
    instances: int
    instance_type: str
    error: str
    model: str | None


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """A whole tuning job; each of its training job definitions may have its own objective."""

    name: str
    status: str
    strategy: str
    started: datetime
    ended: datetime | None
    jobs: tuple[TunedJob, ...]

    @property
    def objectives(self) -> list[Objective]:
        """All that are there, each once."""
        return list(dict.fromkeys(job.objective for job in self.jobs))

    def best(self, objective: Objective) -> TunedJob | None:
        """Of the jobs that were tuned for it; None: none has a value."""
        tried = [j for j in self.jobs if j.objective == objective and j.value is not None]
        choose = min if objective.mode == "min" else max
        return choose(tried, key=lambda job: job.value or 0.0, default=None)


def find_tuning_job(aws: Aws, name: str) -> TuningJob | None:
    """A tuning job and all that it trained; None if there is none of that name."""
    try:
        told = aws.call(
            "sagemaker", "describe_hyper_parameter_tuning_job", HyperParameterTuningJobName=name
        )
    except AwsRefused as error:
        if error.is_missing or error.code in ("ResourceNotFound", "ValidationException"):
            return None
        raise
    summaries = aws.pages(
        "sagemaker",
        "list_training_jobs_for_hyper_parameter_tuning_job",
        "TrainingJobSummaries",
        HyperParameterTuningJobName=name,
        SortBy="CreationTime",
        SortOrder="Ascending",
    )
    aims = _objectives(told)
    return TuningJob(
        name=name,
        status=told["HyperParameterTuningJobStatus"],
        strategy=told["HyperParameterTuningJobConfig"].get("Strategy", ""),
        started=told["CreationTime"],
        ended=told.get("HyperParameterTuningEndTime"),
        jobs=tuple(_tuned(aws, summary, aims) for summary in summaries),
    )


def _objectives(told: dict[str, Any]) -> dict[str, Objective]:
    """By the name of a training job definition; "" is of the whole tuning job."""
    whole = told["HyperParameterTuningJobConfig"].get("HyperParameterTuningJobObjective")
    definitions = told.get("TrainingJobDefinitions") or [told.get("TrainingJobDefinition") or {}]
    aims = [("", whole)]
    aims += [(one.get("DefinitionName") or "", one.get("TuningObjective")) for one in definitions]
    return {name: _objective(aim) for name, aim in aims if aim}


def _objective(aim: Mapping[str, Any]) -> Objective:
    return Objective(
        name=aim.get("MetricName") or Objective.name,
        mode="min" if aim.get("Type") == "Minimize" else "max",
    )


def _objective_of(summary: dict[str, Any], aims: Mapping[str, Objective]) -> Objective:
    """What the tuning job says of this very job comes first."""
    planned = aims.get(summary.get("TrainingJobDefinitionName") or "") or aims.get("")
    seen = summary.get("FinalHyperParameterTuningJobObjectiveMetric") or {}
    if seen.get("Type") or planned is None:
        return _objective(seen)
    return planned


def _tuned(aws: Aws, summary: dict[str, Any], aims: Mapping[str, Objective]) -> TunedJob:
    name = summary["TrainingJobName"]
    told = aws.call("sagemaker", "describe_training_job", TrainingJobName=name)
    final = summary.get("FinalHyperParameterTuningJobObjectiveMetric") or {}
    resources = told.get("ResourceConfig") or {}
    fixed = {key: _plain(value) for key, value in (told.get("HyperParameters") or {}).items()}
    tuned = {key: _plain(value) for key, value in summary["TunedHyperParameters"].items()}
    metrics = {one["MetricName"]: one["Value"] for one in told.get("FinalMetricDataList") or ()}
    return TunedJob(
        name=name,
        state=_STATES.get(told["TrainingJobStatus"], "running"),
        # The SDK's own, such as sagemaker_submit_directory, say nothing about the training.
        parameters={k: v for k, v in (fixed | tuned).items() if not k.startswith("sagemaker_")},
        metrics=metrics,
        objective=_objective_of(summary, aims),
        value=final.get("Value"),
        started=told.get("TrainingStartTime") or told["CreationTime"],
        ended=told.get("TrainingEndTime"),
        seconds=paid_seconds(told, now=datetime.now(UTC)),
        instances=int(resources.get("InstanceCount") or 1),
        instance_type=str(resources.get("InstanceType") or ""),
        error=" ".join(str(told.get("FailureReason") or "").split()),
        model=(told.get("ModelArtifacts") or {}).get("S3ModelArtifacts"),
    )


def _plain(value: str) -> str:
    """The SDK writes parameters as JSON: `"adam"` with its quotes is adam."""
    try:
        read = json.loads(value)
    except ValueError:
        return value
    return read if isinstance(read, str) else value
