"""The command that checks a model before it is deployed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN

if TYPE_CHECKING:
    from visiontuner.serving.preflight import PreflightReport


@click.command(cls=OneLineErrors)
@click.argument("model", default="auto")
@click.option(
    "--env-manager",
    type=click.Choice(["uv", "local"]),
    default="uv",
    show_default=True,
    help="A clean environment from the model's requirements, or this one.",
)
@click.option("--container", is_flag=True, help="In SageMaker's container; needs a Docker engine.")
@click.option(
    "--image",
    metavar="NAME",
    default="auto",
    help="Of the container; by default MLflow builds one for the model's requirements.",
)
@click.option(
    "--ready-seconds",
    type=click.FloatRange(1, 3600),
    default=120,
    show_default=True,
    help="How long the server may take to start.",
)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def preflight(
    model: str, env_manager: str, container: bool, image: str, ready_seconds: float, form: str
) -> None:
    """Serve a model here as its endpoint will, and check what it answers over HTTP.

    MODEL is NAME (its champion, or the newest while there is none), NAME/VERSION, NAME@ALIAS, or
    a folder; without one the newest search's NAME. The code in it runs here, and its requirements
    are installed: only for models that you trust. Exits with 1 if a check fails.

    \b
    Examples:
      visiontuner preflight
      visiontuner preflight dogs@challenger
      visiontuner preflight models:/dogs/3 --env-manager local
      visiontuner preflight dogs --container
    """
    from visiontuner.workflow.preflight import preflight as check

    report = check(
        None if model in NOT_GIVEN else model,
        env_manager=env_manager,  # type: ignore[arg-type]  # one of click's choices
        container=container or image not in NOT_GIVEN,
        image=None if image in NOT_GIVEN else image,
        ready_seconds=ready_seconds,
        note=lambda text: click.echo(text, err=True),
    )
    if form == "json":
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)
    if not report.passed:
        raise click.exceptions.Exit(1)


def _print_report(report: PreflightReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from visiontuner.console import SafeConsole

    table = Table(box=None, pad_edge=False, show_header=False)
    for check in report.checks:
        passed = check.status == "ok"
        mark = Text("pass" if passed else "FAIL", style="green" if passed else "bold red")
        table.add_row(mark, Text(check.name), Text(check.detail))
    console = SafeConsole()
    console.print(table)
    console.print(
        f"\nOne picture a request: p50 {report.p50_ms:.0f} ms, p95 {report.p95_ms:.0f} ms, "
        f"p99 {report.p99_ms:.0f} ms; {report.memory_mb:,.0f} MB of memory."
    )
    console.print(report.recommendation, soft_wrap=True)
    console.print(
        f"{report.model} is ready to be deployed."
        if report.passed
        else f"{report.model} would fail as an endpoint.",
        style="bold",
        soft_wrap=True,
    )
