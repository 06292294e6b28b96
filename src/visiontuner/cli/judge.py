"""The commands that judge: evaluate, compare, diagnose, suspects, suggest, drift, promote,
lineage."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from visiontuner.cli.console import SafeConsole, SearchConsole, print_runs
from visiontuner.cli.options import (
    FOLDER,
    SINCE,
    TEXT,
    Given,
    OneLineErrors,
    echo_data,
    echo_json,
    experiment_options,
    load_experiment,
    number,
)
from visiontuner.errors import UserMistake
from visiontuner.evaluation import compare as formats
from visiontuner.evaluation.compare import default_columns, pick_columns
from visiontuner.evaluation.compare import sort as sort_rows
from visiontuner.evaluation.compare import where as keep
from visiontuner.paths import (
    DRIFT_FIGURE,
    DRIFT_FILE,
    DRIFT_NEW_FOLDER,
    EXPERIMENT_FILE,
    SUGGEST_FILE,
    SUGGEST_SHEET,
    SUGGEST_SORT_FOLDER,
    SUSPECTS_SHEET,
)
from visiontuner.text import next_command
from visiontuner.workarounds import python as garbage

if TYPE_CHECKING:
    import pandas as pd

    from visiontuner.evaluation.intervals import Interval
    from visiontuner.evaluation.report import EvaluationReport
    from visiontuner.experiment.schema import Experiment
    from visiontuner.journal import Finding
    from visiontuner.serving.lineage import Facts, Lineage
    from visiontuner.serving.promotion import Promotion
    from visiontuner.workflow.compare import Comparison
    from visiontuner.workflow.diagnose import DiagnosedRun, Diagnosis
    from visiontuner.workflow.drift import DriftResult
    from visiontuner.workflow.evaluate import EvaluationResult
    from visiontuner.workflow.evaluate_folder import FolderEvaluation
    from visiontuner.workflow.lineage import LineageCheck
    from visiontuner.workflow.suspects import SuspectsResult


# The command evaluate: choose, calibrate, look at the test images once.


_NAMED_TRIALS = 6


@click.command(cls=OneLineErrors)
@click.argument("search", metavar="[SEARCH]", required=False, type=FOLDER)
@click.option(
    "--prefer",
    type=click.Choice(["best", "cheapest", "fastest"]),
    default="best",
    show_default=True,
    help="Keep the best trial; or of those tied with it the one that trained fastest; or the one "
    "whose network answers fastest.",
)
@click.option(
    "--within",
    metavar="SHARE",
    type=TEXT,
    help="With --prefer fastest: how much less accurate it may be, 1% or 0.01.",
)
@click.option(
    "--max-latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Only networks that answer one image in so many milliseconds on one thread here.",
)
@click.option(
    "--precision",
    type=float,
    default=0.95,
    show_default=True,
    help="How many of the confident answers shall be right; sets the confidence threshold.",
)
@click.option(
    "--data",
    metavar="FOLDER",
    type=TEXT,
    help="Score a finished model on these labelled images instead: class folders or a table.",
)
@click.option(
    "--model", metavar="MODEL", type=TEXT, help="With --data: a folder or a model's name."
)
@click.option(
    "--classes",
    metavar="FILE",
    type=FOLDER,
    help="With --data: what classes of other names become (columns class, becomes).",
)
@click.option("--output", metavar="FOLDER", type=FOLDER, help="With --data: where numbers go.")
def evaluate(
    search: Path | None,
    prefer: str,
    within: str | None,
    max_latency_ms: float | None,
    precision: float,
    data: str | None,
    model: str | None,
    classes: Path | None,
    output: Path | None,
) -> None:
    """Test the chosen model on images that played no part in the choice.

    The trials that are statistically tied with the best are named; temperature and confidence
    threshold are fitted on validation and become part of the model, which is registered as a new
    version. Then the test images are looked at, and how many times that was done is counted.
    SEARCH is a search folder, by default the newest. With --data a finished model is scored on
    other labelled images instead, and stays as it is.

    \b
    Examples:
      visiontuner evaluate
      visiontuner evaluate --prefer cheapest
      visiontuner evaluate --prefer fastest --within 1% --max-latency-ms 10
      visiontuner evaluate searches/dog-breeds-20261122-154100 --precision 0.99
      visiontuner evaluate --data photos-of-2026/                 the newest search's model
      visiontuner evaluate --data labels.csv --model dogs@champion --classes names.csv
    """
    if data is not None:
        if prefer != "best" or within is not None or max_latency_ms is not None:
            raise UserMistake(
                "--prefer, --within and --max-latency-ms choose a trial of a search; leave them "
                "out with --data."
            )
        _evaluate_folder(search, data, model, classes=classes, output=output)
        return
    if any(given is not None for given in (model, classes, output)):
        raise UserMistake("--model, --classes and --output go with --data FOLDER.")
    from visiontuner.workflow.evaluate import evaluate_search

    console = SearchConsole()
    try:
        result = evaluate_search(
            search,
            prefer=prefer,  # type: ignore[arg-type]
            precision=precision,
            within=None if within is None else _share(within),
            max_latency_ms=max_latency_ms,
            observer=console,
        )
    finally:
        console.close()
    _print(result)


def _share(text: str) -> float:
    """`1%` or `0.01` -> 0.01."""
    number, is_percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if is_percent else 1)
    except ValueError:
        share = math.nan
    if rest or not 0 <= share < 1:
        raise UserMistake(f"--within must be a share such as 1% or 0.01, got {text!r}.")
    return share


def _evaluate_folder(
    search: Path | None, data: str, model: str | None, **options: Path | None
) -> None:
    """Score a model on labelled images; a search that is named is the model."""
    from visiontuner.workflow.evaluate_folder import evaluate_folder

    if search is not None and model is not None:
        raise UserMistake("Name one model: SEARCH or --model.")
    console = SearchConsole()
    try:
        result = evaluate_folder(
            data, model=str(search) if search else model, observer=console, **options
        )
    finally:
        console.close()
    _print_folder(result)


def _print_folder(result: FolderEvaluation) -> None:
    report = result.report
    _print_metrics(report, f"{report.num_images:,} images (95 % interval):")
    wanted = "" if report.threshold is None else f"{report.threshold.wanted_precision:.0%}"
    for verdict, text in (
        ("holds", f"The confidence threshold holds here: {wanted} precision or more."),
        ("does not hold", f"The confidence threshold does not hold here: not {wanted} precision."),
        ("cannot be told", f"Too few images to tell whether the threshold keeps {wanted}."),
    ):
        if result.threshold_verdict == verdict:
            click.echo(f"  {text}")
    click.echo("\nWhat is new in these images:")
    if result.new is not None:
        click.echo(f"  unlike the training images  {_percent(result.new)}; 5 % are expected")
    _print_statistics(result)
    if result.classes:
        shares = ", ".join(
            f"{share.name} {share.here:.1%} ({share.training:.1%})" for share in result.classes
        )
        click.echo(f"  shares of classes (training) that differ most: {shares}")
    for note in report.notes:
        click.echo(f"  note: {note}")
    if result.test_images:
        click.echo(
            f"  {result.test_images:,} of them are test images of the search: this is evaluation "
            f"{result.looks} of its test set."
        )
    elif result.test_images is None:
        click.echo("  Whether test images of its search are among them is not known.")
    if result.unreadable:
        click.echo(
            f"  {len(result.unreadable):,} images could not be read; report.json names them."
        )
    click.echo(f"\nAll of it: {result.folder}")


def _print_statistics(result: FolderEvaluation) -> None:
    for name, unit in (("brightness", "of 255"), ("side", "pixels, the shorter side")):
        median, low, high = getattr(result.statistics, name)
        text = f"  {name:<10} {median:.0f} ({low:.0f} to {high:.0f}) {unit}"
        if result.training_statistics is not None:
            median, low, high = getattr(result.training_statistics, name)
            text += f"; training images {median:.0f} ({low:.0f} to {high:.0f})"
        click.echo(text)


def _print(result: EvaluationResult) -> None:
    choice, report = result.choice, result.report
    click.echo(f"\nChosen: {choice.chosen}")
    others = [trial for trial in choice.tied if trial != choice.best]
    if others:
        named = ", ".join(others[:_NAMED_TRIALS]) + (", …" if len(others) > _NAMED_TRIALS else "")
        click.echo(f"  statistically tied with {choice.best} on validation: {named}")
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
    _print_metrics(report, f"Test, {report.num_images:,} images (95 % interval):")
    if looks > 1:
        click.echo(
            f"  This was evaluation {looks} of the test set: the more evaluations, the less they "
            "prove."
        )


def _print_metrics(report: EvaluationReport, heading: str) -> None:
    metrics = report.metrics
    click.echo(f"\n{heading}")
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
            "the images"
        )


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


# visiontuner compare: runs side by side.


_FORMATS = ("text", "csv", "markdown", "json")
_SUFFIXES = {".csv": "csv", ".md": "markdown", ".json": "json"}


def _form(text: str) -> str:
    if text not in _FORMATS:
        raise ValueError(text)
    return text


def _png(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise ValueError(text)
    return Path(text)


_PNG = Given(_png, "a PNG file, FILE.png")


@click.command(cls=OneLineErrors)
@click.argument("targets", nargs=-1, metavar="[RUN|SEARCH]...", type=TEXT)
@click.option("--sort", metavar="COLUMN", type=TEXT, help="Default: the objective.")
@click.option("--reverse", is_flag=True, help="Worst first.")
@click.option("--where", metavar="CONDITION", type=TEXT, help="Only some runs; see below.")
@click.option(
    "--columns", metavar="A,B,…", type=TEXT, help="Columns by name or pattern, as test_*."
)
@click.option("--top", metavar="N", type=number(1, whole=True), help="Only the first N runs.")
@click.option(
    "--format",
    "form",
    metavar="|".join(_FORMATS),
    type=Given(_form, f"one of {', '.join(_FORMATS)}"),
    help="Default: text, or what the name of --output says. csv and json hold every column.",
)
@click.option("--output", metavar="FILE", type=FOLDER, help="Write the table to a file.")
@click.option("--curves", metavar="FILE.png", type=_PNG, help="Draw their learning curves.")
@click.option(
    "--metric",
    "metrics",
    metavar="NAME",
    type=TEXT,
    multiple=True,
    help="What --curves draws. Repeatable.",
)
@click.option("--figure", metavar="FILE.png", type=_PNG, help="Draw searches: best so far by time.")
def compare(
    targets: tuple[str, ...],
    sort: str | None,
    reverse: bool,
    where: str | None,
    columns: str | None,
    top: int | None,
    form: str | None,
    output: Path | None,
    curves: Path | None,
    metrics: tuple[str, ...],
    figure: Path | None,
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
    form = form or _SUFFIXES.get(output.suffix.lower() if output else "", "text")
    with garbage.left_alone():
        from visiontuner.workflow.compare import draw_curves, draw_searches, load_runs

        comparison = load_runs(targets)
        frame = _chosen(comparison, where, sort, reverse=reverse)[:top]
        told = [*comparison.notes]
        if len(comparison.runs) and frame.empty:
            told.append("No run fulfils --where.")
        told += _print_comparison(comparison, frame, form, columns, output)
        for note in told:
            click.echo(note, err=form != "text" or output is not None)
        if curves:
            for note in draw_curves(comparison, list(frame.index), metrics, curves):
                click.echo(note, err=True)
            click.echo(f"Learning curves: {curves}", err=True)
        if figure:
            draw_searches(comparison, figure)
            click.echo(f"Best so far: {figure}", err=True)


def _chosen(
    comparison: Comparison, where: str | None, sort: str | None, *, reverse: bool
) -> pd.DataFrame:
    frame = sort_rows(comparison.frame, sort, reverse=reverse)
    return frame if where is None else keep(frame, where)


def _print_comparison(
    comparison: Comparison,
    frame: pd.DataFrame,
    form: str,
    columns: str | None,
    output: Path | None,
) -> list[str]:
    """The table to where it belongs; sentences to say after it."""

    whole = form in ("csv", "json")
    if columns is not None:
        names = pick_columns(frame, [name.strip() for name in columns.split(",") if name.strip()])
    else:
        names = list(frame.columns) if whole else default_columns(comparison.frame)
    if form == "text":
        return _print_text(comparison, frame, names, output)

    text = getattr(formats, f"to_{form}")(frame[names])
    if output is None:
        echo_data(text, nl=False)
        return []
    return _written(output, text, frame)


def _print_text(
    comparison: Comparison, frame: pd.DataFrame, names: list[str], output: Path | None
) -> list[str]:
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


# `visiontuner diagnose`: parsing and printing.


_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
_ORDER = {"error": 0, "warning": 1, "info": 2}


@click.command(cls=OneLineErrors)
@click.argument("target", metavar="[RUN|FOLDER]", required=False, type=TEXT)
@click.option("--write", is_flag=True, help="Put the findings on the MLflow runs: tag, artifact.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diagnose(target: str, write: bool, as_json: bool) -> None:
    """Say what went wrong in a training, why, and what to change.

    RUN is an MLflow run id, of any tool (a parent run means its children), or an experiment's
    name; FOLDER a search folder. Default: the newest search. Rules: docs/rules.md.

    \b
    Examples:
      visiontuner diagnose
      visiontuner diagnose searches/digits-20261122-154100 --json
      visiontuner diagnose 0f3c9a… --write
    """
    from visiontuner.workflow.diagnose import diagnose as look

    diagnosis = look(target, write=write)
    if as_json:
        echo_json(diagnosis.to_dict(), indent=1, ensure_ascii=False)
    else:
        _print_findings(diagnosis)


def _print_findings(diagnosis: Diagnosis) -> None:
    console = SafeConsole()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("trial", "finding", "evidence and advice"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "trial")
    rows = [(run.name, finding) for run in diagnosis.runs for finding in run.findings]
    rows += [("data", finding) for finding in diagnosis.data]
    for name, finding in sorted(rows, key=lambda row: _ORDER[row[1].severity]):
        table.add_row(name, _rule(finding), _said(finding))
    if rows:
        console.print(table)
    for run in diagnosis.runs:
        if run.note:
            click.echo(f"{run.name}: {run.note}")
    for note in diagnosis.notes:
        click.echo(note)
    click.echo(_summary(diagnosis.runs, diagnosis.target))


def _rule(finding: Finding) -> Text:
    return Text(f"{finding.rule}\n{finding.severity}", style=_COLOURS[finding.severity])


def _said(finding: Finding) -> Text:
    where = f" (epoch {finding.step})" if finding.step is not None else ""
    text = Text(f"{finding.evidence.rstrip('.')}{where}.\n")
    return text.append(finding.advice, style="dim")


def _summary(runs: tuple[DiagnosedRun, ...], target: str) -> str:
    errors = sum(bool(run.errors) for run in runs)
    quiet = sum(not run.findings for run in runs)
    trainings = "1 training" if len(runs) == 1 else f"{len(runs)} trainings"
    return f"{target}: {trainings}, {errors} with errors, {quiet} without findings."


# `visiontuner suspects`: parsing and printing.


_NAMED_SUSPECTS = 10


@click.command(cls=OneLineErrors)
@click.argument("search", metavar="[SEARCH]", required=False, type=FOLDER)
@experiment_options
@click.option("--output", metavar="FOLDER", type=FOLDER, help="Where suspects.csv is written.")
def suspects(
    search: Path | None,
    experiment: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
) -> None:
    """Name the images whose label is probably wrong, in a table to correct them with.

    A regression on the features answers each training and validation image without having seen it;
    where it gives the image's own label almost no chance, the label is suspect. SEARCH is a search
    folder, by default the newest; --data or --experiment look at images without a search.

    \b
    Examples:
      visiontuner suspects
      visiontuner suspects searches/dog-breeds-20261122-154100
      visiontuner suspects --data photos/
    """
    from visiontuner.workflow.suspects import find_suspects

    chosen = _given_images(search, experiment, data, overrides)
    console = SearchConsole()
    try:
        result = find_suspects(search, experiment=chosen, output=output, observer=console)
    finally:
        console.close()
    if result.search is not None:
        experiment = str(result.search / EXPERIMENT_FILE)
    _print_suspects(result, experiment, data, overrides)


def _given_images(
    search: Path | None, experiment: str | None, data: str | None, overrides: Sequence[str]
) -> Experiment | None:
    given = bool(experiment or data or overrides)
    if given and search is not None:
        raise UserMistake("Name a search, or images with --data or --experiment, not both.")
    return load_experiment(experiment, data, overrides) if given else None


def _print_suspects(
    result: SuspectsResult, experiment: str | None, data: str | None, overrides: Sequence[str]
) -> None:
    number, images = len(result.suspects), f"{result.images:,} training and validation images"
    if not number:
        click.echo(f"\nNo label of {images} is suspect.")
        _print_odd(result)
        return
    click.echo(f"\nSuspect labels: {number:,} of {images} ({number / result.images:.1%})")
    click.echo("  score   label → suggested")
    for suspect in result.suspects[:_NAMED_SUSPECTS]:
        click.echo(f"  {suspect.score:.4f}  {suspect.label} → {suspect.suggested}   {suspect.path}")
    if number > _NAMED_SUSPECTS:
        click.echo(f"  … and {number - _NAMED_SUSPECTS:,} more")
    click.echo(f"\nAll of them: {result.file}; the first as images: {SUSPECTS_SHEET} beside it.")
    _print_odd(result)
    if result.kept_rows:
        click.echo(f"It also holds {result.kept_rows:,} rows of the data.labels of before.")
    flags = [
        word
        for flag, value in (("--experiment", experiment), ("--data", data))
        if value
        for word in (flag, value)
    ]
    flags += [word for override in overrides for word in ("--set", override)]
    command = next_command("tune", *flags, "--set", f"data.labels={result.file}")
    click.echo(
        "\nNext, look at them and correct the column `label`; empty, the image is left out. Then:\n"
        f"{command}"
    )


def _print_odd(result: SuspectsResult) -> None:
    if not result.odd:
        return
    counts = Counter(image.reason for image in result.odd)
    words = {"outlier": "unlike their class"}
    said = ", ".join(f"{count:,} {words.get(reason, reason)}" for reason, count in counts.items())
    click.echo(f"Odd images: {said}. All of them: {result.odd_file}")


# `visiontuner suggest`: parsing and printing.


@click.command(cls=OneLineErrors)
@click.argument("images", metavar="FOLDER", type=FOLDER)
@click.argument("search", metavar="[SEARCH]", required=False, type=FOLDER)
@experiment_options
@click.option(
    "--budget",
    metavar="IMAGES",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="How many images are chosen.",
)
@click.option("--output", metavar="FOLDER", type=FOLDER, help="Where they are written.")
def suggest(
    images: Path,
    search: Path | None,
    experiment: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    budget: int,
    output: Path | None,
) -> None:
    """Choose the unlabelled images of FOLDER that are most worth a label.

    They come as a list, as a contact sheet, and in a folder for each class that the model guesses:
    move what is wrong, then put the folders beside your images. Links are moved, the images stay.
    SEARCH is a search folder, by default the newest; --data or --experiment name labelled images
    without a search.

    \b
    Examples:
      visiontuner suggest unsorted/
      visiontuner suggest unsorted/ --budget 200 --data photos/
    """
    from visiontuner.workflow.suggest import suggest_images

    chosen = _given_images(search, experiment, data, overrides)
    console = SearchConsole()
    try:
        result = suggest_images(
            images, search, experiment=chosen, budget=budget, output=output, observer=console
        )
    finally:
        console.close()
    number = len(result.suggestions)
    click.echo(f"\nTo label next: {number:,} of {result.unlabelled:,} images.")
    if result.labelled:
        click.echo(f"Left out: {result.labelled:,} that are among the data set's images already.")
    if result.unreadable:
        click.echo(f"Left out: {result.unreadable:,} that cannot be read.")
    click.echo(f"  {result.folder / SUGGEST_FILE}: the list, most instructive first")
    click.echo(f"  {result.folder / SUGGEST_SHEET}: the first ones as images")
    click.echo(
        f"  {result.folder / SUGGEST_SORT_FOLDER}/: a folder for each guess. Move what is wrong, "
        "then copy the folders into your training images."
    )


# `visiontuner drift`: parsing and printing.


# As `drift_reference.MEASURES`, which takes seconds to import.
_MEASURES = (
    *("features", "novelty", "confidence", "classes"),
    *("brightness", "contrast", "sharpness", "side"),
)
_UNREADABLE_NAMED = 3


def _rate(text: str) -> float:
    """`5%` or `0.05` -> 0.05."""
    value, is_percent, rest = text.strip().partition("%")
    try:
        rate = float(value) / (100 if is_percent else 1)
    except ValueError:
        rate = math.nan
    if rest or not 0.001 <= rate <= 0.5:
        raise UserMistake(f"--false-alarms must be between 0.1% and 50%, got {text!r}.")
    return rate


@click.command(cls=OneLineErrors)
@click.argument("source", metavar="NAME|FOLDER", type=TEXT)
@click.argument("search", metavar="[SEARCH]", required=False, type=FOLDER)
@click.option("--since", metavar="TIME", type=SINCE, help="Of an endpoint: no older, as 24h or 7d.")
@click.option(
    "--false-alarms",
    metavar="SHARE",
    type=Given(_rate),
    default="5%",
    show_default=True,
    help="How often it may say drift where there is none.",
)
@click.option(
    "--without",
    type=click.Choice(_MEASURES),
    multiple=True,
    help="Leave a measure out; repeatable.",
)
@click.option("--output", metavar="FOLDER", type=FOLDER, help="Where it is written.")
@click.option("--exit-code", is_flag=True, help="Exit 1 if there is drift.")
@click.option("--region", metavar="REGION", type=TEXT, help="Of an endpoint.")
@click.option("--assume-role", metavar="ARN", type=TEXT, help="Look at an endpoint as this role.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def drift(
    source: str,
    search: Path | None,
    since: timedelta | None,
    false_alarms: float,
    without: tuple[str, ...],
    output: Path | None,
    exit_code: bool,
    region: str | None,
    assume_role: str | None,
    as_json: bool,
) -> None:
    """Say whether an endpoint's images, or a folder's, are still like those of the search.

    NAME is an endpoint that was made with `deploy --data-capture`, or the s3://BUCKET/FOLDER/NAME
    of one that is gone. SEARCH is the search folder whose model it runs, by default the newest.
    No labels are needed, and nothing is said of accuracy.

    \b
    Examples:
      visiontuner drift dogs --since 7d
      visiontuner drift photos-of-june/ --without classes
      visiontuner drift photos-of-june/ searches/dogs-20261122-154100 --exit-code
    """
    from visiontuner.workflow.drift import find_drift

    console = SearchConsole()
    try:
        result = find_drift(
            source,
            search,
            output=output,
            since=since,
            region=region,
            assume_role=assume_role,
            false_alarms=false_alarms,
            without=without,
            observer=console,
        )
    finally:
        console.close()
    if as_json:
        echo_json(result.to_dict(), indent=1)
    else:
        _print_drift(result)
    if result.tracking_problem:
        click.echo(f"Not in MLflow: {result.tracking_problem}", err=True)
    if exit_code and result.drifted:
        raise click.exceptions.Exit(1)


def _print_drift(result: DriftResult) -> None:
    moved = [measure for measure in result.measures if measure.moved]
    names = ", ".join(measure.name for measure in moved)
    click.echo(
        f"\nDrift: {names or 'none'}. Where nothing has changed, at most "
        f"{100 * result.false_alarms:.3g} % of checks name any."
    )
    head = ("measure", "reference", f"{result.images:,} images", "p")
    click.echo(f"  {head[0]:<11} {head[1]:>10} {head[2]:>14} {head[3]:>8}")
    for measure in result.measures:
        before, after = (_value(measure.name, v) for v in (measure.reference, measure.images))
        p_value = "< 0.0001" if measure.p_value < 0.0001 else f"{measure.p_value:.4f}"
        word = "  moved" if measure.moved else ""
        click.echo(f"  {measure.name:<11} {before:>10} {after:>14} {p_value:>8}{word}")
    if result.classes and any(measure.name == "classes" for measure in moved):
        shares = ", ".join(f"{c.name} {c.reference:.1%} → {c.images:.1%}" for c in result.classes)
        click.echo(f"  answers: {shares}")
    if result.share_new is not None:
        click.echo(f"  unlike the training images: {_percent(result.share_new)}; 5 % are expected")
    _print_left_out(result)
    for note in result.notes:
        click.echo(f"  note: {note}")
    click.echo(
        f"\n{result.folder / DRIFT_FIGURE}: how they are distributed; {DRIFT_FILE} beside it"
    )
    if result.new:
        click.echo(
            f"{result.folder / DRIFT_NEW_FOLDER}/: the {len(result.new):,} newest. To label some: "
            f"{next_command('suggest', str(result.folder / DRIFT_NEW_FOLDER), str(result.search))}"
        )


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if name in ("novelty", "confidence") else f"{value:.1f}"


def _print_left_out(result: DriftResult) -> None:
    if result.known:
        click.echo(f"  left out: {result.known:,} that are training or validation images")
    if result.found > result.images + len(result.unreadable):
        click.echo(f"  drawn at random from {result.found:,} different images")
    if result.unreadable:
        names = ", ".join(list(result.unreadable)[:_UNREADABLE_NAMED])
        more = ", …" if len(result.unreadable) > _UNREADABLE_NAMED else ""
        click.echo(f"  left out: {len(result.unreadable):,} that cannot be read ({names}{more})")


# `visiontuner promote`: parsing and printing.


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option("--force", is_flag=True, help="Whatever the test says, or if there can be none.")
@click.option("--dry-run", is_flag=True, help="Show the test and the decision; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def promote(model: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Make a version the champion, if it is better on the same test images beyond noise.

    MODEL is NAME, NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION. Default: the newest version
    of the newest search's model. The reason is written on the version either way.

    \b
    Examples:
      visiontuner promote
      visiontuner promote dog-breeds --dry-run
      visiontuner promote models:/dog-breeds/3 --force
    """
    from visiontuner.workflow.promote import promote as decide

    decided = decide(model, force=force, dry_run=dry_run)
    if as_json:
        echo_json({**decided.to_dict(), "dry_run": dry_run}, indent=1)
    else:
        _print_decision(decided, dry_run=dry_run)


def _print_decision(decided: Promotion, *, dry_run: bool) -> None:
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
            f"  only version {number} is right on {test.only_a:,} images, only version "
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


# `visiontuner lineage`: parsing and printing.


_NAMES_SHOWN = 5
_PIPE_WIDTH = 2000
_STATES = {"ok": "ok", "differs": "differs", "unknown": "cannot be checked"}


@click.command(cls=OneLineErrors)
@click.argument("subject", metavar="[MODEL|RUN|FOLDER|endpoint:NAME]", required=False, type=TEXT)
@click.option(
    "--verify", is_flag=True, help="Compute digests and answers again; exit 1 if any differs."
)
@click.option("--region", metavar="REGION", type=TEXT, help="Of an endpoint.")
@click.option("--assume-role", metavar="ARN", type=TEXT, help="Look at an endpoint as this role.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def lineage(subject: str, verify: bool, region: str, assume_role: str, as_json: bool) -> None:
    """Say where a model comes from: trial, search, experiment, images, code, machine.

    MODEL is NAME, NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION; RUN the id of a trial's or a
    search's MLflow run; FOLDER a search folder; endpoint:NAME a SageMaker endpoint. Default: the
    newest search.

    \b
    Examples:
      visiontuner lineage
      visiontuner lineage dog-breeds@champion
      visiontuner lineage models:/dog-breeds/3 --verify
      visiontuner lineage endpoint:dog-breeds
    """
    from visiontuner.workflow.lineage import trace

    traced = trace(
        subject,
        region=region,
        assume_role=assume_role,
    )
    checks = _verify(traced) if verify else []
    if as_json:
        raw = traced.to_dict()
        if verify:
            raw["checks"] = [asdict(check) for check in checks]
        echo_json(raw, indent=1)
    else:
        _print_lineage(traced, checks)
    if any(check.state == "differs" for check in checks):
        raise click.exceptions.Exit(1)


def _verify(traced: Lineage) -> list[LineageCheck]:
    from visiontuner.workflow.lineage import verify

    return verify(traced)


def _print_lineage(traced: Lineage, checks: Sequence[LineageCheck]) -> None:
    # In a pipe a fact stays in its line.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    SafeConsole(width=width).print(_tree(traced))
    for note in traced.notes:
        click.echo(f"note: {note}")
    for check in checks:
        click.echo(f"{check.what}: {_STATES[check.state]} ({check.detail})")


def _tree(traced: Lineage) -> Tree:
    """Each step hangs on the one that it made; what nobody knows is left out."""

    # Text: names of classes, models and folders may hold rich's own [markup].
    root = node = Tree(Text("lineage"), hide_root=True)
    for title, section, lines in (
        ("model", traced.model, _model_lines),
        ("trial", traced.trial, _trial_lines),
        ("search", traced.search, _search_lines),
    ):
        if section is None:
            continue
        node = node.add(Text(f"{title} {_headline(title, section)}"))
        for line in lines(section, traced):
            node.add(Text(line))
    return root


def _headline(title: str, facts: Facts) -> str:
    if title == "model":
        aliases = ", ".join(facts.get("aliases") or ())
        return f"{facts.get('uri')}" + (f" ({aliases})" if aliases else "")
    known = facts.get("trial_id" if title == "trial" else "name")
    run_id = f"run {facts['run_id']}" if facts.get("run_id") else "not in MLflow"
    return f"{known} ({facts.get('state')}, {run_id})"


def _model_lines(model: Facts, traced: Lineage) -> Iterator[str]:
    digest = _short(model.get("classifier_digest"))
    yield f"registered {model.get('registered')}, classifier {digest}"
    if model.get("quantized_from"):
        yield f"int8 of {model['quantized_from']}"
    if model.get("temperature") is not None:
        threshold = model.get("threshold")
        said = "not set" if threshold is None else f"{threshold:.4g}"
        if model.get("abstains"):
            said = "out of reach: every answer abstains"
        yield f"temperature {model['temperature']:.4g}, threshold {said}"
    yield from _evaluation_lines(traced.evaluation, model.get("quantized_from"))
    if model.get("promotion"):
        yield f"{model['promotion']}: {model.get('promotion_reason')}"


def _evaluation_lines(evaluation: Facts | None, source: str | None = None) -> Iterator[str]:
    if evaluation is None:
        yield "not evaluated on test images yet"
        return
    looks = f"test set evaluated {evaluation.get('looks')} time(s)"
    if evaluation.get("accuracy") is None:
        yield f"without test accuracy, {looks}"
        return
    interval = f"95 %: {evaluation['low']:.4f} to {evaluation['high']:.4f}"
    of_another = f"; in float32, as {source}" if source else "; before its calibration"
    same = of_another if evaluation.get("same_classifier") is False else ""
    yield (
        f"test accuracy {evaluation['accuracy']:.4f} ({interval}) on {evaluation['images']:,} "
        f"images, {looks}{same}"
    )


def _trial_lines(trial: Facts, traced: Lineage) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in trial["configuration"].items())
    for key, value in trial["best"].items():
        yield f"{key} {value} in epoch {trial.get('best_epoch')}"
    if traced.model is None:
        yield from _evaluation_lines(traced.evaluation)


def _search_lines(search: Facts, traced: Lineage) -> Iterator[str]:
    yield f"started {search.get('started')}, objective {search.get('objective')}"
    if search.get("from"):
        yield f"began with {search['from']}"
    yield f"experiment: {search.get('experiment_file') or 'file not found'}"
    network, data = traced.network or {}, traced.data or {}
    yield (
        f"network: {network.get('backbone')}, weights {_short(network.get('weights_digest'))}, "
        f"{network.get('engine')}{_licensed(network)}"
    )
    yield f"data: {data.get('source')}, digest {_short(data.get('digest'))}"
    yield f"images: {_counts(data)}"
    yield from _origin_lines(traced)


def _licensed(network: Facts) -> str:
    licence = network.get("weights_licence")
    return f", licence of the weights: {licence}" if licence else ""


def _origin_lines(traced: Lineage) -> Iterator[str]:
    code, environment = traced.code or {}, traced.environment or {}
    changes = {True: " with changes", False: ""}.get(code.get("dirty"), "")  # type: ignore[arg-type]
    commit = f", commit {_short(code.get('commit'))}{changes}" if code.get("commit") else ""
    yield f"code: visiontuner {code.get('version')}{commit}"
    yield f"machine: {environment.get('host')}, {environment.get('platform')}"
    packages = environment.get("packages") or {}
    yield "packages: " + (", ".join(f"{k} {v}" for k, v in packages.items()) or "not recorded")


def _counts(data: Facts) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in (data.get("counts") or {}).items())
    names = data.get("class_names") or ()
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return (counts or "not recorded") + (f"; {len(names)} classes: {shown}" if names else "")


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "unknown"
