"""Check a model as an endpoint will serve it, before it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from visiontuner.journal import SearchRecord
from visiontuner.locations import newest_search, writable_cache_folder
from visiontuner.workflow.query import model_folder, model_uri

if TYPE_CHECKING:
    from visiontuner.serving.preflight import PreflightReport


def preflight(
    model: str | None = None,
    *,
    env_manager: Literal["uv", "local"] = "uv",
    ready_seconds: float = 120.0,
    note: Callable[[str], None] = lambda _: None,
) -> PreflightReport:
    """Serve the exact artifact on this machine, ask it over HTTP, and end the server.

    Args:
        model: NAME, NAME/VERSION, NAME@ALIAS or models:/…, or a model, classifier or search
            folder; the newest search's registered model if None.
        env_manager: a clean environment from the model's pinned requirements, kept for the next
            time, or this process's own.
        ready_seconds: how long the server may take to start.
        note: told what happens, a line at a time.

    Raises:
        UserMistake: there is no such model.
        ServingError: it cannot be installed or served at all.
        TrackingError: MLflow is away or refuses.
    """
    from visiontuner.serving.environments import clean_environment, local_environment
    from visiontuner.serving.preflight import run_preflight

    name = model or str(SearchRecord.load(newest_search()).started["experiment"]["name"])
    if not Path(name).is_dir():
        name = model_uri(name)
    with model_folder(name) as found, TemporaryDirectory(prefix="visiontuner-") as temporary:
        folder = _as_mlflow_model(found, Path(temporary) / "model")
        if env_manager == "local":
            environment = local_environment()
        else:
            note("Installing the model's requirements, if they are not there yet.")
            environment = clean_environment(folder, writable_cache_folder())
        return run_preflight(folder, environment, name=name, ready_seconds=ready_seconds, note=note)


def _as_mlflow_model(folder: Path, destination: Path) -> Path:
    """A classifier folder becomes the model that would be logged."""
    if (folder / "MLmodel").is_file():
        return folder
    from visiontuner.serving.registry import save_classifier

    return save_classifier(folder, destination)
