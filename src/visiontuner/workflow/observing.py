"""Who watches the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from visiontuner.journal import Event, Finding, SearchRecord

NAMED = 5  # of a thousand unreadable pictures


class Observer(Protocol):
    """Who watches a search: `console.SearchConsole` at the command line."""

    def note(self, text: str) -> None: ...
    def progress(self, label: str, done: int, total: int, unit: str) -> None: ...
    def trials_begin(self, record: SearchRecord, total: int) -> None: ...
    def event(self, event: Event) -> None: ...
    def trials_end(self) -> None: ...


class Silent:
    """An Observer that shows nothing."""

    def note(self, text: str) -> None: ...
    def progress(self, label: str, done: int, total: int, unit: str) -> None: ...
    def trials_begin(self, record: SearchRecord, total: int) -> None: ...
    def event(self, event: Event) -> None: ...
    def trials_end(self) -> None: ...


def note_findings(observer: Observer, findings: Sequence[Finding]) -> None:
    """The first few findings, a line each, and how many more there are."""
    for finding in findings[:NAMED]:
        observer.note(f"{finding.severity}: {finding.evidence.rstrip('.')}.")
    if len(findings) > NAMED:
        observer.note(f"… and {len(findings) - NAMED} more; the journal names them all.")
