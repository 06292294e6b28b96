"""Send a search to SageMaker: what it needs is found and checked first, and said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from visiontuner import interrupts
from visiontuner.aws import job as s3
from visiontuner.aws import managed_mlflow
from visiontuner.aws.account import (
    find_bucket,
    find_role,
    has_own_disk,
    hourly_price,
    require_bucket,
)
from visiontuner.aws.job import (
    EXPERIMENT,
    Job,
    Submitted,
    describe,
    jobs_of,
    record_of,
    running_job,
    submit,
    submitted_with,
)
from visiontuner.aws.request import (
    OUR_VARIABLES,
    JobPlan,
    Price,
    S3Images,
    as_channel,
    awss_version,
    check_no_apostrophe,
    check_quota,
    find_container_image,
    limit_seconds,
    reachable_tracking,
    size_on_s3,
)
from visiontuner.data.labels import is_table_name
from visiontuner.errors import UserMistake
from visiontuner.experiment.reading import parse_yaml
from visiontuner.experiment.schema import Data, Experiment, parse_duration
from visiontuner.io.aws import Aws
from visiontuner.io.s3 import connect, explained, files_in, list_files, upload_folder
from visiontuner.paths import local_path, split_folder, split_uri, tracking_uri
from visiontuner.search.plan import remaining_trials
from visiontuner.text import next_command

# What a user may choose of a training job.


DEFAULT_INSTANCE = "ml.g5.xlarge"
DEFAULT_MAX_RUN = "2h"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a user may choose; None: found, or a default, or with `resume` as that job had it.

    What is empty and not None is left out, even if the job that is resumed had it.

    Args:
        image: URL of a training image in ECR; AWS's PyTorch image if None.
        image_version: of PyTorch in AWS's image, as `2.8`; the newest if None.
        role: name or ARN of the role that the job runs as.
        bucket: for everything the job keeps; by default SageMaker's of this account and region.
        max_run: how long the job may run, as `2h`.
        max_cost: US dollars; shortens `max_run`.
        price: US dollars for an hour of one instance.
        volume: GB of each machine's disk; by the size of the images if None.
        warm_pool: how long machines stay for a next job, as `30m`.
        encrypt_traffic: encrypt what the hosts send each other.
        environment: more variables for the container; with `resume` beside those of that job.
        tags: with `resume` beside those of that job.
        upload: `s3://BUCKET/FOLDER`, where images of this machine are brought.
        resume: a job of ours; its search goes on from its checkpoints.
    """

    instances: int | None = None
    instance_type: str | None = None
    image: str | None = None
    image_version: str | None = None
    role: str | None = None
    bucket: str | None = None
    region: str | None = None
    assume_role: str | None = None
    spot: bool | None = None
    max_run: str | None = None
    max_cost: float | None = None
    price: float | None = None
    volume: int | None = None
    warm_pool: str | None = None
    subnets: tuple[str, ...] | None = None
    security_groups: tuple[str, ...] | None = None
    kms_key: str | None = None
    encrypt_traffic: bool | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    upload: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        if self.image and self.image_version:
            raise UserMistake("--image-version is of AWS's image: leave it or --image out.")

    @property
    def max_run_seconds(self) -> float:
        """Raises UserMistake: it is no time."""
        return _seconds("--max-run", self.max_run or DEFAULT_MAX_RUN)

    @property
    def warm_pool_seconds(self) -> float:
        """Raises UserMistake: it is no time."""
        return _seconds("--warm-pool", self.warm_pool) if self.warm_pool else 0.0


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


# The images of a job: on S3, brought there, or fetched by the job itself.


def check_source(experiment: Experiment, upload: str | None) -> None:
    """Refuse what a job could not read, before AWS is asked for anything.

    Args:
        upload: `s3://BUCKET/FOLDER`, where images of this machine are brought.

    Raises:
        UserMistake: images or weights of this machine, or no images that could be uploaded.
    """

    source, weights = experiment.data.source, experiment.model.weights
    _check_files_beside(experiment.data)
    check_no_apostrophe("The data source", source)
    check_no_apostrophe("--upload", upload or "")
    if weights not in ("default", "none") and "://" not in weights:
        raise UserMistake(
            f"model.weights is {weights}, a file of this machine; bring it to S3 or to an https "
            "server and name that."
        )
    if not _is_elsewhere(source):
        _check_folder(source, upload)
    elif upload is not None:
        raise UserMistake(
            f"--upload brings images of this machine to S3, and the data source is {source}: "
            "leave --upload out, or name a folder as --data."
        )


def _check_folder(source: str, upload: str | None) -> None:
    path = Path(local_path(source)).expanduser()
    if not path.exists():
        raise UserMistake(f"There is no data at {source}; name a folder, or s3://BUCKET/FOLDER.")
    if upload is None:
        raise UserMistake(
            f"{source} is on this machine, where a job cannot read it. Add --upload "
            f"s3://BUCKET/{path.resolve().name}, or name images that are on S3 already."
        )
    if not path.is_dir() and not is_table_name(source):
        raise UserMistake(f"--upload takes a folder, and {source} is a file: unpack it first.")


def _check_files_beside(data: Data) -> None:
    """A job finds `data.labels` and `data.classes` where its images are, and nowhere else."""
    folder = Path(local_path(data.source)).expanduser()
    folder = folder.parent if is_table_name(data.source) else folder
    for key in ("labels", "classes"):
        name = getattr(data, key)
        here = not _is_elsewhere(data.source) and not (folder / name).is_file() if name else False
        if name and (here or Path(name).is_absolute() or ".." in Path(name).parts):
            raise UserMistake(
                f"data.{key} is {name}, which a job cannot read: put it into the folder of the "
                "images, and name it as it is called there."
            )


def _is_elsewhere(source: str) -> bool:
    return source == "digits" or source.split("://")[0].lower() in ("s3", "http", "https")


def find_images(aws: Aws, experiment: Experiment, upload: str | None) -> S3Images | None:
    """What a job reads from S3; None if it fetches its images itself.

    Raises:
        UserMistake: there is nothing, no such bucket, or one in another region.
    """

    source = experiment.data.source
    if source.lower().startswith("s3://"):
        uri = as_channel(source)
        return S3Images(uri=uri, size=size_on_s3(aws, uri))
    if _is_elsewhere(source):
        return None
    path = Path(local_path(source)).expanduser().resolve()
    return _to_upload(aws, path.parent if path.is_file() else path, upload or "")


def _to_upload(aws: Aws, folder: Path, upload: str) -> S3Images:
    bucket, prefix = split_folder(upload)
    uri = f"s3://{bucket}/{prefix}"
    require_bucket(aws, uri)
    files = files_in(folder)
    with explained(bucket, "read"):
        there = list_files(connect(aws.session, aws.region), bucket, prefix)
    return S3Images(
        uri=uri,
        size=sum(path.stat().st_size for path in files.values()),
        upload=folder,
        others=len({remote.name for remote in there} - files.keys()),
    )


def upload_images(
    aws: Aws,
    plan: JobPlan,
    *,
    note: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Bring the images where the job reads them, as far as they are not there."""
    if plan.images is None or plan.images.upload is None:
        return

    moved = upload_folder(
        plan.images.upload,
        plan.images.uri,
        client=connect(aws.session, aws.region),
        kms_key=plan.kms_key,
        progress=progress,
        note=note,
    )
    note(
        f"Uploaded {moved.files:,} images to {plan.images.uri}; {moved.skipped:,} were "
        "there already."
    )


# Another job for the search of an earlier one: on the same checkpoints, with the same options.


Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A search that goes on: its name, its experiment, and what the next job has to be."""

    search: str
    experiment: Experiment
    options: JobOptions


def resume_job(aws: Aws, name: str, options: JobOptions) -> Resumed:
    """What a job needs that goes on with the search of an earlier one.

    Raises:
        UserMistake: there is no such job, it ran no search of ours, a job is running that search
            now, or nothing of it is left to do.
    """

    if options.upload:
        raise UserMistake("--resume goes on with the images it began with: leave --upload out.")
    before = describe(aws, name)
    if not before.ended:
        raise UserMistake(_is_running(aws, before.name))
    experiment = _experiment(aws, before)
    require_idle(aws, before.search)
    _require_unfinished(aws, before, experiment)
    bucket = split_uri(before.checkpoints or "")[0]
    if options.bucket not in (None, bucket):
        raise UserMistake(
            f"The checkpoints of {before.name} are in the bucket {bucket!r}: leave --bucket out."
        )
    chosen = _as_before(replace(options, bucket=bucket), before, submitted_with(aws, before))
    return Resumed(search=before.search, experiment=experiment, options=chosen)


def require_idle(aws: Aws, search: str) -> None:
    """Two jobs on the same checkpoints would write over each other.

    Raises:
        UserMistake: a job is running the search.
    """

    running = running_job(aws, search)
    if running is not None:
        raise UserMistake(_is_running(aws, running.name))


def _is_running(aws: Aws, name: str) -> str:
    return (
        f"{name} is still running this search; follow it with "
        f"`{next_command('attach', name, flags=aws.flags)}`, or end it with "
        f"`{next_command('stop', name, flags=aws.flags)}` first."
    )


def _experiment(aws: Aws, before: Job) -> Experiment:
    root = (before.checkpoints or "").removesuffix("/checkpoints")
    content = s3.get(aws, f"{root}/{EXPERIMENT}") if before.search and root else None
    if content is None:
        raise UserMistake(f"{before.name} has no search of ours to go on with.")
    return Experiment.parse(parse_yaml(content))


def _require_unfinished(aws: Aws, before: Job, experiment: Experiment) -> None:
    """A local `tune --resume` of a search that is done trains nothing either."""

    record = record_of(aws, before)
    if before.status == "Completed" and not record.started:
        raise UserMistake(
            f"{before.name} is completed, and its checkpoints are no longer on S3: "
            f"`{next_command('attach', before.name, flags=aws.flags)}` brings home what it did. "
            "There is nothing to go on from."
        )
    if record.best is None or remaining_trials(experiment, record):
        return
    # Only a job that completed has packaged the best trial.
    for job in [before, *jobs_of(aws, before)]:
        if job.status == "Completed":
            raise UserMistake(
                f"All {len(record.trials)} trials of {before.search} are done, and {job.name} has "
                f"packaged the best: `{next_command('attach', job.name, flags=aws.flags)}` brings "
                "it home."
            )


def _as_before(options: JobOptions, before: Job, submitted: Submitted) -> JobOptions:
    """With what the earlier job had, where nothing else is asked for."""

    # The one excludes the other: what is asked for now wins.
    spot = bool(before.spot and not options.warm_pool)
    warm_pool = f"{submitted.warm_pool_seconds}s" if submitted.warm_pool_seconds else None
    kind = options.instance_type or before.instance_type
    same_type = kind == before.instance_type
    subnets, security_groups = _network(options, submitted)
    own_disk = has_own_disk(before.instance_type) or has_own_disk(kind)
    return replace(
        _with_image(options, before, same_type=same_type),
        instances=options.instances or before.instances,
        instance_type=kind,
        role=options.role or submitted.role,
        spot=spot if options.spot is None else options.spot,
        max_run=options.max_run or f"{submitted.max_run_seconds}s",
        price=before.price.per_hour if options.price is None and same_type else options.price,
        volume=options.volume or (None if own_disk else before.disk_gb or None),
        warm_pool=_chosen(options.warm_pool, None if options.spot else warm_pool),
        subnets=subnets,
        security_groups=security_groups,
        kms_key=_chosen(options.kms_key, submitted.kms_key),
        encrypt_traffic=_chosen(options.encrypt_traffic, submitted.encrypt_traffic),
        environment={**_own_variables(submitted), **options.environment},
        tags={**submitted.tags, **options.tags},
    )


def _own_variables(submitted: Submitted) -> dict[str, str]:
    """The user's; the next job gets ours anew."""
    return {name: value for name, value in submitted.variables.items() if name not in OUR_VARIABLES}


def _network(
    options: JobOptions, submitted: Submitted
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Subnets and security groups; without the ones the others mean nothing."""
    if () in (options.subnets, options.security_groups):
        return options.subnets or (), options.security_groups or ()
    return (
        _chosen(options.subnets, submitted.subnets),
        _chosen(options.security_groups, submitted.security_groups),
    )


def _with_image(options: JobOptions, before: Job, *, same_type: bool) -> JobOptions:
    """With the same image; of AWS's own with the one that fits machines with or without GPUs."""

    if options.image or options.image_version:
        return options
    version = awss_version(before.container_image)
    if same_type or version is None:
        return replace(options, image=before.container_image)
    return replace(options, image_version=version)


def _chosen(now: Option | None, before: Option | None) -> Option | None:
    return before if now is None else now


def plan_job(experiment: Experiment | None, options: JobOptions) -> tuple[Aws, JobPlan]:
    """Find and check everything that a job needs; makes nothing.

    Args:
        experiment: None with `options.resume`, which has its own.

    Raises:
        UserMistake: something is missing or cannot work.
        ServingError: AWS refuses or cannot be reached.
    """

    _ = options.max_run_seconds, options.warm_pool_seconds  # a mistake is told before AWS is asked
    if experiment is not None:
        check_source(experiment, options.upload)
    aws = Aws(options.region, options.assume_role)
    search, experiment, options = _what_to_run(aws, experiment, options)
    kind, instances = options.instance_type or DEFAULT_INSTANCE, options.instances or 1
    default = f"sagemaker-{aws.region}-{aws.account}"
    bucket, exists = find_bucket(aws, options.bucket, default=default)
    images = find_images(aws, experiment, options.upload)
    price = _find_price(aws, options, kind, instances)
    tracking, words = _find_tracking(aws, options)
    plan = JobPlan(
        search=search,
        experiment=_with_images_at(experiment, images.uri) if images else experiment,
        region=aws.region,
        account=aws.account,
        caller=aws.caller,
        role=find_role(aws, options.role),
        bucket=bucket,
        bucket_exists=exists,
        container_image=options.image or "",
        instance_type=kind,
        instances=instances,
        max_run_seconds=_limit(price, options),
        price=price,
        tracking_uri=tracking,
        tracking=words,
        images=images,
        disk_gb=options.volume,
        spot=bool(options.spot),
        warm_pool_seconds=int(options.warm_pool_seconds),
        subnets=options.subnets or (),
        security_groups=options.security_groups or (),
        kms_key=options.kms_key or None,
        encrypt_traffic=bool(options.encrypt_traffic),
        variables=options.environment,
        tags=options.tags,
        resumed=options.resume,
    )
    check_quota(aws, kind, instances, spot=plan.spot, warm_pool=plan.warm_pool_seconds > 0)
    # Last: the SDK, which knows AWS's images, takes seconds to import.
    image = find_container_image(aws, options.image, kind, version=options.image_version)
    return aws, replace(plan, container_image=image)


def _with_images_at(experiment: Experiment, uri: str) -> Experiment:
    table = experiment.data.source.rpartition("/")[2]
    source = uri + (table if is_table_name(table) else "")
    data = experiment.data.model_copy(update={"source": source})
    return experiment.model_copy(update={"data": data})


def _find_price(aws: Aws, options: JobOptions, kind: str, instances: int) -> Price:
    hourly = options.price if options.price is not None else hourly_price(aws, kind, "Training")
    return Price(per_hour=hourly, instances=instances)


def _find_tracking(aws: Aws, options: JobOptions) -> tuple[str | None, str]:
    tracking, words = reachable_tracking(tracking_uri(), in_vpc=bool(options.subnets))
    if tracking is not None and tracking.startswith("arn:"):
        return managed_mlflow.usable(aws, tracking)
    return tracking, words


def _limit(price: Price, options: JobOptions) -> int:
    return limit_seconds(
        price,
        max_run_seconds=options.max_run_seconds,
        warm_pool_seconds=options.warm_pool_seconds,
        max_cost=options.max_cost,
    )


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

    if plan.resumed is not None:  # once more: a question may have been open for hours
        require_idle(aws, plan.search)
    upload_images(aws, plan, note=note, progress=progress)
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
