"""Findings about many files or names: a line that counts them, and all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visiontuner.journal import Finding, Severity


@dataclass(frozen=True, kw_only=True)
class ListedFinding(Finding):
    """A finding whose evidence names the first of `items`; the journal keeps the evidence alone."""

    items: tuple[str, ...]


def listed(
    rule: str, severity: Severity, items: Sequence[str], what: str, advice: str
) -> ListedFinding | None:
    """A finding about some paths or names, with their number and the first as an example."""
    if not items:
        return None
    evidence = f"{len(items)} ({items[0]}{', …' if len(items) > 1 else ''}): {what}"
    return ListedFinding(
        rule=rule, severity=severity, evidence=evidence, advice=advice, items=tuple(items)
    )
