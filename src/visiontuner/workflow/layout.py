"""How a search ended, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.journal import SearchRecord, TrialRecord

if TYPE_CHECKING:
    from visiontuner.search.run import SearchState


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """How a search ended.

    Attributes:
        folder: the search folder, complete whatever MLflow did.
        state: `interrupted` and `time_budget` can be resumed.
        classifier: the best trial as an artifact, if any trial was usable.
        tracking_uri: the MLflow store that the search was written to.
        model: `models:/NAME/VERSION` there, if it could be registered.
        tracking_problem: why MLflow does not hold everything; `sync` writes the rest.
    """

    folder: Path
    record: SearchRecord
    state: SearchState
    tracking_uri: str
    classifier: Path | None = None
    model: str | None = None
    tracking_problem: str | None = None

    @property
    def best(self) -> TrialRecord | None:
        return self.record.best


def claim_folder(folder: Path) -> Path:
    """Make a folder that nobody else has: the given one, or with -2, -3 … behind its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own, number = folder, 1
    while True:
        try:
            own.mkdir()
        except FileExistsError:
            number += 1
            own = folder.with_name(f"{folder.name}-{number}")
        else:
            return own
