"""Send a search to SageMaker: what it needs is found and checked first, and said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.data.objects import split_uri
from visiontuner.errors import UserMistake
from visiontuner.experiment import Experiment
from visiontuner.locations import tracking_uri
from visiontuner.workflow.job_options import DEFAULT_INSTANCE, JobOptions
from visiontuner.workflow.resumed_job import require_idle, resume_job

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.plan import JobPlan, Pictures


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
        _check_source(experiment, options)
    aws = Aws(options.region, options.assume_role)
    search, experiment, options = _what_to_run(aws, experiment, options)
    kind, instances = options.instance_type or DEFAULT_INSTANCE, options.instances or 1
    default = f"sagemaker-{aws.region}-{aws.account}"
    bucket, exists = find_bucket(aws, options.bucket, default=default)
    pictures = _pictures(aws, experiment, options)
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
    return aws, replace(plan, image=find_image(aws, options.image, kind))


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
    if plan.pictures is not None and plan.pictures.upload is not None:
        from visiontuner.data.s3 import connect
        from visiontuner.data.storage import upload_folder

        moved = upload_folder(
            plan.pictures.upload,
            plan.pictures.uri,
            client=connect(aws.session, aws.region),
            kms_key=plan.kms_key,
            progress=progress,
            note=note,
        )
        note(
            f"Uploaded {moved.files:,} pictures to {plan.pictures.uri}; {moved.skipped:,} were "
            "there already."
        )
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
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", experiment.name or "search").strip("-")
    return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_source(experiment: Experiment, options: JobOptions) -> None:
    """Refuse what a job could not read, before AWS is asked for anything.

    Raises:
        UserMistake: pictures or weights of this machine.
    """
    from visiontuner.sagemaker.limits import check_no_apostrophe

    source, weights = experiment.data.source, experiment.model.weights
    check_no_apostrophe("The data source", source)
    check_no_apostrophe("--upload", options.upload or "")
    if weights not in ("default", "none") and "://" not in weights:
        raise UserMistake(
            f"model.weights is {weights}, a file of this machine; bring it to S3 or to an https "
            "server and name that."
        )
    if _is_elsewhere(source):
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise UserMistake(f"There is no data at {source}; name a folder, or s3://BUCKET/FOLDER.")
    if options.upload is None:
        raise UserMistake(
            f"{source} is on this machine, where a job cannot read it. Add --upload "
            f"s3://BUCKET/{path.resolve().name}, or name pictures that are on S3 already."
        )
    if not path.is_dir():
        raise UserMistake(f"--upload takes a folder, and {source} is a file: unpack it first.")


def _is_elsewhere(source: str) -> bool:
    return source == "digits" or source.split("://")[0].lower() in ("s3", "http", "https")


def _pictures(aws: Aws, experiment: Experiment, options: JobOptions) -> Pictures | None:
    from visiontuner.aws_account import check_bucket_region
    from visiontuner.sagemaker.plan import Pictures
    from visiontuner.sagemaker.surroundings import as_channel, size_on_s3

    source = experiment.data.source
    if source.lower().startswith("s3://"):
        uri = as_channel(source)
        return Pictures(uri=uri, size=size_on_s3(aws, uri))
    if _is_elsewhere(source):
        return None
    folder = Path(source).expanduser().resolve()
    uri = f"{(options.upload or '').rstrip('/')}/"  # a folder, whatever its name ends with
    check_bucket_region(aws, split_uri(uri)[0])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Pictures(uri=uri, size=size, upload=folder)
