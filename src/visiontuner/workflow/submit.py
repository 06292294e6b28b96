"""Send a search to SageMaker: what it needs is found and checked first, and said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visiontuner import interrupts
from visiontuner.experiment import Experiment
from visiontuner.locations import tracking_uri
from visiontuner.workflow.job_options import DEFAULT_INSTANCE, JobOptions
from visiontuner.workflow.job_pictures import check_source, find_pictures, upload_pictures
from visiontuner.workflow.resumed_job import require_idle, resume_job

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.plan import JobPlan


def plan_job(experiment: Experiment | None, options: JobOptions) -> tuple[Aws, JobPlan]:
    """Find and check everything that a job needs; makes nothing.

    Args:
        experiment: None with `options.resume`, which has its own.

    Raises:
        UserMistake: something is missing or cannot work.
        ServingError: AWS refuses or cannot be reached.
    """
    from visiontuner.aws import Aws
    from visiontuner.aws_account import find_bucket, find_role, hourly_price
    from visiontuner.sagemaker.cost import Price, limit_seconds
    from visiontuner.sagemaker.plan import JobPlan
    from visiontuner.sagemaker.reach import reachable_tracking
    from visiontuner.sagemaker.surroundings import check_quota, find_image

    _ = options.max_run_seconds, options.warm_pool_seconds  # a mistake is told before AWS is asked
    if experiment is not None:
        check_source(experiment, options.upload)
    aws = Aws(options.region, options.assume_role)
    search, experiment, options = _what_to_run(aws, experiment, options)
    kind, instances = options.instance_type or DEFAULT_INSTANCE, options.instances or 1
    default = f"sagemaker-{aws.region}-{aws.account}"
    bucket, exists = find_bucket(aws, options.bucket, default=default)
    pictures = find_pictures(aws, experiment, options.upload)
    if pictures is not None:
        data = experiment.data.model_copy(update={"source": pictures.uri})
        experiment = experiment.model_copy(update={"data": data})
    hourly = options.price if options.price is not None else hourly_price(aws, kind, "Training")
    price = Price(per_hour=hourly, instances=instances)
    tracking, words = reachable_tracking(tracking_uri(), in_vpc=bool(options.subnets))
    plan = JobPlan(
        search=search,
        experiment=experiment,
        region=aws.region,
        account=aws.account,
        caller=aws.caller,
        role=find_role(aws, options.role),
        bucket=bucket,
        bucket_exists=exists,
        image=options.image or "",
        instance_type=kind,
        instances=instances,
        max_run_seconds=limit_seconds(
            price,
            max_run_seconds=options.max_run_seconds,
            warm_pool_seconds=options.warm_pool_seconds,
            max_cost=options.max_cost,
        ),
        price=price,
        tracking_uri=tracking,
        tracking=words,
        pictures=pictures,
        disk_gb=options.volume,
        spot=bool(options.spot),
        warm_pool_seconds=int(options.warm_pool_seconds),
        subnets=options.subnets or (),
        security_groups=options.security_groups or (),
        kms_key=options.kms_key or None,
        tags=options.tags,
        resumed=options.resume,
    )
    check_quota(aws, kind, instances, spot=plan.spot, warm_pool=plan.warm_pool_seconds > 0)
    # Last: the SDK, which knows AWS's images, takes seconds to import.
    image = find_image(aws, options.image, kind, version=options.image_version)
    return aws, replace(plan, image=image)


def dry_run(aws: Aws, plan: JobPlan) -> dict[str, Any]:
    """The request that `submit_job` would send, checked; nothing is made or uploaded."""
    from visiontuner.sagemaker.job import dry_run as look

    return look(aws, plan)


def submit_job(
    aws: Aws,
    plan: JobPlan,
    *,
    note: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Upload what the job needs and create it; returns its name.

    Raises:
        ServingError: AWS refuses: quota, capacity, role.
    """
    from visiontuner.sagemaker.job import submit

    if plan.resumed is not None:  # once more: a question may have been open for hours
        require_idle(aws, plan.search)
    upload_pictures(aws, plan, note=note, progress=progress)
    with interrupts.in_order():  # the name of a job that was created is told
        return submit(aws, plan, note=note)


def _what_to_run(
    aws: Aws, experiment: Experiment | None, options: JobOptions
) -> tuple[str, Experiment, JobOptions]:
    """The search's name, its experiment, and what its job has to be."""
    if options.resume is not None:
        resumed = resume_job(aws, options.resume, options)
        return resumed.search, resumed.experiment, resumed.options
    assert experiment is not None
    return _search_name(experiment), experiment, options


def _search_name(experiment: Experiment) -> str:
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", experiment.name).strip("-")
    return f"{plain or 'search'}-{time.strftime('%Y%m%d-%H%M%S')}"
