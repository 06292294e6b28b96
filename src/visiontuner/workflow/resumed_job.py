"""Another job for the search of an earlier one: on the same checkpoints, with the same options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from visiontuner.commands import next_command
from visiontuner.data.objects import split_uri
from visiontuner.errors import UserMistake
from visiontuner.experiment import Experiment, parse_yaml
from visiontuner.workflow.job_options import JobOptions

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.earlier import Submitted
    from visiontuner.sagemaker.job import Job

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
    from visiontuner.sagemaker.earlier import submitted_with
    from visiontuner.sagemaker.job import describe

    if options.upload:
        raise UserMistake("--resume goes on with the pictures it began with: leave --upload out.")
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
    from visiontuner.sagemaker.earlier import running_job

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
    from visiontuner.sagemaker import s3
    from visiontuner.sagemaker.job import EXPERIMENT

    root = (before.checkpoints or "").removesuffix("/checkpoints")
    content = s3.get(aws, f"{root}/{EXPERIMENT}") if before.search and root else None
    if content is None:
        raise UserMistake(f"{before.name} has no search of ours to go on with.")
    return Experiment.parse(parse_yaml(content))


def _require_unfinished(aws: Aws, before: Job, experiment: Experiment) -> None:
    """A local `tune --resume` of a search that is done trains nothing either."""
    from visiontuner.sagemaker.earlier import record_of
    from visiontuner.sagemaker.job import jobs_of
    from visiontuner.search.stages import remaining_trials

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
    from visiontuner.sagemaker.instances import has_own_disk

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
        tags={**submitted.tags, **options.tags},
    )


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
    from visiontuner.sagemaker.surroundings import awss_version

    if options.image or options.image_version:
        return options
    version = awss_version(before.image)
    if same_type or version is None:
        return replace(options, image=before.image)
    return replace(options, image_version=version)


def _chosen(now: Option | None, before: Option | None) -> Option | None:
    return before if now is None else now
