"""The command evaluate: choose, calibrate, look at the test pictures once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.commands import next_command

if TYPE_CHECKING:
    from visiontuner.evaluation.report import EvaluationReport, Interval
    from visiontuner.workflow.evaluate import EvaluationResult

_NAMED_TRIALS = 6


@click.command(cls=OneLineErrors)
@click.argument("search", metavar="[SEARCH]", default="auto")
@click.option(
    "--prefer",
    type=click.Choice(["best", "cheapest"]),
    default="best",
    show_default=True,
    help="Keep the best trial, or of those tied with it the one that trained fastest.",
)
@click.option(
    "--precision",
    type=float,
    default=0.95,
    show_default=True,
    help="How many of the confident answers shall be right; sets the confidence threshold.",
)
def evaluate(search: str, prefer: str, precision: float) -> None:
    """Test the chosen model on pictures that played no part in the choice.

    The trials that cannot be told apart from the best are named; temperature and confidence
    threshold are fitted on validation and become part of the model, which is registered as a new
    version. Then the test pictures are looked at, and how many times that was done is counted.
    SEARCH is a search folder, by default the newest.

    \b
    Examples:
      visiontuner evaluate
      visiontuner evaluate --prefer cheapest
      visiontuner evaluate searches/dog-breeds-20261122-154100 --precision 0.99
    """
    from visiontuner.console import SearchConsole
    from visiontuner.workflow.evaluate import evaluate_search

    console = SearchConsole()
    try:
        result = evaluate_search(
            None if search in NOT_GIVEN else Path(search),
            prefer=prefer,  # type: ignore[arg-type]
            precision=precision,
            observer=console,
        )
    finally:
        console.close()
    _print(result)


def _print(result: EvaluationResult) -> None:
    choice, report = result.choice, result.report
    click.echo(f"\nChosen: {choice.chosen}")
    others = [trial for trial in choice.tied if trial != choice.best]
    if others:
        named = ", ".join(others[:_NAMED_TRIALS]) + (", …" if len(others) > _NAMED_TRIALS else "")
        click.echo(f"  not to be told apart from {choice.best} on validation: {named}")
    for edge in result.edges:
        click.echo(f"  {edge}")
    if report.metrics:
        _print_test(report, result.looks)
    for note in report.notes:
        click.echo(f"  note: {note}")
    click.echo(f"\nAll of it: {result.folder / 'evaluation'} and {result.folder / 'report.html'}")
    if result.model:
        click.echo(f"The calibrated model is {result.model} (in {result.tracking_uri}).")
        if report.metrics:
            command = next_command("promote", result.model)
            click.echo(f"\nNext, make it the champion if it is better: {command}")
    if result.tracking_problem:
        click.echo(f"\nNot everything is in MLflow: {result.tracking_problem}")
        click.echo(f"Nothing is lost. Write it later: {next_command('sync', result.folder)}")


def _print_test(report: EvaluationReport, looks: int) -> None:
    metrics = report.metrics
    click.echo(f"\nTest, {report.num_pictures:,} pictures (95 % interval):")
    for name, label in (
        ("accuracy", "accuracy"),
        ("top5_accuracy", "top-5 accuracy"),
        ("macro_f1", "macro F1"),
    ):
        if name in metrics:
            click.echo(f"  {label:<16} {_percent(metrics[name])}")
    for name, what in (("nll", "negative log-likelihood"), ("ece", "expected calibration error")):
        before, after = metrics[f"{name}_uncalibrated"], metrics[name]
        click.echo(
            f"  {what:<27} {after.value:.4f} ({after.low:.4f} to {after.high:.4f}); "
            f"{before.value:.4f} before temperature {report.temperature:.3g}"
        )
    threshold = report.threshold
    if threshold is not None and threshold.value is not None and threshold.precision is not None:
        click.echo(
            f"  answers above {threshold.value:.3f}: {_percent(threshold.precision)} right "
            f"(wanted {threshold.wanted_precision:.0%}), on {threshold.coverage.value:.1%} of "
            "the pictures"
        )
    if looks > 1:
        click.echo(
            f"  This was look {looks} at the test pictures: the more looks, the less they prove."
        )


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"
