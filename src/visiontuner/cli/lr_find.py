"""The command `lr-find`: where a search for the learning rate belongs."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN, experiment_options, given_values, load_experiment
from visiontuner.cli.origin import choose_training
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.experiment import Domain, Experiment
    from visiontuner.workflow.lr_find import FoundLearningRate

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


@click.command("lr-find", cls=OneLineErrors)
@experiment_options
@click.option("--backbone", metavar="NAME", default="auto", help="See `visiontuner backbones`.")
@click.option(
    "--from",
    "origin",
    metavar="SEARCH|RUN|MODEL",
    default="none",
    help="For what `train --from` would train, a network from the trained head where there is one.",
)
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
    origin: str,
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
      visiontuner lr-find --from searches/photos-20261122-154100 --set model.train=last_stage
    """
    given = [] if backbone in NOT_GIVEN else [f"model.backbone={backbone}"]
    given += given_values(overrides)
    found_origin = None
    if origin in NOT_GIVEN:
        chosen = load_experiment(experiment, data, given)
    else:
        chosen, found_origin = choose_training(experiment, data, given, origin)
    rates = {name: _number(f"--{name}", value) for name, value in (("low", low), ("high", high))}
    count = _number("--steps", steps)

    from visiontuner.console import SearchConsole
    from visiontuner.workflow.lr_find import find_learning_rate

    console = SearchConsole()
    try:
        found = find_learning_rate(
            chosen,
            origin=found_origin,
            output=None if output in NOT_GIVEN else Path(output),
            steps=None if count is None else int(count),
            observer=console,
            on_step=lambda step, steps, *_: console.progress("Steps", step, steps, "steps"),
            **rates,
        )
    finally:
        console.close()
    _print(found, _space_around(found, chosen) if found_origin is None else None)


def _print(found: FoundLearningRate, space: str | None) -> None:
    """The curve and what to do with it; `space` are the flags that search around it."""
    curve, suggestion = found.curve, found.curve.suggestion
    click.echo(f"\nTraining loss of {found.subject}:")
    click.echo(sparkline(curve.smoothed))
    click.echo(axis(curve.learning_rates[0], curve.learning_rates[-1]))
    click.echo(f"  curve: {found.figure}")
    if suggestion is None:
        click.echo("\nThe loss never fell: nothing to suggest. Try --high, or more --steps.")
        return
    click.echo(f"\nSuggested learning rate: {suggestion.learning_rate:g}")
    if space is None:
        rate = _yaml(suggestion.learning_rate)
        click.echo(f"To train with it:        --set training.learning_rate={rate}")
    else:
        click.echo(f"To search around it:     {space}")


def _space_around(found: FoundLearningRate, experiment: Experiment) -> str | None:
    """Flags that search around the suggestion, and everything else that is searched as before."""
    suggestion = found.curve.suggestion
    if suggestion is None:
        return None
    rates = f"{{low: {_yaml(suggestion.low)}, high: {_yaml(suggestion.high)}, scale: log}}"
    space = {"learning_rate": rates}
    # A space that begins with one name holds no other: the default's have to be said.
    if "space" not in experiment.search.model_fields_set:
        others = {n: d for n, d in experiment.search.space.items() if n != "learning_rate"}
        space |= {name: _flow(domain) for name, domain in others.items()}
    settings = [shlex.quote(f"search.space.{name}={domain}") for name, domain in space.items()]
    return " ".join(f"--set {setting}" for setting in settings)


def _flow(domain: Domain) -> str:
    """On one line of YAML."""
    import yaml

    raw = domain.model_dump(mode="json")
    return yaml.safe_dump(raw, default_flow_style=True, sort_keys=False, width=10_000).strip()


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
