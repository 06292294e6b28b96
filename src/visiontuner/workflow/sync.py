"""Write a search into MLflow, late or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.journal import SearchRecord, is_running
from visiontuner.layout import CLASSIFIER_FOLDER, EVALUATION_FOLDER, EVALUATION_REPORT
from visiontuner.locations import tracking_uri
from visiontuner.tracking.plan import ProjectRun
from visiontuner.workflow.layout import SearchResult
from visiontuner.workflow.registration import register_classifier

if TYPE_CHECKING:
    from visiontuner.search.run import SearchState


def sync_search(
    folder: Path,
    *,
    project_run: ProjectRun | None = None,
    notice: Callable[[str], None] | None = None,
) -> SearchResult:
    """Write a search's journal into MLflow, model and registration included.

    Repeating it changes nothing. Nothing is computed: a search that ended without its classifier
    gets it from `resume_search`.

    Args:
        project_run: the run that `mlflow run` opened, to adopt as the search's own if MLflow
            holds none of it yet.
        notice: called with the reason why that run is left alone.

    Raises:
        JournalError: the folder holds no search, or it is still running elsewhere.
        TrackingError: MLflow is away or refuses.
    """
    from visiontuner.tracking.mlflow_writer import MlflowWriter

    record, uri = SearchRecord.load(folder), tracking_uri()
    with MlflowWriter(folder, tracking_uri=uri, project_run=project_run, notice=notice) as writer:
        writer.catch_up(search_is_over=not is_running(folder))
        run_ids, parent_run_id = writer.run_ids, writer.parent_run_id
    classifier = folder / CLASSIFIER_FOLDER
    state: SearchState = record.ended["state"] if record.ended else "interrupted"
    model = None
    if classifier.is_dir() and record.best is not None:
        evaluation = _log_evaluation(folder, run_ids, parent_run_id, uri)
        model = register_classifier(folder, record, run_ids, uri, tags=evaluation)
    return SearchResult(
        folder=folder,
        record=record,
        state=state,
        tracking_uri=uri,
        classifier=classifier if classifier.is_dir() else None,
        model=model,
    )


def _log_evaluation(
    folder: Path, run_ids: Mapping[str, str], parent_run_id: str | None, uri: str
) -> dict[str, str]:
    """The evaluation of this classifier, if there is one, on its trial's run.

    Returns:
        What the registered version should say of it.
    """
    if not (folder / EVALUATION_FOLDER / EVALUATION_REPORT).is_file():
        return {}
    from visiontuner.serving.registry import classifier_digest
    from visiontuner.tracking.client import Store
    from visiontuner.tracking.evaluation import (
        TEST_LOOKS,
        log_evaluation,
        read_evaluation,
        version_tags,
    )
    from visiontuner.tracking.html import write_page

    evaluation = read_evaluation(folder / EVALUATION_FOLDER)
    store = Store(uri)
    log_evaluation(store, evaluation, run_id=run_ids[evaluation.trial_id])
    if parent_run_id is not None:
        store.call("log_artifact", parent_run_id, str(write_page(folder)))
        store.call("set_tag", parent_run_id, TEST_LOOKS, str(evaluation.looks))
    if evaluation.classifier_digest != classifier_digest(folder / CLASSIFIER_FOLDER):
        return {}  # packaged again since: another artifact
    return version_tags(evaluation)
