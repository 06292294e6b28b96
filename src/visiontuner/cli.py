"""The command line: one subcommand per entry point of MLproject; parsing and printing only.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visiontuner.errors import UserMistake, VisiontunerError

if TYPE_CHECKING:
    from visiontuner.experiment import Experiment
    from visiontuner.workflow import SearchResult

NOT_GIVEN = ("auto", "none", "")
"""Words that MLproject passes for a parameter that was not given."""

_GROUPS = {
    "Search": ("tune", "prepare", "sync", "backbones", "doctor"),
}


class GroupedCommands(click.Group):
    """`--help` with the subcommands under headings, in the order people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in _GROUPS.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, names in _GROUPS.items():
            rows = [(name, self.commands[name].get_short_help_str(80)) for name in names]
            with formatter.section(heading):
                formatter.write_dl(rows)


class OneLineErrors(click.Command):
    """Prints an error as one line and exits with its code; `--debug` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = bool(ctx.find_root().params.get("debug"))
        try:
            with _sigterm_is_ctrl_c():
                return super().invoke(ctx)
        except VisiontunerError as error:
            if debug:
                raise
            raise _Failure(str(error), error.exit_code) from None
        except KeyboardInterrupt:
            raise _Failure("Stopped.", 130) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise _Failure(f"{text} (the traceback: visiontuner --debug …)", 1) from None
        finally:
            gc.freeze()  # or Python walks torch's and MLflow's objects once more: 1.5 s at exit


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


@click.group(
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: visiontuner tune",
)
@click.version_option(package_name="visiontuner")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Fine-tune an image classifier on your own pictures.

    Search the learning rate and the batch size with Ray Tune, see every trial in MLflow, and
    put the best model behind a SageMaker endpoint.
    """


def _experiment_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that say what the experiment is."""
    options = [
        click.option(
            "--experiment",
            metavar="FILE",
            default="auto",
            help="Experiment file. Default: the quickstart on built-in pictures.",
        ),
        click.option(
            "--data",
            metavar="SOURCE",
            default="auto",
            help="Folder, archive (path or URL) or `digits`, instead of the experiment's.",
        ),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="Override any value of the experiment, for example training.epochs=5. Repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command(cls=OneLineErrors)
@_experiment_options
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
        changed = [*given, *_given(overrides), *_given([data, output])]
        if changed or experiment not in NOT_GIVEN:
            _refuse_changes_on_resume()
        chosen = None
    else:
        chosen = _load_experiment(experiment, data, [*given, *_given(overrides)])

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
    _print_result(result)


@main.command(cls=OneLineErrors)
@_experiment_options
def prepare(experiment: str, data: str, overrides: tuple[str, ...]) -> None:
    """Look at the pictures: how many of which class, and what is wrong with them.

    \b
    Examples:
      visiontuner prepare --data photos/
      visiontuner prepare --experiment experiments/flowers.yaml
    """
    chosen = _load_experiment(experiment, data, list(_given(overrides)))

    from visiontuner.console import SearchConsole
    from visiontuner.tables import print_dataset
    from visiontuner.workflow import prepare as look

    console = SearchConsole()
    try:
        prepared = look(chosen, observer=console)
    finally:
        console.close()
    print_dataset(console.console, prepared.summary, prepared.findings)


@main.command(cls=OneLineErrors)
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


@main.command(cls=OneLineErrors)
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
        click.echo(f"{info.name:<44} {size}  {info.source}")
    click.echo(f"{len(found)} networks; use one as --backbone NAME.", err=True)


@main.command(cls=OneLineErrors)
def doctor() -> None:
    """Look for what would fail on this machine, before it does.

    \b
    Example:
      visiontuner doctor
    """
    from rich.console import Console

    from visiontuner.doctor import run_checks
    from visiontuner.locations import cache_folder, tracking_uri
    from visiontuner.tables import print_checks

    checks = run_checks(cache=cache_folder(), tracking_uri=tracking_uri())
    print_checks(Console(highlight=False), checks)
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)


def _given(values: Sequence[str]) -> list[str]:
    return [value for value in values if value not in NOT_GIVEN]


def _load_experiment(experiment: str, data: str, overrides: list[str]) -> Experiment:
    """The file, or without one the quickstart; own pictures alone get the general defaults."""
    from visiontuner.experiment import QUICKSTART, Experiment, read_experiment

    own_data = data not in NOT_GIVEN
    if experiment not in NOT_GIVEN:
        raw, where = read_experiment(Path(experiment)), experiment
    else:
        raw, where = ({} if own_data else dict(QUICKSTART)), "the command line"
    if own_data:
        raw["data"] = {**(raw.get("data") or {}), "source": data}
    return Experiment.parse(raw, overrides, where=where)


def _refuse_changes_on_resume() -> None:
    raise UserMistake(
        "--resume goes on with the search as it was; leave the other flags out, "
        "or start a new search with them."
    )


def _print_result(result: SearchResult) -> None:
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
        click.echo(f"\nNot everything is in MLflow: {result.tracking_problem}")
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


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """A batch system's SIGTERM ends a command the way Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
