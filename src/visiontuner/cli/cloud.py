"""The commands around training jobs, and the flags of a job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from visiontuner.aws.job import Job, dry_run
from visiontuner.cli.console import SearchConsole, make_console, print_result
from visiontuner.cli.options import (
    FOLDER,
    LISTED,
    OFF,
    PAIR,
    SWITCH,
    TEXT,
    Given,
    OneLineErrors,
    echo_json,
    number,
)
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.io.aws import account_flags
from visiontuner.text import hide_variables, next_command
from visiontuner.workflow.submit import JobOptions, plan_job, submit_job

# The flags of a training job, and what `tune --on sagemaker` does with them.


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


MACHINES = "With --on sagemaker: machines, time and money"
ACCOUNT = "With --on sagemaker: images, account, container and network"
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


def _value(heading: str, name: str, metavar: str, text: str, kind: Given = TEXT) -> Decorator:
    return _flag(heading, name, metavar=metavar, type=kind, help=text)


def _or_nothing(text: str) -> str:
    return "" if text == OFF else text


_OR_OFF = Given(_or_nothing)


def _switch(heading: str, name: str, text: str) -> Decorator:
    """A flag that MLproject can pass as well, which always writes a value: `none` or `true`."""
    given = {"is_flag": False, "flag_value": "true", "type": SWITCH, "metavar": ""}
    return _flag(heading, name, help=text, **given)


REGION_FLAGS: tuple[Decorator, ...] = (
    _value(ACCOUNT, "--region", "REGION", "AWS region. Default: that of AWS's settings."),
    _value(ACCOUNT, "--assume-role", "ARN", "Act as this role."),
)

_JOB_FLAGS: tuple[Decorator, ...] = (
    _value(
        MACHINES, "--instances", "N", "How many machines. Default: 1.", number(1, 100, whole=True)
    ),
    _value(MACHINES, "--instance-type", "TYPE", "Default: ml.g5.xlarge."),
    _switch(
        MACHINES, "--spot", "Cheaper machines that AWS may take back; the search resumes then."
    ),
    _value(
        MACHINES,
        "--volume",
        "GB",
        "Disk of each machine. Default: by the images. Not for types with disks of their own, "
        "as ml.g5.",
        number(whole=True),
    ),
    _value(
        MACHINES, "--max-run", "TIME", "Longest run; the search then ends in order. Default: 2h."
    ),
    _value(
        MACHINES,
        "--max-cost",
        "USD",
        "Most to spend: shortens --max-run to what this pays for.",
        number(),
    ),
    _value(
        MACHINES,
        "--price",
        "USD",
        "Price of one machine for an hour. Default: AWS's public price list.",
        number(),
    ),
    _value(
        MACHINES,
        "--warm-pool",
        "TIME",
        "Keep the machines this long for a next job; they are PAID meanwhile.",
        _OR_OFF,
    ),
    _value(ACCOUNT, "--upload", "s3://…", "Upload the folder of images there first."),
    _value(
        ACCOUNT,
        "--bucket",
        "NAME",
        "S3 bucket for all that is kept. Default: sagemaker-REGION-ACCOUNT.",
    ),
    _value(
        ACCOUNT, "--role", "NAME|ARN", "Execution role of the job. Default: the account's only one."
    ),
    _value(ACCOUNT, "--image", "URL", "Training image in ECR. Default: AWS's newest with PyTorch."),
    _value(ACCOUNT, "--image-version", "N.N", "PyTorch version of AWS's image, as 2.8."),
    _value(ACCOUNT, "--subnets", "IDS", "Subnets of a VPC, separated by commas.", LISTED),
    _value(ACCOUNT, "--security-groups", "IDS", "Security groups of that VPC.", LISTED),
    _value(
        ACCOUNT,
        "--kms-key",
        "ID",
        "Encrypts uploads, model.tar.gz and attached disks; checkpoints are encrypted by the "
        "bucket's own setting.",
        _OR_OFF,
    ),
    _switch(
        ACCOUNT,
        "--encrypt-traffic",
        "Encrypt traffic between the machines; somewhat slower.",
    ),
    _flag(
        ACCOUNT,
        "--env",
        "environment",
        metavar="KEY=VALUE",
        type=PAIR,
        multiple=True,
        help="Variable of the container, as PIP_INDEX_URL; no secrets: the job's description shows "
        "it. Repeatable.",
    ),
    _flag(
        ACCOUNT,
        "--tag",
        "tags",
        metavar="KEY=VALUE",
        type=PAIR,
        multiple=True,
        help="Tag of the job. Repeatable.",
    ),
    *REGION_FLAGS,
    _flag(ASKING, "--dry-run", is_flag=True, help="Print the plan and the request, and stop."),
    _switch(ASKING, "--yes", "Do not ask for confirmation."),
    _flag(
        ASKING,
        "--wait/--no-wait",
        default=True,
        help="Follow the job and fetch its search (default), or leave that to `attach`.",
    ),
)
# What each is called where it was not given.
_DEFAULTS: dict[str, Any] = {"tags": (), "environment": (), "dry_run": False, "wait": True}


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
        "--" + name.replace("_", "-").replace("tags", "tag").replace("environment", "env")
        for name, value in job.items()
        if value is not None and value != _DEFAULTS.get(name)
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

    asked = {name: job.pop(name) for name in ("dry_run", "yes", "wait")}
    pairs = {key: dict(job[key]) for key in ("tags", "environment")}
    options = JobOptions(**job | pairs, resume=resume)
    aws, plan = plan_job(experiment, options)
    for line in plan.lines():
        click.echo(line, err=True)
    if asked["dry_run"]:
        request = dry_run(aws, plan)
        request["Environment"] = hide_variables(request.get("Environment") or {})
        echo_json(request, indent=2, default=str)
        return
    _ask(asked["yes"])

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
    if not asked["wait"]:
        click.echo(f"Follow it:     {next_command('attach', name, flags=aws.flags)}")
        click.echo(f"End it early:  {next_command('stop', name, flags=aws.flags)}")
        return

    follow_and_print(name, region=plan.region, assume_role=options.assume_role, output=output)


def _ask(yes: bool | None) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserMistake(
            "There is no terminal to confirm on: add --yes, or --dry-run to look only."
        )
    if not click.confirm("Start it?", err=True):
        raise click.exceptions.Exit(1)


# The command that follows a training job and brings its search home.


@click.command(cls=OneLineErrors)
@click.argument("job")
@click.option("--output", metavar="FOLDER", type=FOLDER, help="Default: searches/SEARCH.")
@click.option(
    "--logs",
    type=click.Choice(["start", "all", "none"]),
    default="start",
    show_default=True,
    help="The hosts' log lines: until trials begin, all, or none.",
)
@with_flags(REGION_FLAGS)
def attach(
    job: str, output: Path | None, logs: str, region: str | None, assume_role: str | None
) -> None:
    """Follow a training job; once it has ended, bring its search home and into MLflow.

    Nothing is trained again: the journal is replayed, and the classifier that the job packaged is
    registered. JOB may be a classic hyperparameter tuning job as well: each of its training jobs
    becomes an MLflow run.

    \b
    Examples:
      visiontuner attach visiontuner-dogs-20261122154100
      MLFLOW_TRACKING_URI=https://mlflow.example.org visiontuner attach my-tuning-job
    """
    follow_and_print(
        job,
        region=region,
        assume_role=assume_role,
        output=output,
        logs=logs,
    )


def follow_and_print(
    name: str,
    *,
    region: str | None,
    assume_role: str | None,
    output: Path | None,
    logs: str = "start",
) -> None:
    """Follow, bring home, print; Ctrl-C leaves the job running and says so."""
    from visiontuner.workflow import jobs as verbs

    console, flags = SearchConsole(), account_flags(region, assume_role)
    try:
        came = verbs.attach(
            name,
            region=region,
            assume_role=assume_role,
            output=output,
            logs=logs,  # type: ignore[arg-type]
            observer=console,
        )
    except KeyboardInterrupt as left:
        console.close()
        again = next_command("attach", name, flags=flags)
        if isinstance(left, verbs.LeftRunning):
            click.echo(f"\n{name} runs on. Follow it again: {again}", err=True)
            click.echo(f"End it: {next_command('stop', name, flags=flags)}", err=True)
        else:
            click.echo(f"\nStopped. Nothing is lost, go on with: {again}", err=True)
        raise click.exceptions.Exit(130) from None
    finally:
        console.close()
    for line in came.lines:
        click.echo(line)
    try:
        if came.result is not None:
            print_result(came.result, said=console.said)
    except click.exceptions.Exit:  # a search that was broken off looks interrupted
        if not came.failed:
            raise
    if came.failed:
        raise click.exceptions.Exit(1)


# The command that lists our training jobs.


_COLOURS = {"Completed": "green", "Failed": "red", "Stopped": "magenta", "Stopping": "yellow"}


@click.command(cls=OneLineErrors)
@with_flags(REGION_FLAGS)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def jobs(region: str | None, assume_role: str | None, form: str) -> None:
    """List the training jobs that visiontuner submitted in a region, the newest first.

    \b
    Example:
      visiontuner jobs --region eu-west-1
    """
    from visiontuner.workflow.jobs import jobs as find

    found = find(region, assume_role)
    if form == "json":
        echo_json([_row(job) for job in found], indent=2)
    elif found:
        _print(found)
    else:
        click.echo("None. `visiontuner tune --on sagemaker` submits one.")


def _row(job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "status": job.status,
        "stage": job.stage,
        "reason": job.reason,
        "search": job.search,
        "created": job.created.isoformat(),
        "instance_type": job.instance_type,
        "instances": job.instances,
        "spot": job.spot,
        "seconds": job.seconds,
        "cost": job.cost,
    }


def _print(found: list[Job]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "state", "search", "runs on", "age", "ran", "cost so far"):
        table.add_column(heading)
    for job in found:
        state = job.status if job.status == job.stage else f"{job.status}: {job.stage}"
        table.add_row(
            Text(job.name),
            Text(state, style=_COLOURS.get(job.status, "cyan")),
            Text(job.search),
            f"{job.instances} x {job.instance_type}{', spot' if job.spot else ''}",
            f"{job.age_hours:.1f} h",
            f"{job.seconds / 60:.0f} min",
            "not known" if job.cost is None else f"${job.cost:,.2f}",
        )
    make_console().print(table)


# The command that ends a training job.


@click.command(cls=OneLineErrors)
@click.argument("job")
@with_flags(REGION_FLAGS)
def stop(job: str, region: str | None, assume_role: str | None) -> None:
    """End a training job in order; what it has done is kept.

    \b
    Example:
      visiontuner stop visiontuner-dogs-20261122154100
    """
    from visiontuner.workflow.jobs import stop as end

    flags = end(
        job,
        region,
        assume_role,
    )
    click.echo(f"{job} is being stopped; its search ends in order within two minutes.")
    resumed = next_command("tune", "--on", "sagemaker", "--resume", job, flags=flags)
    click.echo(f"Bring home what it did:  {next_command('attach', job, flags=flags)}")
    click.echo(f"Go on with it later:     {resumed}")
