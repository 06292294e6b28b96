"""A table of runs in the terminal: fitted to its width, the best row marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

_MOST_ROWS = 40  # of a terminal: what is best must not scroll away
_GAP = 2
# Without these a row says nothing; the others go from the right until the rest fits.
_KEPT = ("run", "state")
_FIRST_TO_GO = ("reason", "epochs", "best_epoch")
_LAST_TO_GO = "search"  # trials of two searches have the same names
_MARK = "← best"


def print_runs(console: Console, frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Print the frame's rows in order.

    Returns:
        Sentences about what is not shown; only a terminal leaves anything out.
    """
    from rich.table import Table
    from rich.text import Text

    from visiontuner.evaluation.compare import best_row
    from visiontuner.evaluation.formats import cell

    shown = frame.head(_MOST_ROWS) if console.is_terminal else frame
    cells = {name: [cell(value, name) for value in shown[name]] for name in columns}
    names = {name: cell(name, "") for name in columns}
    if console.is_terminal:
        widths = {n: max(map(len, [names[n], *cells[n]])) + _GAP for n in columns}
        score = frame.attrs.get("score")
        columns = _fitting(columns, widths, console.width - len(_MARK), (*_KEPT, score))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for name in columns:
        right = not _is_words(frame[name])
        table.add_column(
            Text(names[name]),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    table.add_column("", no_wrap=True)
    best = best_row(frame)
    for position, label in enumerate(shown.index):
        style = "bold green" if label == best else ""
        row = [Text(cells[name][position], style=style) for name in columns]
        table.add_row(*row, Text(_MARK if label == best else "", style=style))
    console.print(table)
    return _left_out(frame, shown, [n for n in cells if n not in columns])


def _fitting(
    columns: Sequence[str], widths: dict[str, int], room: int, kept: Sequence[str | None]
) -> list[str]:
    """The columns that fit into `room` characters, in their order."""
    chosen = list(columns)
    can_go = [n for n in _FIRST_TO_GO if n in chosen]
    can_go += [n for n in reversed(chosen) if n not in (*kept, *can_go, _LAST_TO_GO)]
    can_go += [_LAST_TO_GO] if _LAST_TO_GO in chosen else []
    for name in can_go:
        if sum(widths[n] for n in chosen) <= room:
            break
        chosen.remove(name)
    return chosen


def _left_out(frame: pd.DataFrame, shown: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    told = []
    if len(frame) > len(shown):
        told.append(f"{len(frame) - len(shown):,} more runs: --top, --where, or --format csv.")
    if columns:
        told.append(f"Too narrow for: {', '.join(columns)}. See them with --columns.")
    return told


def _is_words(column: pd.Series) -> bool:
    return column.dtype == object
