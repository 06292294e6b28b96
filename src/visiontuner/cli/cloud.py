"""The flags of a training job, and what `tune --on sagemaker` does with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.options import NOT_GIVEN
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.experiment import Experiment
    from visiontuner.workflow.job_options import JobOptions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

OFF = "off"
"""Leaves out what a job that is resumed had."""
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, OFF: False}


def yes_or_no(name: str, text: str) -> Decorator:
    """A flag that MLproject can pass as well, which always writes a value: `none` or `true`."""
    return click.option(
        name, is_flag=False, flag_value="true", default="none", metavar="", help=text
    )


REGION_FLAGS: tuple[Decorator, ...] = (
    click.option(
        "--region", metavar="REGION", default="auto", help="By default that of AWS's settings."
    ),
    click.option("--assume-role", metavar="ARN", default="none", help="Act as this role."),
)

_JOB_FLAGS: tuple[Decorator, ...] = (
    click.option("--instances", metavar="N", default="auto", help="SageMaker: how many machines."),
    click.option("--instance-type", metavar="TYPE", default="auto", help="Default: ml.g5.xlarge."),
    yes_or_no("--spot", "Cheaper machines that AWS may take back; the search then goes on."),
    click.option("--max-run", metavar="TIME", default="auto", help="At most so long; default 2h."),
    click.option("--max-cost", metavar="USD", default="none", help="Ends before it costs more."),
    click.option("--price", metavar="USD", default="auto", help="Of one machine for an hour."),
    click.option("--volume", metavar="GB", default="auto", help="Of each machine's disk."),
    click.option("--warm-pool", metavar="TIME", default="none", help="Machines stay so long."),
    click.option("--upload", metavar="S3", default="none", help="Bring the pictures there first."),
    click.option("--image", metavar="URL", default="auto", help="Default: AWS's PyTorch image."),
    click.option("--image-version", metavar="N.N", default="auto", help="Of PyTorch in it."),
    click.option("--role", metavar="NAME|ARN", default="auto", help="What the job runs as."),
    click.option("--bucket", metavar="NAME", default="auto", help="For all that the job keeps."),
    click.option("--subnets", metavar="IDS", default="none", help="Of a VPC, with commas."),
    click.option("--security-groups", metavar="IDS", default="none", help="Of a VPC."),
    click.option("--kms-key", metavar="ID", default="none", help="Encrypts uploads and results."),
    click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="Repeatable."),
    *REGION_FLAGS,
    click.option("--dry-run", is_flag=True, help="Print the plan and the request; do nothing."),
    yes_or_no("--yes", "Do not ask."),
    click.option("--wait/--no-wait", default=True, help="Follow the job, and bring it home."),
)
# What each is called where it was not given.
_DEFAULTS: dict[str, Any] = {"tags": (), "dry_run": False, "wait": True}


def with_flags(flags: tuple[Decorator, ...]) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return add


job_flags = with_flags(_JOB_FLAGS)


def only_for_sagemaker(job: dict[str, Any]) -> None:
    """Refuse a job's flags where there is no job.

    Raises:
        UserMistake: naming them.
    """
    given = sorted(
        "--" + name.replace("_", "-").replace("tags", "tag")
        for name, value in job.items()
        if value not in NOT_GIVEN and value != _DEFAULTS.get(name)
    )
    if given:
        raise UserMistake(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for --on sagemaker; add it, "
            "or leave them out."
        )


def run_on_sagemaker(
    experiment: Experiment | None,
    job: dict[str, Any],
    *,
    resume: str | None,
    output: Path | None,
) -> None:
    """Say what is going to happen, ask, submit, follow, bring home."""
    from visiontuner.workflow.submit import dry_run, plan_job, submit_job

    options = _read(job, resume)
    aws, plan = plan_job(experiment, options)
    for line in plan.lines():
        click.echo(line, err=True)
    if job["dry_run"]:
        click.echo(json.dumps(dry_run(aws, plan), indent=2, default=str))
        return
    _ask(is_on("--yes", job["yes"]))
    from visiontuner.console import SearchConsole

    console = SearchConsole()
    try:
        name = submit_job(
            aws,
            plan,
            note=console.note,
            progress=lambda done, total: console.progress("Uploading", done, total, "B"),
        )
    finally:
        console.close()
    click.echo(f"Submitted {name}.")
    if not job["wait"]:
        click.echo(f"Follow it:     visiontuner attach {name}{aws.flags}")
        click.echo(f"End it early:  visiontuner stop {name}{aws.flags}")
        return
    from visiontuner.cli.attach import follow_and_print

    follow_and_print(name, region=plan.region, assume_role=options.assume_role, output=output)


def _ask(yes: bool | None) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserMistake("Nobody is here to say yes: add --yes, or --dry-run to look only.")
    if not click.confirm("Start it?", err=True):
        raise click.exceptions.Exit(1)


def _read(job: dict[str, Any], resume: str | None) -> JobOptions:
    from visiontuner.workflow.job_options import JobOptions

    text = {key: _given(value) for key, value in job.items() if isinstance(value, str)}
    instances = _whole("--instances", text["instances"])
    if instances is not None and not 1 <= instances <= 100:
        raise UserMistake(f"--instances takes a number from 1 to 100, got {instances}.")
    return JobOptions(
        instances=instances,
        instance_type=text["instance_type"],
        image=text["image"],
        image_version=text["image_version"],
        role=text["role"],
        bucket=text["bucket"],
        region=text["region"],
        assume_role=text["assume_role"],
        spot=is_on("--spot", job["spot"]),
        max_run=text["max_run"],
        max_cost=number("--max-cost", text["max_cost"]),
        price=number("--price", text["price"]),
        volume=_whole("--volume", text["volume"]),
        warm_pool=_or_empty(text["warm_pool"]),
        subnets=_listed(text["subnets"]),
        security_groups=_listed(text["security_groups"]),
        kms_key=_or_empty(text["kms_key"]),
        tags=dict(_pair(tag) for tag in job["tags"]),
        upload=text["upload"],
        resume=resume,
    )


def _given(text: str) -> str | None:
    return None if text in NOT_GIVEN else text


def _or_empty(text: str | None) -> str | None:
    return "" if text == OFF else text


def _listed(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return tuple(part for part in parts if part not in ("", OFF))


def is_on(flag: str, text: str) -> bool | None:
    """What `yes_or_no` was told; None if it was not given.

    Raises:
        UserMistake: it is neither yes nor no.
    """
    if text in NOT_GIVEN:
        return None
    if text.lower() not in _SWITCH:
        raise UserMistake(f"{flag} takes true or off, got {text!r}.")
    return _SWITCH[text.lower()]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserMistake(f"--tag takes KEY=VALUE, got {text!r}.")
    return key, value


def _whole(flag: str, text: str | None) -> int | None:
    value = number(flag, text)
    if value is not None and value != int(value):
        raise UserMistake(f"{flag} takes a whole number, got {text!r}.")
    return None if value is None else int(value)


def number(flag: str, text: str | None) -> float | None:
    """A flag's number, or None if it was not given.

    Raises:
        UserMistake: it is none from 0.
    """
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value < 1e6:
        raise UserMistake(f"{flag} takes a number from 0, got {text!r}.")
    return value
