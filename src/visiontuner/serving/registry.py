"""Log a classifier folder as an MLflow model, once, and register it.

Each step looks for what an earlier attempt left behind, so that a kill between two of them is made
good by calling again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from visiontuner.commands import next_command
from visiontuner.errors import ClassifierError, TrackingError
from visiontuner.serving.model_parts import model_parts
from visiontuner.text import one_line

CHALLENGER = "challenger"
DIGEST_TAG = "visiontuner.classifier_digest"
MODEL_NAME = "classifier"

# What a model version says about where it came from; written on its runs by the tracking writer.
_LINEAGE = (
    "visiontuner.search_id",
    "visiontuner.trial_id",
    "visiontuner.data_digest",
    "visiontuner.data_source",
    "visiontuner.code_commit",
    "visiontuner.code_dirty",
    "visiontuner.version",
    "visiontuner.backbone",
    "visiontuner.weights_digest",
)
_URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_LOGGERS = ("mlflow", "sagemaker", "alembic")
# MLflow's fluent functions keep the tracking URI of the process: one logging at a time.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ModelVersionInfo:
    """One version in the registry; `uri` is `models:/NAME/VERSION`."""

    name: str
    version: str
    model_id: str
    uri: str


def log_classifier(
    folder: Path,
    *,
    run_id: str,
    tracking_uri: str,
    name: str,
    tags: Mapping[str, str] | None = None,
) -> ModelVersionInfo:
    """Log a classifier folder on a trial's run and register it as the newest challenger.

    The same classifier on the same run is logged once, however often this is called.

    Args:
        folder: a packaged classifier.
        run_id: the run of the trial that made it.
        name: of the registered model; made if missing.
        tags: more tags for the model and its version; lineage tags come from the runs.

    Raises:
        ClassifierError: the folder is not a classifier.
        TrackingError: MLflow is away or refuses.
    """
    digest = classifier_digest(folder)
    with _one_at_a_time, quiet(), fluent_uris(tracking_uri):
        try:
            client = MlflowClient(tracking_uri, tracking_uri)
            run = client.get_run(run_id)
            labels = {**_lineage(client, run), **(tags or {}), DIGEST_TAG: digest}
            model_id = _find_model(client, run, digest) or _log_model(client, folder, run, labels)
            _link_dataset(client, run, model_id)
            version = _register(client, name, run_id, model_id, labels)
        except (MlflowException, OSError) as error:
            text = one_line(error, 300)
            raise TrackingError(
                f"MLflow could not take the model: {text} "
                f"`{next_command('sync', folder.parent)}` tries again."
            ) from error
    return ModelVersionInfo(
        name=name,
        version=str(version.version),
        model_id=model_id,
        uri=f"models:/{name}/{version.version}",
    )


def save_classifier(folder: Path, destination: Path) -> Path:
    """The model that `log_classifier` logs, as a folder: to try it without a store.

    Args:
        destination: made here; must not exist.

    Raises:
        ClassifierError: the folder is not a classifier.
        TrackingError: MLflow refuses.
    """
    classifier_digest(folder)
    with _one_at_a_time, quiet():
        import mlflow.pyfunc

        try:
            with model_parts(folder) as parts:
                mlflow.pyfunc.save_model(path=str(destination), **parts)
        except (MlflowException, OSError) as error:
            text = one_line(error, 300)
            raise TrackingError(f"MLflow could not save the model: {text}") from error
    return destination


def classifier_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a classifier folder's files.

    Raises:
        ClassifierError: there is no classifier in the folder.
    """
    if not (folder / "classifier.json").is_file():
        raise ClassifierError(f"{folder} is no classifier folder: it has no classifier.json.")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _lineage(client: MlflowClient, run: Run) -> dict[str, str]:
    """The lineage tags of a trial's run and its parent's."""
    parent_id = run.data.tags.get("mlflow.parentRunId")
    parent = client.get_run(parent_id).data.tags if parent_id else {}
    both = {**parent, **run.data.tags}
    return {key: both[key] for key in _LINEAGE if key in both}


def _find_model(client: MlflowClient, run: Run, digest: str) -> str | None:
    """The model that an earlier call logged completely; what it left unfinished is deleted."""
    models: list[LoggedModel] = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"tags.`{DIGEST_TAG}` = '{digest}'"
    )
    found = None
    for model in sorted(models, key=lambda m: (m.creation_timestamp, m.model_id)):
        if model.source_run_id != run.info.run_id:
            continue
        if model.status == LoggedModelStatus.READY:
            found = found or model.model_id
        else:
            client.delete_logged_model(model.model_id)
    return found


def _log_model(client: MlflowClient, folder: Path, run: Run, tags: Mapping[str, str]) -> str:
    # Not at the top but in `quiet`: its first import warns about MLflow's own type hints.
    import mlflow.pyfunc

    # Made by hand: `Model.log` would put it into the process's experiment, not into the run's.
    model = client.create_logged_model(
        run.info.experiment_id,
        MODEL_NAME,
        source_run_id=run.info.run_id,
        tags=dict(tags),
        params=run.data.params,
    )
    with model_parts(folder) as parts, _requirements_taken_on_trust():
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run.info.run_id,
            model_id=model.model_id,
            **parts,
        )
    return str(model.model_id)


@contextmanager
def _requirements_taken_on_trust() -> Iterator[None]:
    """Spare MLflow a look through every file of every installed package: two thirds of the logging.

    It would compare the requirements with what is installed, and they were made from that. Where a
    later MLflow has another name for it, it looks.
    """
    from mlflow.utils import requirements_utils

    name = "_check_requirement_satisfied"
    check = getattr(requirements_utils, name, None)
    if check is None:
        yield
        return
    setattr(requirements_utils, name, lambda _: None)
    try:
        yield
    finally:
        setattr(requirements_utils, name, check)


def _link_dataset(client: MlflowClient, run: Run, model_id: str) -> None:
    """The trial's run names the search's data set, and the model its best value on it."""
    parent_id = run.data.tags.get("mlflow.parentRunId")
    inputs = client.get_run(parent_id).inputs if parent_id else None
    if inputs is None or not inputs.dataset_inputs:
        return
    client.log_inputs(run.info.run_id, datasets=inputs.dataset_inputs)
    dataset = inputs.dataset_inputs[0].dataset
    linked = {metric.key for metric in client.get_logged_model(model_id).metrics or ()}
    for key in sorted(set(run.data.metrics) - linked):
        if not key.startswith("best_"):
            continue
        # Exactly the run's own point: the run's curve must not get another.
        point = client.get_metric_history(run.info.run_id, key)[-1]
        client.log_metric(
            run.info.run_id, key, point.value, timestamp=point.timestamp, step=point.step,
            model_id=model_id, dataset_name=dataset.name, dataset_digest=dataset.digest,
        )  # fmt: skip


def _register(
    client: MlflowClient, name: str, run_id: str, model_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((v for v in versions if v.tags.get(DIGEST_TAG) == tags[DIGEST_TAG]), None)
    if version is None:
        version = client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, tags=dict(tags), model_id=model_id
        )
    for key, value in tags.items():
        if version.tags.get(key) != value:  # evaluated once more, for example
            client.set_model_version_tag(name, version.version, key, value)
    aliases = client.get_registered_model(name).aliases
    # Never back to an older version, when a search is synchronised late.
    if int(aliases.get(CHALLENGER, 0)) < int(version.version):
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    return version


@contextmanager
def fluent_uris(tracking_uri: str) -> Iterator[None]:
    """MLflow's logging of models reads the process-wide URIs: set for us, put back after.

    MLflow keeps them in its own variables and in the environment. One that was not set of its own
    is unset again: it would hold against whatever the process chooses later.
    """
    environment = {name: os.environ.get(name) for name in _URI_VARIABLES}
    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    own_tracking = (
        mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]
        and tracking != environment["MLFLOW_TRACKING_URI"]
    )
    own_registry = registry not in (tracking, environment["MLFLOW_REGISTRY_URI"])
    # None is not in MLflow's annotations; in its code it means "not set".
    after: tuple[Any, Any] = (
        tracking if own_tracking else None,
        registry if own_registry else None,
    )
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(after[0])
        mlflow.set_registry_uri(after[1])
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def quiet() -> Iterator[None]:
    """MLflow's notices, prints and warnings are about its own ways, not about this model."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
