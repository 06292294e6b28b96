"""What a job was submitted with, for another one that goes on with its search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visiontuner.aws import Aws
from visiontuner.journal import SearchRecord
from visiontuner.sagemaker.follow import JournalTail
from visiontuner.sagemaker.job import Job, describe
from visiontuner.sagemaker.plan import PREFIX, PRICE_TAG, SEARCH_TAG

_AWSS_OWN = "aws:"  # such tags are read only


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What SageMaker says of a job's request, beside what `Job` holds.

    Attributes:
        tags: the user's; neither ours nor AWS's own.
    """

    role: str
    max_run_seconds: int
    warm_pool_seconds: int
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]
    kms_key: str | None
    tags: Mapping[str, str]


def submitted_with(aws: Aws, job: Job) -> Submitted:
    """A job's request, as far as a user can choose it."""
    told = aws.call("sagemaker", "describe_training_job", TrainingJobName=job.name)
    network = told.get("VpcConfig") or {}
    listed = aws.pages("sagemaker", "list_tags", "Tags", ResourceArn=told["TrainingJobArn"])
    return Submitted(
        role=told["RoleArn"],
        max_run_seconds=told["StoppingCondition"]["MaxRuntimeInSeconds"],
        warm_pool_seconds=told["ResourceConfig"].get("KeepAlivePeriodInSeconds") or 0,
        subnets=tuple(network.get("Subnets") or ()),
        security_groups=tuple(network.get("SecurityGroupIds") or ()),
        kms_key=(told.get("OutputDataConfig") or {}).get("KmsKeyId") or None,
        tags={
            tag["Key"]: tag["Value"]
            for tag in listed
            if tag["Key"] not in (SEARCH_TAG, PRICE_TAG) and not tag["Key"].startswith(_AWSS_OWN)
        },
    )


def running_job(aws: Aws, search: str) -> Job | None:
    """The job that is running a search, or about to end it."""
    for status in ("InProgress", "Stopping"):
        entries = aws.pages(
            "sagemaker",
            "list_training_jobs",
            "TrainingJobSummaries",
            NameContains=f"{PREFIX}-",
            StatusEquals=status,
        )
        for entry in entries:
            job = describe(aws, entry["TrainingJobName"])
            if job.search == search and not job.ended:
                return job
    return None


def record_of(aws: Aws, job: Job) -> SearchRecord:
    """What a job's search has done, from its journal on S3; empty if there is none."""
    if job.search_folder is None:
        return SearchRecord()
    return SearchRecord.of(JournalTail(aws, job.search_folder).new_events())
