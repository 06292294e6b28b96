"""Check a model as an endpoint will serve it, before it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from visiontuner import interrupts
from visiontuner.io.files import temporary_folder
from visiontuner.paths import writable_cache_folder
from visiontuner.serving.preflight import (
    Container,
    PreflightReport,
    build_container_image,
    require_engine,
    run_preflight,
)
from visiontuner.serving.registry import save_classifier
from visiontuner.serving.server import ScoringServer, Served, clean_environment, local_environment
from visiontuner.workflow.promote import locate_model, model_folder, passed_over


def preflight(
    model: str | None = None,
    *,
    env_manager: Literal["uv", "local"] = "uv",
    container: bool = False,
    image: str | None = None,
    ready_seconds: float = 120.0,
    note: Callable[[str], None] = lambda _: None,
) -> PreflightReport:
    """Serve the exact artifact on this machine, ask it over HTTP, and end the server.

    The code that an MLflow model brings is run, as its endpoint will; a note says so.

    Args:
        model: NAME, NAME/VERSION, NAME@ALIAS or models:/…, or a model, classifier or search
            folder; the newest search's model, by its NAME, if None.
        env_manager: a clean environment from the model's pinned requirements, kept for the next
            time, or this process's own.
        container: in SageMaker's container instead, on this machine's Docker engine.
        image: of the container; None: the one that is built for the model's requirements,
            kept for the next time.
        ready_seconds: how long the server may take to start.
        note: told what happens, a line at a time.

    Raises:
        UserMistake: there is no such model, or no Docker engine.
        ServingError: it cannot be installed or served at all.
        TrackingError: MLflow is away or refuses.
    """

    if container:
        require_engine()
    located = locate_model(model)
    name, newer = str(located), passed_over(model, located)
    if newer:
        note(f"{name} is the champion; {newer} is newer, and can be named.")
    with model_folder(name) as found, temporary_folder() as temporary:
        folder = _as_mlflow_model(found, temporary / "model")
        if folder == found:
            note(
                f"{name} is served as it is: the code that came with it runs here, and what it "
                "requires is installed. Only for models that you trust."
            )
        if container:
            server = _container(folder, image, ready_seconds, note)
            with interrupts.in_order():  # Docker's engine keeps what nobody removes
                return run_preflight(folder, server, name=name, note=note)
        server = _process(folder, env_manager, ready_seconds, note)
        return run_preflight(folder, server, name=name, note=note)


def build_serving_image(
    model: str, image: str | None = None, *, note: Callable[[str], None] = lambda _: None
) -> str:
    """The image that `preflight` checks with `container`, under a name of its own.

    Args:
        model: as `preflight` takes it.
        image: its name; None: one made of the model's requirements.

    Returns:
        The image's name.

    Raises:
        UserMistake: there is no such model, or no Docker engine.
        ServingError: it cannot be built.
        TrackingError: MLflow is away or refuses.
    """
    require_engine()
    with model_folder(model) as found, temporary_folder() as temporary:
        return build_container_image(_as_mlflow_model(found, temporary / "model"), image, note=note)


def _container(
    folder: Path, image: str | None, ready_seconds: float, note: Callable[[str], None]
) -> Served:
    found = image or build_container_image(folder, note=note)
    return Container(folder, found, ready_seconds=ready_seconds)


def _process(
    folder: Path, env_manager: str, ready_seconds: float, note: Callable[[str], None]
) -> Served:
    if env_manager == "local":
        environment = local_environment()
    else:
        note("Installing the model's requirements, if they are not there yet.")
        environment = clean_environment(folder, writable_cache_folder())
    return ScoringServer(folder, environment, ready_seconds=ready_seconds)


def _as_mlflow_model(folder: Path, destination: Path) -> Path:
    """A classifier folder becomes the model that would be logged."""
    if (folder / "MLmodel").is_file():
        return folder

    return save_classifier(folder, destination)
