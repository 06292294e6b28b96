"""Write a search into MLflow, late or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.journal import SearchRecord, is_running
from visiontuner.locations import tracking_uri
from visiontuner.workflow.layout import CLASSIFIER_FOLDER, SearchResult
from visiontuner.workflow.recording import register_classifier

if TYPE_CHECKING:
    from visiontuner.search.run import SearchState


def sync_search(folder: Path) -> SearchResult:
    """Write a search's journal into MLflow, model and registration included.

    Repeating it changes nothing. Nothing is computed: a search that ended without its classifier
    gets it from `resume_search`.

    Raises:
        JournalError: the folder holds no search, or it is still running elsewhere.
        TrackingError: MLflow is away or refuses.
    """
    from visiontuner.tracking.mlflow_writer import MlflowWriter

    record, uri = SearchRecord.load(folder), tracking_uri()
    with MlflowWriter(folder, tracking_uri=uri) as writer:
        writer.catch_up(search_is_over=not is_running(folder))
        run_ids = writer.run_ids
    classifier = folder / CLASSIFIER_FOLDER
    state: SearchState = record.ended["state"] if record.ended else "interrupted"
    model = None
    if classifier.is_dir() and record.best is not None:
        model = register_classifier(folder, record, run_ids, uri)
    return SearchResult(
        folder=folder,
        record=record,
        state=state,
        tracking_uri=uri,
        classifier=classifier if classifier.is_dir() else None,
        model=model,
    )
