"""More of SageMaker's jobs for the stand-in: what moto lacks, and jobs that a test directs.

A job whose image has `directed` in its name, or any while the object `all` is in the bucket
`directed-jobs`, runs nothing: it is in progress until the object
JOB.json in the bucket `directed-jobs` says otherwise, `{"status": …, "secondary": …, "reason": …,
"seconds": …}`, and stopped when it is asked to stop. Tuning jobs have the training jobs whose names
begin with theirs; TUNING-JOB.json says the same of each by its name, with `tuned` (parameters),
`metrics`, `objective` (its value), `aim` (its name and type) and `definition`. The account's quotas
are the object `quotas.json` there, by name, and the answers about SageMaker's MLflow `mlflow.json`.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from moto.core.exceptions import ServiceException
from moto.core.responses import ActionResult
from moto.iam.responses import IamResponse
from moto.s3.models import s3_backends
from moto.sagemaker.responses import SageMakerResponse
from moto.servicequotas.responses import ServiceQuotasResponse

BUCKET = "directed-jobs"
NO_QUOTA = "ml.p3.16xlarge"


class ResourceNotFound(ServiceException):
    code = "ResourceNotFound"


class ResourceLimitExceeded(ServiceException):
    code = "ResourceLimitExceeded"


def _read(response: Any, key: str) -> Any:
    buckets = s3_backends[response.current_account]["aws"].buckets
    if BUCKET not in buckets or key not in buckets[BUCKET].keys:
        return None
    return json.loads(buckets[BUCKET].keys[key].value)


def _is_directed(response: Any, request: dict[str, Any]) -> bool:
    named = "directed" in request["AlgorithmSpecification"].get("TrainingImage", "")
    return named or _read(response, "all") is not None


def simulate_principal_policy(_: Any) -> Any:
    """Everything is allowed."""
    return ActionResult({"EvaluationResults": []})


def list_service_quotas(self: Any) -> str:
    quotas = _read(self, "quotas.json") or {}
    return json.dumps(
        {"Quotas": [{"QuotaName": name, "Value": value} for name, value in quotas.items()]}
    )


def describe_mlflow_app(self: Any) -> Any:
    return _describe_mlflow(self, self._get_param("Arn"))


def describe_mlflow_tracking_server(self: Any) -> Any:
    return _describe_mlflow(self, self._get_param("TrackingServerName"))


def _describe_mlflow(self: Any, name: str) -> Any:
    told = (_read(self, "mlflow.json") or {}).get(name)
    if told is None:
        raise ResourceNotFound(f"No MLflow of this name: {name}")
    return ActionResult(told)


def list_training_jobs_for_hyper_parameter_tuning_job(self: Any) -> Any:
    name = self._get_param("HyperParameterTuningJobName")
    objectives = _read(self, f"{name}.json") or {}
    summaries = []
    for job in self.sagemaker_backend.training_jobs.values():
        if not job.training_job_name.startswith(f"{name}-"):
            continue
        told = objectives.get(job.training_job_name, {})
        _direct(job, told)
        summary = {
            "TrainingJobName": job.training_job_name,
            "TrainingJobArn": job.arn,
            "CreationTime": job.creation_time,
            "TrainingJobStatus": job.training_job_status,
            "TunedHyperParameters": told.get("tuned", {}),
        }
        if "definition" in told:
            summary["TrainingJobDefinitionName"] = told["definition"]
        if "objective" in told:
            aim = told.get("aim", {"MetricName": "accuracy"})
            seen = {**aim, "Value": told["objective"]}
            summary["FinalHyperParameterTuningJobObjectiveMetric"] = seen
        summaries.append(summary)
    return ActionResult({"TrainingJobSummaries": summaries})


def _direct(job: Any, told: dict[str, Any]) -> None:
    job.training_job_status = told.get("status", job.training_job_status)
    job.secondary_status = told.get("secondary", job.training_job_status)
    job.failure_reason = told.get("reason") or None
    if "metrics" in told:
        job.final_metric_data_list = [
            {"MetricName": name, "Value": value, "Timestamp": job.creation_time}
            for name, value in told["metrics"].items()
        ]
    if "seconds" in told:
        job.training_start_time = job.creation_time
        job.billable_time_in_seconds = told["seconds"]
        job.training_end_time = job.creation_time + timedelta(seconds=told["seconds"])


def install() -> None:
    """Put these before what is there already."""
    create, describe = (
        SageMakerResponse.create_training_job,
        SageMakerResponse.describe_training_job,
    )
    plain = _plain_create
    stop = SageMakerResponse.stop_training_job  # type: ignore[attr-defined]

    def create_training_job(self: Any) -> Any:
        request = json.loads(self.body)
        if request["ResourceConfig"]["InstanceType"] == NO_QUOTA:
            raise ResourceLimitExceeded(
                f"The account-level service limit '{NO_QUOTA} for training job usage' is 0 "
                "Instances, with current utilization of 0 Instances and a request delta of 1."
            )
        if not _is_directed(self, request):
            return create(self)
        result = plain(self)
        job = self.sagemaker_backend.training_jobs[request["TrainingJobName"]]
        job.algorithm_specification = request["AlgorithmSpecification"]
        job.environment = request.get("Environment", {})
        job.final_metric_data_list = []
        job.training_end_time = None
        job.training_job_status, job.secondary_status = "InProgress", "Training"
        return result

    def describe_training_job(self: Any) -> Any:
        name = self._get_param("TrainingJobName")
        told = _read(self, f"{name}.json")
        if told is not None and name in self.sagemaker_backend.training_jobs:
            _direct(self.sagemaker_backend.training_jobs[name], told)
        return describe(self)

    def stop_training_job(self: Any) -> Any:
        job = self.sagemaker_backend.training_jobs.get(self._get_param("TrainingJobName"))
        if job is None or "directed" not in job.algorithm_specification.get("TrainingImage", ""):
            return stop(self)
        job.training_job_status = job.secondary_status = "Stopped"
        return ActionResult({})

    IamResponse.simulate_principal_policy = simulate_principal_policy  # type: ignore[attr-defined]
    ServiceQuotasResponse.list_service_quotas = list_service_quotas  # type: ignore[attr-defined]
    SageMakerResponse.list_training_jobs_for_hyper_parameter_tuning_job = (  # type: ignore[attr-defined]
        list_training_jobs_for_hyper_parameter_tuning_job
    )
    SageMakerResponse.describe_mlflow_app = describe_mlflow_app  # type: ignore[attr-defined]
    SageMakerResponse.describe_mlflow_tracking_server = (  # type: ignore[attr-defined]
        describe_mlflow_tracking_server
    )
    SageMakerResponse.create_training_job = create_training_job  # type: ignore[method-assign]
    SageMakerResponse.describe_training_job = describe_training_job  # type: ignore[method-assign]
    SageMakerResponse.stop_training_job = stop_training_job  # type: ignore[attr-defined]


_plain_create = SageMakerResponse.create_training_job
