"""The command that asks a model what is on pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.errors import UserMistake
from visiontuner.text import csv_row, printable

if TYPE_CHECKING:
    from rich.text import Text

    from visiontuner.serving.batching import PictureAnswer

_FIELDS = ("picture", "label", "probability", "confident", "top_k", "error", "reduced")
_SHOWN_CHOICES = 3
_ENDPOINT_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_FEW = 32  # pictures that are answered before anyone wants to see progress


@click.command(cls=OneLineErrors)
@click.argument("names", metavar="[NAME|URL] PICTURE…", nargs=-1, required=True)
@click.option("--local", is_flag=True, help="Ask a server or a model on this machine.")
@click.option("--url", metavar="URL", default="auto", help="With --local. Default: port 5000 here.")
@click.option(
    "--model",
    metavar="MODEL",
    default="none",
    help="Ask a folder or registered model itself, without a server; runs no code in it.",
)
@click.option("--region", metavar="REGION", default="auto", help="Of the SageMaker endpoint.")
@click.option("--assume-role", metavar="ARN", default="none", help="Ask the endpoint as this role.")
@click.option("--top-k", type=int, default=5, show_default=True, help="How many classes to list.")
@click.option("--threshold", metavar="P", default="auto", help="Abstain below this probability.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="For a person, or for a program; json is one object a line.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=4, help="Requests at a time.")
@click.option(
    "--request-mb",
    type=click.FloatRange(0.01, 25),
    default=6.0,
    show_default=True,
    help="Largest request; an endpoint that takes less is sent less.",
)
def query(
    names: tuple[str, ...],
    local: bool,
    url: str,
    model: str,
    region: str,
    assume_role: str,
    top_k: int,
    threshold: str,
    form: str,
    workers: int,
    request_mb: float,
) -> None:
    """Ask what is on pictures: files, folders, URLs, or - for standard input.

    NAME is a SageMaker endpoint; with --local, --url or --model there is none to name.
    Exits with 1 if a picture could not be read; the others are answered.

    \b
    Examples:
      visiontuner query dog-breeds photo.jpg folder/ https://example.org/dog.png
      visiontuner query --local photo.jpg                      a server on port 5000
      visiontuner query --model models:/dogs@champion folder/ --format csv > answers.csv
      cat photo.jpg | visiontuner query --model searches/dogs-20261122-1541 -
    """
    where, sources = _where(names, local, url, model)

    from visiontuner.console import SearchConsole
    from visiontuner.workflow.query import query as ask

    console = SearchConsole(_stderr_console())

    def progress(label: str, done: int, total: int, unit: str) -> None:
        if total > _FEW:
            console.progress(label, done, total, unit)

    answers = ask(
        sources,
        **where,
        region=None if region in NOT_GIVEN else region,
        assume_role=None if assume_role in NOT_GIVEN else assume_role,
        top_k=top_k,
        threshold=_probability(threshold),
        workers=workers,
        request_bytes=round(request_mb * 1e6),
        progress=progress,
    )
    write = {"table": _print_table, "json": _print_json, "csv": _print_csv}[form]
    try:
        failed = write(answers)
    finally:
        console.close()
    if failed:
        raise click.exceptions.Exit(1)


def _where(
    names: Sequence[str], local: bool, url: str, model: str
) -> tuple[dict[str, str], Sequence[str]]:
    """Whom to ask, as an argument of `workflow.query`, and the pictures."""
    if model not in NOT_GIVEN:
        return {"model": model}, names
    if url not in NOT_GIVEN:
        return {"url": url}, names
    if local:
        from visiontuner.workflow.query import LOCAL_SERVER

        return {"url": LOCAL_SERVER}, names
    first, *pictures = names
    if pictures and first.startswith(("http://", "https://")):
        return {"url": first}, pictures
    # A folder of this name is no picture: endpoints are named after the folder of their pictures.
    if not pictures or not _ENDPOINT_NAME.fullmatch(first) or Path(first).is_file():
        raise UserMistake(
            "Name an endpoint or a URL, then pictures; or --local or --model, then pictures. "
            "`visiontuner query --help` has examples."
        )
    return {"endpoint": first}, pictures


def _probability(text: str) -> float | None:
    try:
        return None if text in NOT_GIVEN else float(text)
    except ValueError:
        raise UserMistake(f"--threshold must be a number in [0, 1], got {text!r}.") from None


def _stderr_console() -> Any:
    from visiontuner.console import SafeConsole

    return SafeConsole(stderr=True, soft_wrap=True)


def _print_table(answers: Iterable[PictureAnswer]) -> int:
    """Returns how many pictures failed; what was answered before an error is shown first."""
    shown: list[PictureAnswer] = []
    try:
        shown.extend(answers)
    finally:
        _show_table(shown)
    return sum(one.answer.error is not None for one in shown)


def _show_table(shown: Sequence[PictureAnswer]) -> None:
    from rich.table import Table

    from visiontuner.console import SafeConsole

    if not shown:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("picture", "label"):
        table.add_column(heading, overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("or", style="dim")
    folder = _common_folder([one.picture for one in shown])
    for one in shown:
        table.add_row(*_table_row(one, folder))
    console = SafeConsole()
    if folder:
        console.print(f"In {printable(folder)}")
    console.print(table)
    if unsure := sum(one.answer.confident is False for one in shown):
        console.print(f"{unsure} not sure.")
    if reduced := sum(one.reduced for one in shown):
        console.print(f"{reduced} sent smaller than they are, to fit into a request.")
    if failed := sum(one.answer.error is not None for one in shown):
        console.print(f"{failed} not answered.", style="red")


def _table_row(one: PictureAnswer, folder: str) -> tuple[Text | str, ...]:
    from rich.text import Text

    answer, picture = one.answer, Text(printable(one.picture.removeprefix(folder)))
    if answer.error is not None:
        return picture, Text(answer.error, style="red"), "", ""
    others = ", ".join(
        f"{choice['label']} {choice['probability']:.1%}"
        for choice in answer.top_k[1:_SHOWN_CHOICES]
    )
    label = f"{answer.label}" + ("" if answer.confident else " (not sure)")
    style = "bold" if answer.confident else "yellow"
    return picture, Text(label, style=style), f"{answer.probability:.1%}", Text(others)


def _common_folder(pictures: Sequence[str]) -> str:
    """The folder that all pictures are in, with a slash; empty if they are not."""
    folders = {picture.rpartition("/")[0] for picture in pictures}
    if len(pictures) < 2 or not all(folder.startswith("/") for folder in folders):
        return ""
    return os.path.commonpath(folders).rstrip("/") + "/"


def _print_json(answers: Iterable[PictureAnswer]) -> int:
    failed = 0
    for one in answers:
        failed += one.answer.error is not None
        click.echo(json.dumps(one.to_dict(), ensure_ascii=False))
    return failed


def _print_csv(answers: Iterable[PictureAnswer]) -> int:
    failed = 0
    click.echo(csv_row(_FIELDS), nl=False)
    for one in answers:
        failed += one.answer.error is not None
        row = one.to_dict()
        row["top_k"] = "; ".join(f"{c['label']} {c['probability']:.4f}" for c in row["top_k"])
        click.echo(csv_row(row[name] for name in _FIELDS), nl=False)
    return failed
