"""The command that lists our training jobs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.cloud import REGION_FLAGS, with_flags
from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN

if TYPE_CHECKING:
    from visiontuner.sagemaker.job import Job

_COLOURS = {"Completed": "green", "Failed": "red", "Stopped": "magenta", "Stopping": "yellow"}


@click.command(cls=OneLineErrors)
@with_flags(REGION_FLAGS)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def jobs(region: str, assume_role: str, form: str) -> None:
    """List the training jobs that visiontuner submitted in a region, the newest first.

    \b
    Example:
      visiontuner jobs --region eu-west-1
    """
    from visiontuner.workflow.jobs import jobs as find

    found = find(
        None if region in NOT_GIVEN else region, None if assume_role in NOT_GIVEN else assume_role
    )
    if form == "json":
        click.echo(json.dumps([_row(job) for job in found], indent=2))
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
    from rich.table import Table
    from rich.text import Text

    from visiontuner.console import make_console

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
