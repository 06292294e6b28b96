"""visiontuner compare: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from visiontuner import garbage
from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    import pandas as pd

    from visiontuner.workflow.compare import Comparison

_FORMATS = ("text", "csv", "markdown", "json")
_SUFFIXES = {".csv": "csv", ".md": "markdown", ".json": "json"}


@click.command(cls=OneLineErrors)
@click.argument("targets", nargs=-1, metavar="[RUN|SEARCH]...")
@click.option("--sort", metavar="COLUMN", default="auto", help="Default: the objective.")
@click.option("--reverse", is_flag=True, help="Worst first.")
@click.option("--where", metavar="CONDITION", default="none", help="Only some runs; see below.")
@click.option(
    "--columns", metavar="A,B,…", default="auto", help="Columns by name or pattern, as test_*."
)
@click.option("--top", metavar="N", default="auto", help="Only the first N runs.")
@click.option(
    "--format",
    "form",
    metavar="|".join(_FORMATS),
    default="auto",
    help="Default: text, or what the name of --output says. csv and json hold every column.",
)
@click.option("--output", metavar="FILE", default="none", help="Write the table to a file.")
@click.option("--curves", metavar="FILE.png", default="none", help="Draw their learning curves.")
@click.option(
    "--metric", "metrics", metavar="NAME", multiple=True, help="What --curves draws. Repeatable."
)
@click.option(
    "--figure", metavar="FILE.png", default="none", help="Draw searches: best so far by time."
)
def compare(
    targets: tuple[str, ...],
    sort: str,
    reverse: bool,
    where: str,
    columns: str,
    top: str,
    form: str,
    output: str,
    curves: str,
    metrics: tuple[str, ...],
    figure: str,
) -> None:
    """Compare runs: parameters, best value, epochs, time, findings; the best first.

    A target is a search folder, an MLflow run id (a search's run means its trials), the name of an
    experiment or search in MLflow, or models:/NAME/VERSION. Without one: the newest search in
    searches/. MLflow is looked for at MLFLOW_TRACKING_URI; search folders need none.

    --where compares columns with values: <, <=, >, >=, ==, !=, in [..], joined by and, or, not.
    Names that are no Python names are put in backticks.

    \b
    Examples:
      visiontuner compare
      visiontuner compare --where "learning_rate < 0.01 and batch_size == 64" --top 5
      visiontuner compare dog-breeds --sort validation_loss --output runs.csv
      visiontuner compare searches/a searches/b --figure ab.png --curves curves.png
    """
    form, output_file = _form(form, output)
    curves_file, figure_file = _picture(curves, "--curves"), _picture(figure, "--figure")
    count = _count(top)
    with garbage.left_alone():
        from visiontuner.workflow.compare import draw_curves, draw_searches, load_runs

        comparison = load_runs([target for target in targets if target not in NOT_GIVEN])
        frame = _chosen(comparison, where, sort, reverse=reverse)[:count]
        told = [*comparison.notes]
        if len(comparison.runs) and frame.empty:
            told.append("No run fulfils --where.")
        told += _print(comparison, frame, form, columns, output_file)
        for note in told:
            click.echo(note, err=form != "text" or output_file is not None)
        if curves_file:
            names = [name for name in metrics if name not in NOT_GIVEN]
            for note in draw_curves(comparison, list(frame.index), names, curves_file):
                click.echo(note, err=True)
            click.echo(f"Learning curves: {curves_file}", err=True)
        if figure_file:
            draw_searches(comparison, figure_file)
            click.echo(f"Best so far: {figure_file}", err=True)


def _chosen(comparison: Comparison, where: str, sort: str, *, reverse: bool) -> pd.DataFrame:
    from visiontuner.evaluation.compare import sort as sort_rows
    from visiontuner.evaluation.where import where as keep

    by = None if sort in NOT_GIVEN else sort
    frame = sort_rows(comparison.frame, by, reverse=reverse)
    return frame if where in NOT_GIVEN else keep(frame, where)


def _print(
    comparison: Comparison, frame: pd.DataFrame, form: str, columns: str, output: Path | None
) -> list[str]:
    """The table to where it belongs; sentences to say after it."""
    from visiontuner.evaluation.compare import default_columns, pick_columns

    whole = form in ("csv", "json")
    if columns not in NOT_GIVEN:
        names = pick_columns(frame, [name.strip() for name in columns.split(",") if name.strip()])
    else:
        names = list(frame.columns) if whole else default_columns(comparison.frame)
    if form == "text":
        return _print_text(comparison, frame, names, output)
    from visiontuner.evaluation import formats

    text = getattr(formats, f"to_{form}")(frame[names])
    if output is None:
        click.echo(text, nl=False)
        return []
    return _written(output, text, frame)


def _print_text(
    comparison: Comparison, frame: pd.DataFrame, names: list[str], output: Path | None
) -> list[str]:
    import io

    from visiontuner.cli.compare_table import print_runs
    from visiontuner.console import SafeConsole
    from visiontuner.workflow.compare import describe_searches

    told: list[str] = []
    if output is None:
        console = SafeConsole()
        if not console.is_terminal:
            console = SafeConsole(width=_WIDE)
        if len(frame):
            told = print_runs(console, frame, names)
    else:
        page = io.StringIO()
        print_runs(SafeConsole(file=page, width=_WIDE), frame, names)
        told = _written(output, _without_trailing_spaces(page.getvalue()), frame)
    return [*told, *describe_searches(comparison)]


_WIDE = 10_000  # a file has no width: nothing is cut


def _without_trailing_spaces(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _written(output: Path, text: str, frame: pd.DataFrame) -> list[str]:
    from visiontuner.workflow.compare import write_file

    write_file(output, text.encode("utf-8", errors="replace"))
    return [f"{len(frame):,} run{'' if len(frame) == 1 else 's'} in {output}."]


def _form(form: str, output: str) -> tuple[str, Path | None]:
    file = None if output in NOT_GIVEN else Path(output)
    if form in NOT_GIVEN:
        return (_SUFFIXES.get(file.suffix.lower(), "text") if file else "text"), file
    if form not in _FORMATS:
        raise UserMistake(f"--format {form!r} is none of {', '.join(_FORMATS)}.")
    return form, file


def _picture(value: str, flag: str) -> Path | None:
    if value in NOT_GIVEN:
        return None
    if Path(value).suffix.lower() != ".png":
        raise UserMistake(f"{flag} writes PNG; {value!r} must end in .png.")
    return Path(value)


def _count(top: str) -> int | None:
    if top in NOT_GIVEN:
        return None
    if not (top.isascii() and top.isdigit() and int(top[:9]) > 0):
        raise UserMistake(f"--top must be a whole number >= 1, not {top!r}.")
    return int(top[:9])
