"""The flags of a training job, and what `tune --on sagemaker` does with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.job_options import is_on, read_options
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.experiment import Experiment

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


MACHINES = "With --on sagemaker: machines, time and money"
ACCOUNT = "With --on sagemaker: pictures, account, image and network"
ASKING = "With --on sagemaker: before and after"


class JobFlag(click.Option):
    """A flag of a training job; `heading` is where `--help` lists it."""

    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class JobCommand(OneLineErrors):
    """`--help` lists a job's flags under headings of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        for flag in self.get_params(ctx):
            record = flag.get_help_record(ctx)
            if record is not None:
                heading = flag.heading if isinstance(flag, JobFlag) else "Options"
                rows.setdefault(heading, []).append(record)
        for heading, records in rows.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _flag(heading: str, *names: str, **attributes: Any) -> Decorator:
    return click.option(*names, cls=JobFlag, heading=heading, **attributes)


def _value(heading: str, name: str, metavar: str, text: str, *, default: str = "auto") -> Decorator:
    return _flag(heading, name, metavar=metavar, default=default, help=text)


def _switch(heading: str, name: str, text: str) -> Decorator:
    """A flag that MLproject can pass as well, which always writes a value: `none` or `true`."""
    given = {"is_flag": False, "flag_value": "true", "default": "none", "metavar": ""}
    return _flag(heading, name, help=text, **given)


REGION_FLAGS: tuple[Decorator, ...] = (
    _value(ACCOUNT, "--region", "REGION", "By default that of AWS's settings."),
    _value(ACCOUNT, "--assume-role", "ARN", "Act as this role.", default="none"),
)

_JOB_FLAGS: tuple[Decorator, ...] = (
    _value(MACHINES, "--instances", "N", "How many machines. Default: 1."),
    _value(MACHINES, "--instance-type", "TYPE", "Default: ml.g5.xlarge."),
    _switch(
        MACHINES, "--spot", "Cheaper machines that AWS may take back; the search then goes on."
    ),
    _value(
        MACHINES,
        "--volume",
        "GB",
        "Disk of each machine. Default: by the pictures. Not for types with disks of their own, "
        "as ml.g5.",
    ),
    _value(MACHINES, "--max-run", "TIME", "SageMaker ends the job then, in order. Default: 2h."),
    _value(
        MACHINES,
        "--max-cost",
        "USD",
        "Shortens --max-run to what this pays for.",
        default="none",
    ),
    _value(
        MACHINES, "--price", "USD", "Of one machine for an hour. Default: AWS's public price list."
    ),
    _value(
        MACHINES,
        "--warm-pool",
        "TIME",
        "Machines stay so long for a next job, and are PAID while they stay.",
        default="none",
    ),
    _value(
        ACCOUNT, "--upload", "s3://…", "Bring the folder of pictures there first.", default="none"
    ),
    _value(ACCOUNT, "--bucket", "NAME", "For all that is kept. Default: sagemaker-REGION-ACCOUNT."),
    _value(ACCOUNT, "--role", "NAME|ARN", "What the job runs as. Default: found."),
    _value(ACCOUNT, "--image", "URL", "In ECR. Default: AWS's newest PyTorch training image."),
    _value(ACCOUNT, "--image-version", "N.N", "PyTorch of AWS's image, as 2.8."),
    _value(ACCOUNT, "--subnets", "IDS", "Of a VPC, with commas between them.", default="none"),
    _value(ACCOUNT, "--security-groups", "IDS", "Of that VPC.", default="none"),
    _value(
        ACCOUNT,
        "--kms-key",
        "ID",
        "Encrypts uploads, model.tar.gz and attached disks; checkpoints are encrypted by the "
        "bucket's own setting.",
        default="none",
    ),
    _flag(
        ACCOUNT, "--tag", "tags", metavar="KEY=VALUE", multiple=True, help="Of the job. Repeatable."
    ),
    *REGION_FLAGS,
    _flag(ASKING, "--dry-run", is_flag=True, help="Print the plan and the request; make nothing."),
    _switch(ASKING, "--yes", "Do not ask."),
    _flag(
        ASKING,
        "--wait/--no-wait",
        default=True,
        help="Follow the job and bring it home (default), or leave that to `attach`.",
    ),
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

    options = read_options(job, resume)
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
        click.echo(f"Follow it:     {next_command('attach', name, flags=aws.flags)}")
        click.echo(f"End it early:  {next_command('stop', name, flags=aws.flags)}")
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
