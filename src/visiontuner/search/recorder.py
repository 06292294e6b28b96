"""The journal of a search while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from visiontuner.journal import Event, JournalWriter, SearchRecord

Listener = Callable[[Event], None]


class Recorder:
    """The journal of a running search, what it adds up to, and who else listens."""

    def __init__(
        self, journal: JournalWriter, record: SearchRecord, listeners: Sequence[Listener] = ()
    ) -> None:
        self.record = record
        self._journal = journal
        self._listeners = listeners

    def append(self, event: str, **fields: Any) -> None:
        line = self._journal.append(event, **fields)
        self.record.apply(line)
        for listen in self._listeners:
            listen(line)

    def close(self) -> None:
        """Give the journal free for whoever comes next, in this process too."""
        self._journal.close()
