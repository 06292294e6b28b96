"""Tables of runs as CSV, Markdown and JSON, and one cell as a person reads it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pandas as pd

from visiontuner.text import csv_row, shown

_MARKDOWN = re.compile(r"([\\`*\[\]|~!])")
_LONGEST_CELL = 60


def to_csv(frame: pd.DataFrame) -> str:
    """Every value in full, with a header; see `text.csv_row`."""
    columns = [
        [value if isinstance(value, float) else _plain(value) for value in frame[name]]
        for name in frame.columns
    ]
    return csv_row(frame.columns) + "".join(map(csv_row, zip(*columns, strict=True)))


def to_json(frame: pd.DataFrame) -> str:
    """A list of objects; what is missing or not finite is null, times are ISO 8601 in UTC."""
    columns = {name: [_plain(value) for value in frame[name]] for name in frame.columns}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(frame: pd.DataFrame) -> str:
    """A table as GitHub shows it, values as in the terminal; nothing in them acts as markup."""
    aligned = ["---" if _is_text(frame[name]) else "---:" for name in frame.columns]
    rows = [
        [_unmarked(cell(value, name)) for name, value in zip(frame.columns, row, strict=True)]
        for row in frame.itertuples(index=False, name=None)
    ]
    lines = [[_unmarked(cell(name, "")) for name in frame.columns], aligned, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object, column: str) -> str:
    """One value in a few characters: no control characters, no more digits than they are worth."""
    if value is None or value is pd.NaT or value is pd.NA:
        return "–"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return _decimal(value, column)
    text = shown(str(value), keep="").strip()
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"


def _decimal(value: float, column: str) -> str:
    if math.isnan(value):
        return "–"
    if column == "seconds":
        return f"{value:,.1f}"
    if column.startswith(("best_", "validation_", "test_", "train_")) and 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:.4g}"


def _is_text(column: pd.Series) -> bool:
    return not (
        pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)
    )


def _unmarked(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def _plain(value: Any) -> object:
    if value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str) else int(value)
