"""Tables for the terminal: what `prepare` and `doctor` found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from visiontuner.data.findings import DatasetSummary, SizeRange
from visiontuner.data.listing import ListedFinding
from visiontuner.doctor import Check
from visiontuner.journal import Finding
from visiontuner.text import printable

BAR_WIDTH = 40
_LISTED = 10  # of the files that a finding is about
_COLOURS = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}


def print_dataset(
    console: Console,
    summary: DatasetSummary,
    findings: Sequence[Finding],
    *,
    list_all: bool = False,
) -> None:
    """Classes with their counts as bars, the sizes of pictures, and what was found.

    Args:
        list_all: every file or name that a finding is about, not only the first ten.
    """
    console.print(_class_table(summary))
    if summary.width and summary.height:
        console.print(f"Width: {_range(summary.width)}; height: {_range(summary.height)}.")
    console.print(
        f"Imbalance in train: {summary.imbalance:.1f} pictures of the largest class for one of "
        "the smallest."
    )
    if not findings:
        console.print("Nothing to complain about.", style="green")
    for finding in findings:
        line = Text(f"{finding.severity}: ", style=_COLOURS[finding.severity])
        line.append(f"{printable(finding.evidence.rstrip('.'))}. ", style="default")
        line.append(finding.advice, style="dim")
        console.print(line)
        if isinstance(finding, ListedFinding) and len(finding.items) > 1:
            _print_items(console, finding.items, len(finding.items) if list_all else _LISTED)


def _print_items(console: Console, items: Sequence[str], number: int) -> None:
    for item in items[:number]:
        console.print(Text(f"  {printable(item)}"))
    if len(items) > number:
        console.print(Text(f"  … and {len(items) - number:,} more: --all lists them", style="dim"))


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """One line a check, with its advice below where something needs doing."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        status = Text(check.status, style=_COLOURS[check.status])
        detail = Text(check.detail)
        if check.advice:
            detail.append(f"\n{check.advice}", style="bold")
        table.add_row(status, Text(check.name), detail)
    console.print(table)


def _class_table(summary: DatasetSummary) -> Table:
    splits = list(summary.counts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    train = summary.counts[splits[0]]
    longest = max(train, default=0) or 1
    for label, name in enumerate(summary.class_names):
        counts = [f"{summary.counts[split][label]:,}" for split in splits]
        bar = "█" * -(-BAR_WIDTH * train[label] // longest)  # rounded up: one picture shows
        table.add_row(Text(printable(name)), *counts, Text(bar, style="cyan"))
    totals = [f"{summary.totals[split]:,}" for split in splits]
    table.add_row(Text("all", style="bold"), *(Text(t, style="bold") for t in totals), "")
    return table


def _range(size: SizeRange) -> str:
    return f"{size.smallest:g} to {size.largest:g} pixels, median {size.median:g}"
