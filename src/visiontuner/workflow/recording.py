"""From a search folder to MLflow: beside a running search, and afterwards."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.errors import ClassifierError, TrackingError
from visiontuner.journal import SearchRecord
from visiontuner.layout import CLASSIFIER_FOLDER
from visiontuner.locations import NO_TRACKING, writable_cache_folder
from visiontuner.workflow.observing import Observer
from visiontuner.workflow.packaging import packaged_trial

if TYPE_CHECKING:
    from visiontuner.tracking.follow import WriterThread
    from visiontuner.tracking.mlflow_writer import MlflowWriter


class BackgroundTracking:
    """The MLflow writer beside a running search; opened in the background: it takes seconds."""

    def __init__(self, folder: Path, uri: str, adopted_run: str | None, observer: Observer) -> None:
        self._folder = folder
        self._uri = uri
        self._adopted_run = adopted_run
        self._observer = observer
        self._writer: MlflowWriter | None = None
        self._thread: WriterThread | None = None
        self._problem: str | None = None
        self._closed = False
        self._opening = threading.Thread(target=self._open, name="mlflow-open", daemon=True)
        self._opening.start()

    @property
    def run_ids(self) -> dict[str, str]:
        """MLflow run ids by trial id."""
        return self._writer.run_ids if self._writer else {}

    def close(self, *, timeout_seconds: float = 60) -> str | None:
        """Write the rest, once; returns why not everything is in MLflow, or None."""
        if not self._closed:
            self._opening.join()
            if self._thread is not None and not self._thread.close(timeout_seconds):
                self._problem = self._thread.problem or "MLflow does not hold everything yet."
            self._closed = True
        return self._problem

    def _open(self) -> None:
        if self._uri == NO_TRACKING:
            self._problem = f"MLFLOW_TRACKING_URI is {NO_TRACKING!r}."
            return
        from visiontuner.tracking.follow import WriterThread
        from visiontuner.tracking.mlflow_writer import MlflowWriter

        try:
            self._writer = MlflowWriter(
                self._folder,
                tracking_uri=self._uri,
                parent_run_id=self._adopted_run,
                templates=writable_cache_folder() / "databases",
            )
        except TrackingError as error:  # the search goes on, `sync` writes it elsewhere
            self._problem = str(error)
            self._observer.note(self._problem)
            return
        self._thread = WriterThread(self._writer, notice=self._observer.note)


def register_classifier(
    folder: Path,
    record: SearchRecord,
    run_ids: Mapping[str, str],
    uri: str,
    *,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Log and register the classifier once, on the run of the trial that made it.

    Raises:
        TrackingError: MLflow is away or refuses.
        ClassifierError: there is no classifier of this search.
    """
    from visiontuner.serving.registry import log_classifier

    trial_id = packaged_trial(folder)
    if trial_id is None or trial_id not in run_ids:
        raise ClassifierError(
            f"{folder / CLASSIFIER_FOLDER} is not from this search; "
            f"`visiontuner tune --resume {folder}` packages it again."
        )
    version = log_classifier(
        folder / CLASSIFIER_FOLDER,
        run_id=run_ids[trial_id],
        tracking_uri=uri,
        name=record.started["experiment"]["name"],
        tags={
            "visiontuner.search_id": record.search_id,
            "visiontuner.trial_id": trial_id,
            "visiontuner.data_digest": record.started["data"]["digest"],
            **(tags or {}),
        },
    )
    return f"models:/{version.name}/{version.version}"
