"""`visiontuner …` that holds at a moment that a test chooses, until the test lets it go.

    python held_command.py MOMENT FOLDER tune …

MOMENT is a Python expression that is evaluated at each event of the journal, and at each progress
of something long: `events` are those of this process so far, `event` the last one or None, and
`cache` is the folder of VISIONTUNER_CACHE. When it is true for the first time, FOLDER/held is made,
and the process waits until somebody writes to the named pipe FOLDER/go.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from visiontuner.cli import console
from visiontuner.cli.console import SearchConsole
from visiontuner.cli.main import main
from visiontuner.journal import Event

MOMENT = compile(sys.argv[1] if __name__ == "__main__" else "False", "moment", "eval")
FOLDER = Path(sys.argv[2]) if __name__ == "__main__" else Path()


class HeldConsole(SearchConsole):
    """Holds in the thread that it is told something in."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events: list[Event] = []
        self.once = threading.Lock()

    def event(self, event: Event) -> None:
        super().event(event)
        self.events.append(event)
        self._hold(event)

    def progress(self, label: str, done: int, total: int, unit: str) -> None:
        super().progress(label, done, total, unit)
        self._hold(None)

    def _hold(self, event: Event | None) -> None:
        cache = Path(os.environ["VISIONTUNER_CACHE"])
        names = {"events": self.events, "event": event, "cache": cache}
        if eval(MOMENT, names) and self.once.acquire(blocking=False):
            (FOLDER / "held").touch()
            (FOLDER / "go").read_bytes()


if __name__ == "__main__":
    # Before the command's own module is imported, which happens when it is called.
    console.SearchConsole = HeldConsole  # type: ignore[misc]
    main(sys.argv[3:], prog_name="visiontuner")
