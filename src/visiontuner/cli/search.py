"""Commands that search: tune, prepare, sync, backbones, doctor."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN, experiment_options, given_values, load_experiment
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.workflow import SearchResult


@click.command(cls=OneLineErrors)
@experiment_options
@click.option("--backbone", metavar="NAME", default="auto", help="See `visiontuner backbones`.")
@click.option("--trials", metavar="N", default="auto", help="How many configurations to try.")
@click.option("--algorithm", metavar="random|optuna|grid", default="auto", help="How to choose.")
@click.option(
    "--output",
    metavar="FOLDER",
    default="auto",
    help="The search folder. Default: searches/NAME-TIME.",
)
@click.option("--resume", metavar="FOLDER", default="none", help="Go on with an earlier search.")
@click.option(
    "--on",
    type=click.Choice(["local", "auto"]),
    default="local",
    show_default=True,
    help="This machine, or the Ray cluster it is in.",
)
def tune(
    experiment: str,
    data: str,
    overrides: tuple[str, ...],
    backbone: str,
    trials: str,
    algorithm: str,
    output: str,
    resume: str,
    on: str,
) -> None:
    """Search hyperparameters; every trial becomes an MLflow run, the best one a model.

    \b
    Examples:
      visiontuner tune
      visiontuner tune --data photos/ --backbone resnet50 --trials 32
      visiontuner tune --experiment experiments/dog_breeds.yaml --set training.epochs=5
      visiontuner tune --resume searches/digits-20261122-154100
    """
    flags = {
        "model.backbone": backbone,
        "search.trials": trials,
        "search.algorithm": algorithm,
    }
    given = [f"{key}={value}" for key, value in flags.items() if value not in NOT_GIVEN]
    if resume not in NOT_GIVEN:
        changed = [*given, *given_values(overrides), *given_values([data, output])]
        if changed or experiment not in NOT_GIVEN:
            _refuse_changes_on_resume()
        chosen = None
    else:
        chosen = load_experiment(experiment, data, [*given, *given_values(overrides)])

    from visiontuner.console import SearchConsole
    from visiontuner.workflow import resume_search, run_search

    console = SearchConsole()
    try:
        if chosen is None:
            result = resume_search(Path(resume), on=on, observer=console)  # type: ignore[arg-type]
        else:
            folder = None if output in NOT_GIVEN else Path(output)
            result = run_search(chosen, output=folder, on=on, observer=console)  # type: ignore[arg-type]
    finally:
        console.close()
    _print_result(result, said=console.said)


@click.command(cls=OneLineErrors)
@experiment_options
def prepare(experiment: str, data: str, overrides: tuple[str, ...]) -> None:
    """Look at the pictures: how many of which class, and what is wrong with them.

    \b
    Examples:
      visiontuner prepare --data photos/
      visiontuner prepare --experiment experiments/flowers.yaml
    """
    chosen = load_experiment(experiment, data, list(given_values(overrides)))

    from visiontuner.console import SearchConsole
    from visiontuner.tables import make_console, print_dataset
    from visiontuner.workflow import prepare as look

    console = SearchConsole()
    try:
        prepared = look(chosen, observer=console)
    finally:
        console.close()
    print_dataset(make_console(), prepared.summary, prepared.findings)


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
    from visiontuner.locations import newest_search
    from visiontuner.workflow import sync_search

    result = sync_search(folder or newest_search())
    click.echo(f"{result.folder}: {len(result.record.trials)} trials are in {result.tracking_uri}.")
    if result.model:
        click.echo(f"The best one is registered as {result.model}.")
    else:
        click.echo("It has no classifier yet; `visiontuner tune --resume` makes one.")


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
    from visiontuner.doctor import run_checks
    from visiontuner.locations import cache_folder, tracking_uri
    from visiontuner.tables import make_console, print_checks

    checks = run_checks(cache=cache_folder(), tracking_uri=tracking_uri())
    print_checks(make_console(), checks)
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)


def _refuse_changes_on_resume() -> None:
    raise UserMistake(
        "--resume goes on with the search as it was; leave the other flags out, "
        "or start a new search with them."
    )


def _print_result(result: SearchResult, *, said: set[str]) -> None:
    best, folder, uri = result.best, result.folder, result.tracking_uri
    if best is not None:
        values = ", ".join(f"{k} {_short(v)}" for k, v in best.configuration.items())
        objective = result.record.objective
        click.echo(f"\nBest trial: {best.trial_id} with {values}")
        click.echo(f"  {objective} {best.best_value:.4f} in epoch {best.best_epoch}")
    if result.classifier:
        click.echo(f"  classifier: {result.classifier}")
    if result.model:
        click.echo(f"  MLflow model: {result.model} (in {uri})")
    if result.tracking_problem:
        known = result.tracking_problem in said
        reason = "." if known else f": {result.tracking_problem}"
        click.echo(f"\nNot everything is in MLflow{reason}")
        click.echo(f"Nothing is lost. Write it later: visiontuner sync {folder}")
    elif result.state == "completed":
        click.echo("\nNext, compare the trials: " + _ui_command(uri))
    if result.state != "completed":
        word = "Stopped" if result.state == "interrupted" else "The time budget is spent"
        click.echo(f"\n{word}. Go on with: visiontuner tune --resume {folder}")
    if result.state == "interrupted":
        raise click.exceptions.Exit(130)


def _ui_command(uri: str) -> str:
    from visiontuner.locations import DEFAULT_TRACKING_URI

    if uri.startswith("http"):
        return uri
    beside = Path(sys.executable).with_name("mlflow")
    mlflow = "mlflow" if shutil.which("mlflow") else os.path.relpath(beside)
    return f"{mlflow} ui" + ("" if uri == DEFAULT_TRACKING_URI else f" --backend-store-uri {uri}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
