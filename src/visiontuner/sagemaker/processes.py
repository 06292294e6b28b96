"""A program that a host runs: its last lines kept, and all of it gone at the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

_LINES_KEPT = 50
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Child:
    """A process in a group of its own; leaving the context kills the group.

    Args:
        echo: pass its lines on to our own output as they come.

    `tail` holds its last lines.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, echo: bool = False
    ) -> None:
        self.tail: deque[str] = deque(maxlen=_LINES_KEPT)
        self._echo = echo
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)  # a grandchild may keep the pipe open

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def code(self) -> int:
        """Its exit code as a shell gives it: 128 and the number of a signal that ended it."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """SIGTERM to the process itself; its children are its own affair."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if self._echo:
                    print(line, end="", flush=True)
                self.tail.append(_COLOURS.sub("", line).strip())


def last_line(lines: Sequence[str] | deque[str]) -> str:
    """The line that says most: the last that is an error, else the last that is not empty."""
    told = [line for line in list(lines) if line]
    errors = [line for line in told if line.startswith("Error: ")]
    return (errors or told or ["it said nothing"])[-1].removeprefix("Error: ")
