"""Write a search into MLflow, late or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.errors import TrackingError
from visiontuner.journal import SearchRecord, is_running
from visiontuner.paths import CLASSIFIER_FOLDER, EVALUATION_FOLDER, EVALUATION_REPORT, tracking_uri
from visiontuner.serving.registry import classifier_digest, register_classifier
from visiontuner.tracking.page import write_page
from visiontuner.tracking.run_plans import ProjectRun
from visiontuner.tracking.store import Store
from visiontuner.tracking.writer import (
    TEST_LOOKS,
    MlflowWriter,
    log_evaluation,
    read_evaluation,
    version_description,
    version_tags,
)
from visiontuner.workflow.inputs import Observer, Silent
from visiontuner.workflow.run import SearchResult

if TYPE_CHECKING:
    from visiontuner.search.run import SearchState


def sync_search(
    folder: Path, *, project_run: ProjectRun | None = None, observer: Observer | None = None
) -> SearchResult:
    """Write a search's journal into MLflow, model and registration included.

    Repeating it changes nothing. Nothing is computed: a search that ended without its classifier
    gets it from `resume_search`.

    Args:
        project_run: the run that `mlflow run` opened, to adopt as the search's own if MLflow
            holds none of it yet.
        observer: told how far it is, and why that run is left alone.

    Raises:
        JournalError: the folder holds no search, or it is still running elsewhere.
        TrackingError: MLflow is away or refuses; or it has all numbers and does not take artifacts.
    """
    observer = observer or Silent()
    record, uri = SearchRecord.load(folder), tracking_uri()
    with MlflowWriter(
        folder, tracking_uri=uri, project_run=project_run, notice=observer.note
    ) as writer:
        written = writer.catch_up(
            search_is_over=not is_running(folder),
            progress=lambda done, total: observer.progress(
                "Writing to MLflow", done, total, "trials"
            ),
        )
        run_ids, parent_run_id = writer.run_ids, writer.parent_run_id
    classifier = folder / CLASSIFIER_FOLDER
    state: SearchState = record.ended["state"] if record.ended else "interrupted"
    model = None
    if classifier.is_dir() and record.best is not None:
        tags, tested = _log_evaluation(folder, run_ids, parent_run_id, uri)
        model = register_classifier(folder, record, run_ids, uri, tags=tags, tested=tested)
    if written.problem is not None:
        raise TrackingError(written.problem)
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
) -> tuple[dict[str, str], str | None]:
    """The evaluation of this classifier, if there is one, on its trial's run.

    Returns:
        Tags of the registered version, and its description.
    """
    if not (folder / EVALUATION_FOLDER / EVALUATION_REPORT).is_file():
        return {}, None

    evaluation = read_evaluation(folder / EVALUATION_FOLDER)
    store = Store(uri)
    if parent_run_id is not None:
        store.call("set_tag", parent_run_id, TEST_LOOKS, str(evaluation.looks))
    log_evaluation(store, evaluation, run_id=run_ids[evaluation.trial_id])
    if parent_run_id is not None:
        store.call("log_artifact", parent_run_id, str(write_page(folder)))
    if evaluation.classifier_digest != classifier_digest(folder / CLASSIFIER_FOLDER):
        return {}, None  # packaged again since: another artifact
    return version_tags(evaluation), version_description(evaluation)
