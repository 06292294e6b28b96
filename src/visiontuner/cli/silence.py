"""A line that counts the seconds of a command that has written nothing for a while."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from visiontuner.text import duration

SILENT_SECONDS = 1.5  # and half a second until it is looked at: never more than two
ERASE_LINE = "\r\x1b[2K"


class SilenceLine:
    """Shows `… 5 s` in a terminal where nothing was written for two seconds, until something is.

    Imports, a database and other people's services take their time, whichever command waits for
    them. A question that waits for its answer is left alone, and bars and tables, which write
    several times a second, are never silent.

    Args:
        stream: the terminal; nothing is shown in anything else.
        is_in_line: whether what was written last did not end its line.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        is_in_line: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._is_in_line = is_in_line
        self._clock = clock
        self._last = clock()
        self._shown = ""
        self._lock = threading.RLock()  # a signal may come in the middle of a write
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            threading.Thread(target=self._run, name="silence", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def heard(self) -> None:
        """Make room: something is about to be written."""
        with self._lock:
            self._last = self._clock()
            if self._shown:
                self._write(ERASE_LINE)
                self._shown = ""

    def look(self) -> None:
        """Show how long nothing was written, if that is long."""
        with self._lock:
            silent = self._clock() - self._last
            text = f"… {duration(silent)}"
            if silent < SILENT_SECONDS or self._ended.is_set() or self._is_in_line():
                return
            if text != self._shown:
                self._write(f"{ERASE_LINE}{text}")
                self._shown = text

    def end(self) -> None:
        """Never again, as where a server waits for requests."""
        self._ended.set()
        self.heard()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self.look()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self._ended.set()


_current: list[SilenceLine] = []


def silence_line() -> SilenceLine:
    """That of this command, on its standard error as it is before `text.safe_output`."""
    line = SilenceLine(
        sys.stderr,
        is_in_line=lambda: any(
            getattr(stream, "in_line", False) for stream in (sys.stdout, sys.stderr)
        ),
    )
    _current[:] = [line]
    return line


def end_silence_line() -> None:
    """From now on silence is what is wanted."""
    for line in _current:
        line.end()
