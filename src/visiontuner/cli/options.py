"""What several commands are told: which experiment, and the words for "not given"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from visiontuner.experiment import Experiment

NOT_GIVEN = ("auto", "none")
"""Words that MLproject passes for a parameter that was not given."""


def experiment_options(command: Callable[..., Any]) -> Callable[..., Any]:
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
            help="Folder, archive (path or URL), s3:// or `digits`, instead of the experiment's.",
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


def given_values(values: Sequence[str]) -> list[str]:
    """Without those that stand for "not given"."""
    return [value for value in values if value not in NOT_GIVEN]


def read_raw(experiment: str, data: str) -> tuple[dict[str, Any], str]:
    """An experiment's keys and values, not yet checked, and where they are from.

    The file, or without one the quickstart; own pictures alone get the general defaults.
    """
    from visiontuner.experiment import QUICKSTART, read_experiment

    own_data = data not in NOT_GIVEN
    if experiment not in NOT_GIVEN:
        raw, where = read_experiment(Path(experiment)), experiment
    else:
        raw, where = ({} if own_data else dict(QUICKSTART)), "the command line"
    if own_data:
        raw["data"] = {**(raw.get("data") or {}), "source": data}
    return raw, where


def load_experiment(experiment: str, data: str, overrides: Sequence[str]) -> Experiment:
    """What `experiment_options` say, checked."""
    from visiontuner.experiment import Experiment

    raw, where = read_raw(experiment, data)
    return Experiment.parse(raw, overrides, where=where)
