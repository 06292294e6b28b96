"""`visiontuner promote`: parsing and printing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN

if TYPE_CHECKING:
    from visiontuner.evaluation.bootstrap import Interval
    from visiontuner.serving.promotion import Promotion


@click.command(cls=OneLineErrors)
@click.argument("model", default="auto")
@click.option("--force", is_flag=True, help="Whatever the test says, or if there can be none.")
@click.option("--dry-run", is_flag=True, help="Show the test and the decision; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def promote(model: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Make a version the champion, if it is better on the same test pictures beyond noise.

    MODEL is NAME, NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION. Default: the newest version
    of the newest search's model. The reason is written on the version either way.

    \b
    Examples:
      visiontuner promote
      visiontuner promote dog-breeds --dry-run
      visiontuner promote models:/dog-breeds/3 --force
    """
    from visiontuner.workflow.promote import promote as decide

    decided = decide(None if model in NOT_GIVEN else model, force=force, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({**decided.to_dict(), "dry_run": dry_run}, indent=1))
    else:
        _print(decided, dry_run=dry_run)


def _print(decided: Promotion, *, dry_run: bool) -> None:
    name, number = decided.name, decided.challenger
    click.echo(f"{name}: version {number}" + _against(decided))
    for version, accuracy in (
        (number, decided.accuracy),
        (decided.champion, decided.champion_accuracy),
    ):
        if accuracy is not None:
            click.echo(f"  version {version:<4} test accuracy {_interval(accuracy)}")
    if decided.test is not None:
        test = decided.test
        click.echo(f"  difference   {_interval(test.difference, '+')}")
        click.echo(
            f"  only version {number} is right on {test.only_a:,} pictures, only version "
            f"{decided.champion} on {test.only_b:,}; p = {test.p_value:.2g}"
        )
    word = {"promoted": "Promoted", "kept": "Kept", "unchanged": "Unchanged"}[decided.decision]
    click.echo(f"{'Would be ' + word.lower() if dry_run else word}. {decided.reason}")
    if decided.decision == "promoted" and not dry_run:
        click.echo(f"It answers as models:/{name}@champion.")
    elif decided.decision == "kept":
        click.echo(f"The champion stays version {decided.champion}.")


def _against(decided: Promotion) -> str:
    if decided.champion is None:
        return ", and no champion yet"
    if decided.decision == "unchanged":
        return ""
    return f" against the champion, version {decided.champion}"


def _interval(interval: Interval, sign: str = "") -> str:
    return (
        f"{interval.value:{sign}.4f}  (95 %: {interval.low:{sign}.4f} to {interval.high:{sign}.4f})"
    )
