"""A classic hyperparameter tuning job of SageMaker's, read as plain values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

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
class TunedJob:
    """One training job of a tuning job.

    Attributes:
        state: as a trial's: completed, interrupted, failed or running.
        parameters: those that were tuned and those that were fixed, as text.
        metrics: the last value of each.
        objective: the value that the tuning job looked at.
        seconds: what one of its machines is paid for.
    """

    name: str
    state: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    objective: float | None
    started: datetime
    ended: datetime | None
    seconds: float
    instances: int
    instance_type: str
    error: str
    model: str | None


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """A whole tuning job; `objective` is its metric's name."""

    name: str
    status: str
    strategy: str
    objective: str
    mode: str
    started: datetime
    ended: datetime | None
    best: str | None
    jobs: tuple[TunedJob, ...]


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
    config = told["HyperParameterTuningJobConfig"]
    aim = config.get("HyperParameterTuningJobObjective") or {}
    return TuningJob(
        name=name,
        status=told["HyperParameterTuningJobStatus"],
        strategy=config.get("Strategy", ""),
        objective=aim.get("MetricName", "objective"),
        mode="min" if aim.get("Type") == "Minimize" else "max",
        started=told["CreationTime"],
        ended=told.get("HyperParameterTuningEndTime"),
        best=(told.get("BestTrainingJob") or {}).get("TrainingJobName"),
        jobs=tuple(_tuned(aws, summary) for summary in summaries),
    )


def _tuned(aws: Aws, summary: dict[str, Any]) -> TunedJob:
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
        objective=final.get("Value"),
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
