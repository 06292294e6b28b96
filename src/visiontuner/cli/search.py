"""Commands around a search: prepare, sync, backbones, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN, experiment_options, given_values, load_experiment
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake


@click.command(cls=OneLineErrors)
@experiment_options
@click.option(
    "--upload",
    metavar="s3://BUCKET/FOLDER",
    default="none",
    help="Bring the pictures there, as far as they are not there yet.",
)
@click.option(
    "--all", "list_all", is_flag=True, help="List every file with a fault, not the first ten."
)
def prepare(
    experiment: str, data: str, overrides: tuple[str, ...], upload: str, list_all: bool
) -> None:
    """Look at the pictures: how many of which class, and what is wrong with them.

    \b
    Examples:
      visiontuner prepare --data photos/
      visiontuner prepare --data photos/ --all
      visiontuner prepare --experiment experiments/flowers.yaml
      visiontuner prepare --data photos/ --upload s3://my-bucket/photos
    """
    chosen = load_experiment(experiment, data, list(given_values(overrides)))

    from visiontuner.console import SearchConsole, make_console
    from visiontuner.tables import print_dataset
    from visiontuner.workflow import prepare as look

    console = SearchConsole()
    try:
        prepared = look(chosen, upload=None if upload in NOT_GIVEN else upload, observer=console)
    finally:
        console.close()
    print_dataset(make_console(), prepared.summary, prepared.findings, list_all=list_all)
    moved = prepared.uploaded
    if moved is not None:
        others = f" {moved.others:,} others there are not here." if moved.others else ""
        click.echo(
            f"Uploaded {moved.files:,} files ({moved.bytes / 1e6:,.1f} MB) to {upload}; "
            f"{moved.skipped:,} were there already.{others}"
        )


@click.command(cls=OneLineErrors)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def sync(folder: Path | None) -> None:
    """Write a search into MLflow, late or elsewhere; the newest one if none is named.

    Runs, figures, model and registration: whatever MLFLOW_TRACKING_URI does not hold yet.
    Repeating it changes nothing.

    \b
    Examples:
      visiontuner sync
      MLFLOW_TRACKING_URI=https://mlflow.example.org visiontuner sync searches/digits-20261122-1541
    """
    from visiontuner.console import SearchConsole
    from visiontuner.locations import newest_search
    from visiontuner.workflow import sync_search

    console = SearchConsole()
    try:
        result = sync_search(folder or newest_search(), observer=console)
    finally:
        console.close()
    click.echo(f"{result.folder}: {len(result.record.trials)} trials are in {result.tracking_uri}.")
    if result.model:
        click.echo(f"The best one is registered as {result.model}.")
    else:
        verb = "train" if result.record.is_training else "tune"
        command = next_command(verb, "--resume", result.folder)
        click.echo(f"It has no classifier yet; `{command}` makes one.")


@click.command(cls=OneLineErrors)
@click.argument("contains", default="")
def backbones(contains: str) -> None:
    """List pretrained networks whose name contains a text.

    \b
    Examples:
      visiontuner backbones resnet
      visiontuner backbones timm:convnext
    """
    from visiontuner.model.backbone import list_backbones

    found = list_backbones(contains)
    if not found:
        raise UserMistake(
            f"No backbone's name contains {contains!r}. All: `visiontuner backbones`."
        )
    for info in found:
        size = f"{info.parameters / 1e6:8.1f} M" if info.parameters else " " * 10
        here = ", its weights are installed" if info.source == "bundled" else ""
        click.echo(f"{info.name:<44} {size}  {info.source}{here}")
    click.echo(
        f"{len(found)} networks; use one as --backbone NAME. The weights of torchvision's and "
        "timm's are downloaded once.",
        err=True,
    )


@click.command(cls=OneLineErrors)
def doctor() -> None:
    """Look for what would fail on this machine, before it does.

    \b
    Example:
      visiontuner doctor
    """
    from visiontuner.console import make_console
    from visiontuner.doctor import run_checks
    from visiontuner.locations import cache_folder, tracking_uri
    from visiontuner.tables import print_checks

    checks = run_checks(cache=cache_folder(), tracking_uri=tracking_uri())
    print_checks(make_console(), checks)
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)
