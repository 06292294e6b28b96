"""The command that follows a training job and brings its search home."""

from __future__ import annotations

from pathlib import Path

import click

from visiontuner.cli.cloud import REGION_FLAGS, with_flags
from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.cli.results import print_result
from visiontuner.commands import next_command


@click.command(cls=OneLineErrors)
@click.argument("job")
@click.option("--output", metavar="FOLDER", default="auto", help="Default: searches/SEARCH.")
@click.option(
    "--logs",
    type=click.Choice(["start", "all", "none"]),
    default="start",
    show_default=True,
    help="The hosts' log lines: until trials begin, all, or none.",
)
@with_flags(REGION_FLAGS)
def attach(job: str, output: str, logs: str, region: str, assume_role: str) -> None:
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
        region=None if region in NOT_GIVEN else region,
        assume_role=None if assume_role in NOT_GIVEN else assume_role,
        output=None if output in NOT_GIVEN else Path(output),
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
    from visiontuner.aws import account_flags
    from visiontuner.console import SearchConsole
    from visiontuner.workflow.attach import attach as follow
    from visiontuner.workflow.following import LeftRunning

    console, flags = SearchConsole(), account_flags(region, assume_role)
    try:
        came = follow(
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
        if isinstance(left, LeftRunning):
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
