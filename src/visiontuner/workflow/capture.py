"""Bring home what an endpoint was asked: images as files, answers as a table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from visiontuner.aws.captured_requests import Captured, capture_folder, captured
from visiontuner.errors import UserMistake
from visiontuner.io.aws import Aws
from visiontuner.io.files import cannot_write, write_atomically
from visiontuner.text import csv_row

IMAGES, ANSWERS, TABLE = "images", "answers.jsonl", "answers.csv"
_FIELDS = ("image", "time", "label", "probability", "confident", "top_k", "error", "event", "row")
_EVENT = re.compile(r"[0-9A-Za-z-]{1,64}")
# By what a file begins with; others keep their content and no ending.
_ENDINGS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


@dataclass(frozen=True, kw_only=True)
class CaptureResult:
    """What was brought home: `images` are files in `folder`, `unreadable` requests without any."""

    folder: Path
    source: str
    images: int
    unreadable: int


def capture(
    name: str,
    *,
    output: Path,
    since: timedelta | None = None,
    region: str | None = None,
    assume_role: str | None = None,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> CaptureResult:
    """Download what SageMaker captured of an endpoint.

    `images/EVENT.jpg` (or `EVENT-ROW.jpg` where a request has several), answers.jsonl and
    answers.csv; what is there from an earlier call stays.

    Args:
        name: of the endpoint, or `s3://…/ENDPOINT`, where it captured.
        output: a folder, which is made.
        since: no older requests, to the hour.

    Raises:
        UserMistake: there is no such endpoint, it captures nothing, or nothing was captured yet.
        ServingError: AWS refuses or cannot be reached.
    """
    aws = Aws(region, assume_role)
    source = capture_folder(aws, name)
    rows = {(row["event"], row["row"]): row for row in _rows_before(output / ANSWERS)}
    images = unreadable = 0
    for done, total, found in captured(aws, source, since=since):
        several = {one.event for one in found if one.row > 0}
        for one in found:
            path = _save(output, one, several=one.event in several) if one.content else None
            images += path is not None
            unreadable += path is None
            rows[one.event, one.row] = _row(one, path)
        progress("Reading", done, total, "objects")
    if not rows:
        raise UserMistake(
            f"There is nothing in {source}. SageMaker writes what it captures some minutes after "
            "it was asked, and nothing where the endpoint's role may not write (docs/aws.md)."
        )
    _write(output, sorted(rows.values(), key=lambda row: (row["time"], row["event"], row["row"])))
    return CaptureResult(folder=output, source=source, images=images, unreadable=unreadable)


def _save(output: Path, one: Captured, *, several: bool) -> str:
    """Write an image unless it is there; returns its name below `output`."""
    known = _EVENT.fullmatch(one.event)
    event = one.event if known else hashlib.sha256(one.event.encode()).hexdigest()[:32]
    number = f"-{one.row:02d}" if several else ""
    name = f"{IMAGES}/{event}{number}{_ending(one.content)}"
    path = output / name
    if not path.exists():
        _write_file(path, one.content)
    return name


def _ending(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((end for start, end in _ENDINGS.items() if content.startswith(start)), "")


def _row(one: Captured, path: str | None) -> dict[str, Any]:
    told = {"image": path, "time": one.time, **one.answer.to_dict()}
    return {**told, "event": one.event, "row": one.row}


def _rows_before(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
            _ = row["event"], row["row"], row["time"]
        except (ValueError, LookupError, TypeError):
            raise UserMistake(f"{path} holds no captured answers; name another --output.") from None
        yield row


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = csv_row(_FIELDS) + "".join(
        csv_row({**row, "top_k": _choices(row)}.get(name) for name in _FIELDS) for row in rows
    )
    _write_file(output / ANSWERS, lines.encode())
    _write_file(output / TABLE, table.encode())


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    write_atomically(path, lambda file: file.write(content))


def _choices(row: dict[str, Any]) -> str:
    return "; ".join(f"{c['label']} {c['probability']:.4f}" for c in row.get("top_k") or ())
