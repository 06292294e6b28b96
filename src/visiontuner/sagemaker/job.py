"""Training jobs that run our searches: submit, describe, list, stop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from visiontuner.aws import Aws, AwsRefused
from visiontuner.commands import next_command
from visiontuner.data.files import temporary_folder
from visiontuner.errors import UserMistake
from visiontuner.sagemaker import s3
from visiontuner.sagemaker.cost import Price
from visiontuner.sagemaker.plan import PREFIX, PRICE_TAG, SEARCH_TAG, JobPlan
from visiontuner.sagemaker.request import dry_request, send_request
from visiontuner.sagemaker.source import JobFile, write_source

EXPERIMENT = "experiment.yaml"
_ENDED = ("Completed", "Failed", "Stopped")
_ADVICE = {
    "CapacityError": "AWS has no such machines now: choose another --instance-type or --region, or "
    "try later.",
    "Insufficient capacity": "AWS has no such machines now: choose another --instance-type or "
    "--region, or try later.",
    "MaxRuntimeExceeded": "Allow more with --max-run.",
    "MaxWaitTimeExceeded": "Leave spot machines out (--spot off), choose another --instance-type, "
    "or try later.",
    "No space left": "A disk was full: ask for a larger one with --volume or, where a machine has "
    "its own (ml.g5 say), for a larger --instance-type.",
    "No matching distribution": "The image's Python has no such version: name another --image.",
    "could not be installed": "The image's Python has no such version: name another --image.",
}
_TIME = len("20261122224611")
_SHOWN = 50  # jobs of a list: describing one is a request


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job as SageMaker describes it now.

    Attributes:
        status: InProgress, Stopping, Stopped, Completed or Failed; `stage` says it finer.
        reason: why it failed, in SageMaker's words.
        seconds: how long its machines have been running, which is what is paid for.
        cost: US dollars so far; None where the price is not known.
        image: the URL of what its machines run.
        disk_gb: of each machine.
        max_run_seconds: when SageMaker ends it; `max_wait_seconds` the same of a spot job with all
            its waiting for machines.
        checkpoints: the S3 folder that later jobs of this search go on with.
        archive: its model.tar.gz, once it is completed.
    """

    name: str
    status: str
    stage: str
    reason: str
    search: str
    created: datetime
    instance_type: str
    instances: int
    spot: bool
    image: str
    disk_gb: int
    seconds: float
    price: Price
    max_run_seconds: int
    max_wait_seconds: int
    checkpoints: str | None
    archive: str | None

    @property
    def ended(self) -> bool:
        return self.status in _ENDED

    @property
    def cost(self) -> float | None:
        return self.price.of(self.seconds)

    @property
    def search_folder(self) -> str | None:
        """The search folder in S3."""
        return f"{self.checkpoints.rstrip('/')}/search" if self.checkpoints else None

    @property
    def age_hours(self) -> float:
        return (datetime.now(UTC) - self.created).total_seconds() / 3600


def dry_run(aws: Aws, plan: JobPlan) -> dict[str, Any]:
    """The request that `submit` would send; makes and uploads nothing."""
    with temporary_folder() as folder:
        source = _write(plan, folder)
    return dry_request(aws, plan, f"{plan.root}/{source.name}")


def submit(aws: Aws, plan: JobPlan, *, note: Callable[[str], None]) -> str:
    """Upload what the job needs and create it; returns its name.

    Raises:
        AwsRefused: AWS says no.
        JobFailed: SageMaker would not take the request.
    """
    if not plan.bucket_exists:
        s3.make_bucket(aws, plan.bucket)
        note(f"Made the bucket {plan.bucket}.")
    with temporary_folder() as folder:
        source = _write(plan, folder)
        uri = f"{plan.root}/{source.name}"
        s3.put(aws, uri, source.read_bytes(), kms_key=plan.kms_key)
    experiment = plan.experiment.to_yaml().encode()
    s3.put(aws, f"{plan.root}/{EXPERIMENT}", experiment, kms_key=plan.kms_key)
    note(f"Uploaded the source to {uri}.")
    return send_request(aws, plan, uri)


def _write(plan: JobPlan, folder: Path) -> Path:
    orders = JobFile(tracking_uri=plan.tracking_uri, token=secrets.token_hex(32))
    return write_source(folder, experiment=plan.experiment.to_yaml(), job=orders)


def describe(aws: Aws, name: str) -> Job:
    """One job.

    Raises:
        UserMistake: there is none of that name.
    """
    return _job(aws, _described(aws, name))


def find_jobs(aws: Aws) -> list[Job]:
    """Ours in this region, the newest first."""
    return list(_ours(aws))


def jobs_of(aws: Aws, job: Job) -> list[Job]:
    """All jobs of one search, oldest first: resumed ones share their checkpoints."""
    if job.checkpoints is None:
        return [job]
    # All but the time that the SDK appends.
    same = [one for one in _ours(aws, job.name[: -1 - _TIME]) if one.checkpoints == job.checkpoints]
    known = {one.name: one for one in (job, *same)}
    return sorted(known.values(), key=lambda one: (one.created, one.name))


def stop(aws: Aws, job: Job) -> None:
    """Ask SageMaker to end a job; its hosts get two minutes to end their search in order.

    Raises:
        UserMistake: it is not ours, or has ended already.
    """
    if not job.search:
        raise UserMistake(
            f"{job.name} was not submitted by visiontuner, and is left alone: `aws sagemaker "
            f"stop-training-job --region {aws.region} --training-job-name {job.name}` ends it."
        )
    if job.ended:
        raise UserMistake(
            f"{job.name} is {job.status.lower()} already; "
            f"`{next_command('attach', job.name, flags=aws.flags)}` brings home what it did."
        )
    aws.call("sagemaker", "stop_training_job", TrainingJobName=job.name)


def advice_on(reason: str) -> str:
    """A sentence for the reasons of SageMaker's that name no next step."""
    for word, advice in _ADVICE.items():
        if word.lower() in reason.lower():
            return f" {advice}"
    return ""


def _ours(aws: Aws, contains: str = f"{PREFIX}-") -> Iterator[Job]:
    found = aws.pages(
        "sagemaker",
        "list_training_jobs",
        "TrainingJobSummaries",
        NameContains=contains,
        SortBy="CreationTime",
        SortOrder="Descending",
    )
    newest = sorted(found, key=lambda entry: entry["CreationTime"], reverse=True)
    for entry in newest[:_SHOWN]:
        job = _job(aws, _described(aws, entry["TrainingJobName"]))
        if job.search:
            yield job


def _described(aws: Aws, name: str) -> dict[str, Any]:
    try:
        return aws.call("sagemaker", "describe_training_job", TrainingJobName=name)
    except AwsRefused as error:
        if error.is_missing or "not found" in str(error) or error.code == "ValidationException":
            raise UserMistake(
                f"There is no training job {name!r} in {aws.region}. "
                f"`{next_command('jobs', flags=aws.flags)}` lists ours."
            ) from None
        raise


def _job(aws: Aws, told: dict[str, Any]) -> Job:
    tags = {
        tag["Key"]: tag["Value"]
        for tag in aws.pages("sagemaker", "list_tags", "Tags", ResourceArn=told["TrainingJobArn"])
    }
    resources = told.get("ResourceConfig") or {}
    limits = told.get("StoppingCondition") or {}
    instances = int(resources.get("InstanceCount") or 1)
    price = tags.get(PRICE_TAG)
    return Job(
        name=told["TrainingJobName"],
        status=told["TrainingJobStatus"],
        stage=told.get("SecondaryStatus") or told["TrainingJobStatus"],
        reason=" ".join(str(told.get("FailureReason") or "").split()),
        search=tags.get(SEARCH_TAG, ""),
        created=told["CreationTime"],
        instance_type=str(resources.get("InstanceType") or ""),
        instances=instances,
        spot=bool(told.get("EnableManagedSpotTraining")),
        image=str((told.get("AlgorithmSpecification") or {}).get("TrainingImage") or ""),
        disk_gb=int(resources.get("VolumeSizeInGB") or 0),
        seconds=paid_seconds(told, now=datetime.now(UTC)),
        price=Price(per_hour=float(price) if price else None, instances=instances),
        max_run_seconds=int(limits.get("MaxRuntimeInSeconds") or 0),
        max_wait_seconds=int(limits.get("MaxWaitTimeInSeconds") or 0),
        checkpoints=(told.get("CheckpointConfig") or {}).get("S3Uri"),
        archive=(told.get("ModelArtifacts") or {}).get("S3ModelArtifacts"),
    )


def paid_seconds(told: dict[str, Any], *, now: datetime) -> float:
    """Of each machine: what SageMaker bills once a job has ended, and its running time before.

    Args:
        told: SageMaker's description of the job.
    """
    ended = told["TrainingJobStatus"] in _ENDED
    if ended and told.get("BillableTimeInSeconds") is not None:
        return float(told["BillableTimeInSeconds"])
    began = told.get("TrainingStartTime")
    if began is None:
        return 0.0
    end = told.get("TrainingEndTime") if ended else now
    return max(0.0, float(((end or now) - began).total_seconds()))
