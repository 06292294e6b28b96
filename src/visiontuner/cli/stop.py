"""The command that ends a training job."""

from __future__ import annotations

import click

from visiontuner.cli.cloud import REGION_FLAGS, with_flags
from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.commands import next_command


@click.command(cls=OneLineErrors)
@click.argument("job")
@with_flags(REGION_FLAGS)
def stop(job: str, region: str, assume_role: str) -> None:
    """End a training job in order; what it has done is kept.

    \b
    Example:
      visiontuner stop visiontuner-dogs-20261122154100
    """
    from visiontuner.workflow.jobs import stop as end

    flags = end(
        job,
        None if region in NOT_GIVEN else region,
        None if assume_role in NOT_GIVEN else assume_role,
    )
    click.echo(f"{job} is being stopped; its search ends in order within two minutes.")
    resumed = next_command("tune", "--on", "sagemaker", "--resume", job, flags=flags)
    click.echo(f"Bring home what it did:  {next_command('attach', job, flags=flags)}")
    click.echo(f"Go on with it later:     {resumed}")
