"""The command `lr-find`: where a search for the learning rate belongs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN, experiment_options, given_values, load_experiment
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.workflow.lr_find import FoundLearningRate

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


@click.command("lr-find", cls=OneLineErrors)
@experiment_options
@click.option("--backbone", metavar="NAME", default="auto", help="See `visiontuner backbones`.")
@click.option("--low", metavar="RATE", default="auto", help="Learning rate to begin with: 1e-6.")
@click.option("--high", metavar="RATE", default="auto", help="Learning rate to end with: 10.")
@click.option("--steps", metavar="N", default="auto", help="Default: 200, on pictures 100.")
@click.option(
    "--output",
    metavar="FOLDER",
    default="auto",
    help="Where the curve goes. Default: lr-find/NAME-TIME.",
)
def lr_find(
    experiment: str,
    data: str,
    overrides: tuple[str, ...],
    backbone: str,
    low: str,
    high: str,
    steps: str,
    output: str,
) -> None:
    """Train once with a growing learning rate, and suggest a range to search.

    The loss first stays where it is, then falls, then explodes (the learning rate range test,
    Smith 2017). A few seconds on features; nothing of the training is kept but its curve.

    \b
    Examples:
      visiontuner lr-find --data photos/
      visiontuner lr-find --data photos/ --set model.train=last_stage --set training.batch_size=64
    """
    given = [] if backbone in NOT_GIVEN else [f"model.backbone={backbone}"]
    chosen = load_experiment(experiment, data, [*given, *given_values(overrides)])
    rates = {name: _number(f"--{name}", value) for name, value in (("low", low), ("high", high))}
    count = _number("--steps", steps)

    from visiontuner.console import SearchConsole
    from visiontuner.workflow.lr_find import find_learning_rate

    console = SearchConsole()
    try:
        found = find_learning_rate(
            chosen,
            output=None if output in NOT_GIVEN else Path(output),
            steps=None if count is None else int(count),
            observer=console,
            on_step=lambda step, steps, *_: console.progress("Steps", step, steps, "steps"),
            **rates,
        )
    finally:
        console.close()
    _print(found)


def _print(found: FoundLearningRate) -> None:
    curve, suggestion = found.curve, found.curve.suggestion
    click.echo(f"\nTraining loss of {found.subject}:")
    click.echo(sparkline(curve.smoothed))
    click.echo(axis(curve.learning_rates[0], curve.learning_rates[-1]))
    click.echo(f"  curve: {found.figure}")
    if suggestion is None:
        click.echo("\nThe loss never fell: nothing to suggest. Try --high, or more --steps.")
        return
    space = f"{{low: {_yaml(suggestion.low)}, high: {_yaml(suggestion.high)}, scale: log}}"
    click.echo(f"\nSuggested learning rate: {suggestion.learning_rate:g}")
    click.echo(f"To search around it:     --set 'search.space.learning_rate={space}'")


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """A curve as one line of bars; each is the mean of its share of the values.

    What lies above the first value, a loss that explodes, is as high as the first.
    """
    width = min(width, len(values))
    edges = [round(place * len(values) / width) for place in range(width + 1)]
    means = [
        math.fsum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)
    ]
    low, high = min(means), max(values[0], min(means))
    span = (high - low) or 1.0
    heights = [min(1.0, (mean - low) / span) for mean in means]
    return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights)


def axis(low: float, high: float, width: int = _WIDTH) -> str:
    """The learning rates at both ends, under a sparkline."""
    left, right = f"{low:.0e}", f"{high:.0e}"
    return left + " " * max(1, width - len(left) - len(right)) + right


def _number(flag: str, text: str) -> float | None:
    if text in NOT_GIVEN:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    whole = flag != "--steps" or value == int(value) if math.isfinite(value) else False
    if not whole:
        kind = "a whole number" if flag == "--steps" else "a number such as 1e-6"
        raise UserMistake(f"{flag} must be {kind}, got {text!r}.")
    return value


def _yaml(value: float) -> str:
    """As YAML 1.1 reads it as a number: an exponent needs a dot before it."""
    text = f"{value:g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text
