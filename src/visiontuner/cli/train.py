"""The command `train`: one training with given or with the best found hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN, experiment_options, given_values
from visiontuner.cli.origin import choose_training
from visiontuner.cli.results import print_artifacts
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.cli.training_console import TrainingConsole
    from visiontuner.workflow import SearchResult


@click.command(cls=OneLineErrors)
@experiment_options
@click.option("--backbone", metavar="NAME", default="auto", help="See `visiontuner backbones`.")
@click.option("--epochs", metavar="N", default="auto", help="The same as --set training.epochs=N.")
@click.option(
    "--from",
    "origin",
    metavar="SEARCH|RUN|MODEL",
    default="none",
    help="Take the hyperparameters of a search's best trial, of a run, of `champion` or a model.",
)
@click.option(
    "--on",
    "trained_on",
    type=click.Choice(["train", "train+validation"]),
    default="train",
    show_default=True,
    help="Which pictures. Of train+validation the last epoch counts.",
)
@click.option(
    "--output",
    metavar="FOLDER",
    default="auto",
    help="The training's folder. Default: searches/NAME-train-TIME.",
)
@click.option(
    "--trace",
    metavar="FIRST-LAST",
    is_flag=False,
    flag_value="3-5",
    default="none",
    help="Write a profiler's trace of these steps, for Perfetto. Without a value: 3-5.",
)
@click.option("--resume", metavar="FOLDER", default="none", help="Go on with an earlier training.")
def train(resume: str, output: str, **asked: Any) -> None:
    """Train once, without a search; the model registers like any other.

    The folder is a search folder with one trial: evaluate, diagnose, promote and deploy take it.
    After any interruption --resume goes on from the last whole epoch, with the same numbers.

    \b
    Examples:
      visiontuner train --data photos/ --set training.learning_rate=0.003
      visiontuner train --from searches/photos-20261122-154100 --epochs 60
      visiontuner train --from champion --set model.train=last_stage
      visiontuner train --from searches/photos-20261122-154100 --on train+validation
      visiontuner train --data photos/ --set model.train=all --trace 100-104
      visiontuner train --resume searches/photos-train-20261122-161500
    """
    if resume not in NOT_GIVEN:
        _refuse_changes(output=output, **{k: v for k, v in asked.items() if k != "overrides"})

    from visiontuner.cli.training_console import TrainingConsole

    console = TrainingConsole()
    try:
        if resume not in NOT_GIVEN:
            from visiontuner.workflow.train import resume_training

            changed = given_values(asked["overrides"])
            result = resume_training(Path(resume), overrides=changed, observer=console)
        else:
            result = _begin(console, output, **asked)
    finally:
        console.close()
    _print_result(result, said=console.said)


def _begin(
    console: TrainingConsole,
    output: str,
    *,
    experiment: str,
    data: str,
    overrides: tuple[str, ...],
    backbone: str,
    epochs: str,
    origin: str,
    trained_on: str,
    trace: str,
) -> SearchResult:
    traced = None if trace in NOT_GIVEN else _steps(trace)
    flags = {"model.backbone": backbone, "training.epochs": epochs}
    given = [f"{key}={value}" for key, value in flags.items() if value not in NOT_GIVEN]
    chosen, found = choose_training(experiment, data, [*given, *overrides], origin)

    from visiontuner.workflow.train import train as run

    return run(
        chosen,
        origin=found,
        trained_on=trained_on,  # type: ignore[arg-type]  # click checked it
        output=None if output in NOT_GIVEN else Path(output),
        trace_steps=traced,
        observer=console,
    )


def _steps(text: str) -> tuple[int, int]:
    """`3-5` -> (3, 5); one step may stand alone."""
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and (last or first).isdigit()):
        raise UserMistake(f"--trace {text!r}: write the steps as 3-5, the first step is 1.")
    steps = int(first), int(last or first)
    if not 1 <= steps[0] <= steps[1]:
        raise UserMistake(f"--trace {text!r}: the first step is 1, and none comes before it.")
    return steps


def _refuse_changes(*, trained_on: str, **texts: str) -> None:
    if given_values(list(texts.values())) or trained_on != "train":
        raise UserMistake(
            "--resume goes on with the training as it was; leave the other flags out, or start a "
            "new one with them."
        )


def _print_result(result: SearchResult, *, said: set[str]) -> None:
    record, best = result.record, result.best
    assert best is not None
    if record.is_unvalidated:
        click.echo(f"\nTrained on train and validation; the last epoch, {best.best_epoch}, counts.")
        calibrated = record.started.get("calibration")
        click.echo(
            f"  temperature and threshold: those of {calibrated['fitted_on']}"
            if calibrated
            else "  temperature and threshold: not set; no picture is left to fit them on"
        )
    else:
        click.echo(f"\n{record.objective} {best.best_value:.4f} in epoch {best.best_epoch}")
    print_artifacts(result, said=said)
    if not result.tracking_problem:
        command = next_command("evaluate", result.folder)
        click.echo(f"\nNext, look at the test pictures: {command}")
