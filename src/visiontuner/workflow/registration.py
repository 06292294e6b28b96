"""A search's classifier -> a registered MLflow model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from visiontuner.commands import next_command
from visiontuner.errors import ClassifierError
from visiontuner.journal import SearchRecord
from visiontuner.layout import CLASSIFIER_FOLDER
from visiontuner.workflow.packaging import packaged_trial


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
            f"`{next_command('tune', '--resume', folder)}` packages it again."
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
