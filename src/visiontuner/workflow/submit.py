"""Send a search to SageMaker: what it needs is found and checked first, and said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.data.objects import split_uri
from visiontuner.errors import UserMistake
from visiontuner.experiment import Experiment, parse_duration
from visiontuner.locations import tracking_uri

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.job import Job
    from visiontuner.sagemaker.plan import JobPlan, Pictures

DEFAULT_INSTANCE = "ml.g5.xlarge"
DEFAULT_MAX_RUN = "2h"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a user may choose; None: found, or a default.

    Args:
        instances, instance_type, volume, image: with `resume` as that job had them if None.
        image: URL of a training image; AWS's newest PyTorch image if None.
        role: name or ARN of the role that the job runs as.
        bucket: for everything the job keeps; by default SageMaker's of this account and region.
        max_run: how long the job may run, as `2h`.
        max_cost: US dollars; shortens `max_run`.
        price: US dollars for an hour of one instance.
        volume: GB of each machine's disk; by the size of the pictures if None.
        warm_pool: how long machines stay for a next job, as `30m`.
        upload: `s3://BUCKET/FOLDER`, where pictures of this machine are brought.
        resume: a job of ours; its search goes on from its checkpoints.
    """

    instances: int | None = None
    instance_type: str | None = None
    image: str | None = None
    role: str | None = None
    bucket: str | None = None
    region: str | None = None
    assume_role: str | None = None
    spot: bool = False
    max_run: str | None = None
    max_cost: float | None = None
    price: float | None = None
    volume: int | None = None
    warm_pool: str | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    upload: str | None = None
    resume: str | None = None


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
    from visiontuner.sagemaker.surroundings import check_quota, find_image, reachable_tracking

    max_run = _seconds("--max-run", options.max_run or DEFAULT_MAX_RUN)
    warm_pool = _seconds("--warm-pool", options.warm_pool) if options.warm_pool else 0.0
    if experiment is not None:
        _check_source(experiment, options)
    aws = Aws(options.region, options.assume_role)
    before = _ended(aws, options.resume) if options.resume is not None else None
    search, experiment, bucket = _search(aws, experiment, options, before)
    options = _as_before(options, before)
    kind, instances = options.instance_type or DEFAULT_INSTANCE, options.instances or 1
    default = f"sagemaker-{aws.region}-{aws.account}"
    bucket, exists = find_bucket(aws, bucket, default=default)
    pictures = _pictures(aws, experiment, options)
    if pictures is not None:
        data = experiment.data.model_copy(update={"source": pictures.uri})
        experiment = experiment.model_copy(update={"data": data})
    hourly = options.price if options.price is not None else hourly_price(aws, kind, "Training")
    price = Price(per_hour=hourly, instances=instances)
    tracking, words = reachable_tracking(tracking_uri())
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
            price, max_run_seconds=max_run, warm_pool_seconds=warm_pool, max_cost=options.max_cost
        ),
        price=price,
        tracking_uri=tracking,
        tracking=words,
        pictures=pictures,
        disk_gb=options.volume,
        spot=options.spot,
        warm_pool_seconds=int(warm_pool),
        subnets=options.subnets,
        security_groups=options.security_groups,
        kms_key=options.kms_key,
        tags=options.tags,
        resumed=options.resume,
    )
    check_quota(aws, kind, instances, spot=options.spot)
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


def _ended(aws: Aws, name: str) -> Job:
    """The job whose search goes on.

    Raises:
        UserMistake: there is none, or it is still running.
    """
    from visiontuner.sagemaker.job import describe

    job = describe(aws, name)
    if not job.ended:
        raise UserMistake(
            f"{job.name} is still running; follow it with `visiontuner attach {job.name}`, or end "
            f"it with `visiontuner stop {job.name}` first."
        )
    return job


def _as_before(options: JobOptions, before: Job | None) -> JobOptions:
    """With the machines of the job that this one follows, where nothing else is asked for."""
    if before is None:
        return options
    return replace(
        options,
        instances=options.instances or before.instances,
        instance_type=options.instance_type or before.instance_type,
        image=options.image or before.image,
        volume=options.volume or before.disk_gb or None,
    )


def _search(
    aws: Aws, experiment: Experiment | None, options: JobOptions, before: Job | None
) -> tuple[str, Experiment, str | None]:
    """The search's name, its experiment, and the bucket that it is bound to, if it is."""
    if before is None:
        assert experiment is not None
        plain = re.sub(r"[^a-zA-Z0-9]+", "-", experiment.name or "search").strip("-")
        return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}", experiment, options.bucket
    from visiontuner.sagemaker import s3
    from visiontuner.sagemaker.job import EXPERIMENT

    root = (before.checkpoints or "").removesuffix("/checkpoints")
    content = s3.get(aws, f"{root}/{EXPERIMENT}") if before.search and root else None
    if content is None:
        raise UserMistake(f"{before.name} has no search of ours to go on with.")
    import yaml

    return before.search, Experiment.parse(yaml.safe_load(content)), split_uri(root)[0]


def _check_source(experiment: Experiment, options: JobOptions) -> None:
    """Refuse what a job could not read, before AWS is asked for anything.

    Raises:
        UserMistake: pictures or weights of this machine.
    """
    from visiontuner.sagemaker.plan import check_no_apostrophe

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
    from visiontuner.sagemaker.plan import Pictures
    from visiontuner.sagemaker.surroundings import (
        as_channel,
        check_bucket_region,
        size_on_s3,
    )

    source = experiment.data.source
    if source.lower().startswith("s3://"):
        uri = as_channel(source)
        return Pictures(uri=uri, size=size_on_s3(aws, uri))
    if _is_elsewhere(source):
        return None
    folder = Path(source).expanduser().resolve()
    uri = as_channel(options.upload or "")
    check_bucket_region(aws, split_uri(uri)[0])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Pictures(uri=uri, size=size, upload=folder)


def _seconds(flag: str, text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if not isinstance(seconds, float) or seconds < 60:
        raise UserMistake(
            f"{flag} takes a time such as 30m or 2h, of a minute at least, got {text!r}."
        )
    return seconds
