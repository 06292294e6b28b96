"""A copy that came whole once, and does while what it is a copy of cannot be reached."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from visiontuner.data.files import file_state, write_json
from visiontuner.data.s3 import is_out_of_reach


class WholeCopy(AbstractContextManager["WholeCopy", bool | None]):
    """Around a download: where S3 is away, what came whole before is enough, and that is said.

    Only if not a file of it has changed since: a copy that was being brought up to date is no whole
    one. What S3 refuses stays refused.

    Args:
        path: the file or folder that the download brings.
        note: told that the copy is used.
    """

    def __init__(self, path: Path, note: Callable[[str], None] | None) -> None:
        self._path = path
        self._mark = path.with_name(f".{path.name}.whole.json")
        self._note = note

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            if self._path.exists():
                write_json(self._mark, {"digest": self._digest(), "time": time.time()})
            return False
        came = self._came_whole() if is_out_of_reach(error) else None
        if came is None:
            return False
        if self._note is not None:
            when = time.strftime("%d %b %Y, %H:%M", time.localtime(came))
            self._note(f"S3 is away: the copy in {self._path} is used, which was whole on {when}.")
        return True

    def _came_whole(self) -> float | None:
        """When, in seconds since the epoch; None: it is not, or something of it has changed."""
        try:
            mark = json.loads(self._mark.read_text(encoding="utf-8"))
            return float(mark["time"]) if mark["digest"] == self._digest() else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _digest(self) -> str:
        """Of every file's name, size, times and inode."""
        paths = sorted(self._path.rglob("*")) if self._path.is_dir() else [self._path]
        rows = []
        for path in paths:
            if path.is_file():
                name = path.relative_to(self._path).as_posix()
                rows.append([name, *file_state(path.stat())])
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
