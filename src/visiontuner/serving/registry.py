"""A classifier folder as an MLflow model: logged once, registered, found by its version."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

import visiontuner
from visiontuner.errors import ClassifierError, TrackingError, UserMistake
from visiontuner.io.files import temporary_folder
from visiontuner.journal import SearchRecord, packaged_trial
from visiontuner.model.classifier import reference_entries
from visiontuner.paths import CLASSIFIER_FOLDER, set_environment
from visiontuner.text import next_command, one_line
from visiontuner.workarounds.mlflow import requirements_taken_on_trust

# What MLflow needs to make a model of a classifier folder: code, signature, requirements.


# `serving/pyfunc.py` and all that it imports of visiontuner; it travels with the model.
_PYFUNC = "serving/pyfunc.py"
CODE = (
    "__init__.py",
    "errors.py",
    "data/__init__.py",
    "data/images.py",
    "model/__init__.py",
    "model/classifier.py",
    "model/novelty.py",
    "serving/__init__.py",
    "serving/answers.py",
)
# mlflow-skinny serves as well as mlflow and is half a gigabyte smaller.
_REQUIREMENTS = ("mlflow-skinny", "onnxruntime", "pillow", "numpy", "pandas")
_OPTIONAL = {"pillow_heif": "pillow-heif", "httptools": "httptools", "uvloop": "uvloop"}
_EXAMPLES = 2


@contextmanager
def model_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """What MLflow needs to make a model of a classifier folder."""
    with temporary_folder() as temporary, _importable(str(temporary)):
        code, script = _stage_code(temporary)
        if folder.resolve().name != CLASSIFIER_FOLDER:
            # MLflow names an artifact after its folder; what reads the model goes by this name.
            folder = Path(shutil.copytree(folder, temporary / CLASSIFIER_FOLDER))
        yield {
            "python_model": str(script),
            "artifacts": {CLASSIFIER_FOLDER: str(folder)},
            "code_paths": [str(code)],
            "signature": signature(),
            "input_example": (_example(folder), {"top_k": 5}),
            "pip_requirements": requirements(),
        }


def requirements() -> list[str]:
    """What the served model needs, pinned to what is installed here."""
    packages = list(_REQUIREMENTS)
    # What training reads the endpoint reads; and what makes uvicorn faster where it is installed.
    for module, package in _OPTIONAL.items():
        if importlib.util.find_spec(module):
            packages.append(package)
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]


def signature() -> ModelSignature:
    """A column of image files in; label, probability, what to think of it and the top k out."""
    choice = Object([Property("label", DataType.string), Property("probability", DataType.double)])
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                # None for an image that could not be read, where `on_error` is "report".
                ColSpec(DataType.string, "label", required=False),
                ColSpec(DataType.double, "probability", required=False),
                ColSpec(DataType.boolean, "confident", required=False),
                # None also where the model cannot tell.
                ColSpec(DataType.boolean, "known", required=False),
                ColSpec(DataType.double, "novelty", required=False),
                ColSpec(Array(choice), "top_k"),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("top_k", DataType.long, 5),
                ParamSpec("threshold", DataType.double, None),
                ParamSpec("on_error", DataType.string, "fail"),
            ]
        ),
    )


def _stage_code(folder: Path) -> tuple[Path, Path]:
    """The package that travels with the model, and the script that MLflow runs.

    The package is named after its content, not `visiontuner`: MLflow puts a loaded model's code
    first on the module path, and a process that loads a model keeps its own, whole visiontuner.
    """
    source = Path(visiontuner.__file__).parent
    texts = {name: (source / name).read_text(encoding="utf-8") for name in (*CODE, _PYFUNC)}
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    package = f"visiontuner_{digest[:12]}"
    for name, text in texts.items():
        path = folder / package / name if name != _PYFUNC else folder / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"^from visiontuner\.", f"from {package}.", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    return folder / package, folder / Path(_PYFUNC).name


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """MLflow runs the script once while it logs, and adds to the module path."""
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before


def _example(folder: Path) -> pd.DataFrame:
    """Two real images: the first of the reference."""
    try:
        reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        contents = [base64.b64decode(p["image"]) for p in reference_entries(reference)[:_EXAMPLES]]
        if not contents:
            raise ValueError("it has none")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ClassifierError(
            f"{folder}/reference.json has no image to show as an example: {error}."
        ) from None
    return pd.DataFrame({"image": contents})


# Log a classifier folder as an MLflow model, once, and register it.
#
# Each step looks for what an earlier attempt left behind, so that a kill between two of them is
# made good by calling again.


CHALLENGER = "challenger"
DIGEST_TAG = "visiontuner.classifier_digest"
# Of a version in int8: the float32 version that it was made of, `models:/NAME/VERSION`.
QUANTIZED_FROM_TAG = "visiontuner.quantized_from"

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
    "visiontuner.weights_licence",
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


def register_classifier(
    folder: Path,
    record: SearchRecord,
    run_ids: Mapping[str, str],
    uri: str,
    *,
    tags: Mapping[str, str] | None = None,
    tested: str | None = None,
) -> str:
    """Log and register the classifier once, on the run of the trial that made it.

    Args:
        tested: what the test images say of it, in one sentence; default: what to expect of it.

    Raises:
        TrackingError: MLflow is away or refuses.
        ClassifierError: there is no classifier of this search.
    """
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
        description=tested or _expected(record),
    )
    return f"models:/{version.name}/{version.version}"


def _expected(record: SearchRecord) -> str | None:
    """What the choice says of the model's accuracy, before any test image was looked at."""
    estimate = (record.choice or {}).get("estimate")
    if not estimate:
        return None
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"Expected on new images: {value:.1f} % right ({low:.1f} to {high:.1f}); not tested yet."


def log_classifier(
    folder: Path,
    *,
    run_id: str,
    tracking_uri: str,
    name: str,
    tags: Mapping[str, str] | None = None,
    description: str | None = None,
    derived: bool = False,
) -> ModelVersionInfo:
    """Log a classifier folder on a trial's run and register it as the newest challenger.

    The same classifier on the same run is logged once, however often this is called.

    Args:
        folder: a packaged classifier.
        run_id: the run of the trial that made it.
        name: of the registered model; made if missing.
        tags: more tags for the model and its version; lineage tags come from the runs.
        description: of a new version.
        derived: it does not answer as the trial did, as one in int8: the run's best values are
            not its own, and the alias stays with the version that holds it.

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
            if not derived:
                _link_dataset(client, run, model_id)
            version = _register(client, name, run_id, model_id, labels, description)
            if not derived:
                _point_challenger(client, name, version)
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"MLflow could not take the model: {one_line(error, 300)} "
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
        _logged_name(run, tags),
        source_run_id=run.info.run_id,
        tags=dict(tags),
        params=run.data.params,
    )
    with model_parts(folder) as parts, requirements_taken_on_trust():
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run.info.run_id,
            model_id=model.model_id,
            **parts,
        )
    return str(model.model_id)


def _logged_name(run: Run, tags: Mapping[str, str]) -> str:
    """Trial, its stage in a search with two, and whether it is what was evaluated."""
    known = {**run.data.tags, **tags}
    parts = [known.get("visiontuner.trial_id"), known.get("visiontuner.stage")]
    parts += ["calibrated"] if tags.get("visiontuner.evaluated") == "true" else []
    parts += ["int8"] if QUANTIZED_FROM_TAG in tags else []
    return "-".join(filter(None, parts)) or "classifier"


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
    client: MlflowClient,
    name: str,
    run_id: str,
    model_id: str,
    tags: Mapping[str, str],
    description: str | None,
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
            name,
            f"models:/{model_id}",
            run_id=run_id,
            tags=dict(tags),
            model_id=model_id,
            description=description,
        )
    for key, value in tags.items():
        if version.tags.get(key) != value:  # evaluated once more, for example
            client.set_model_version_tag(name, version.version, key, value)
    return version


def _point_challenger(client: MlflowClient, name: str, version: ModelVersion) -> None:
    aliases = client.get_registered_model(name).aliases
    # Never back to an older version, when a search is synchronised late.
    if int(aliases.get(CHALLENGER, 0)) < int(version.version):
        client.set_registered_model_alias(name, CHALLENGER, version.version)


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
        set_environment(environment)


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


# Versions of registered models: which one a text names, and where its classifier lies.


CHAMPION = "champion"

_PREFIX = "models:/"


class Mlflow(Protocol):
    """Whom to ask: `tracking.client.Store`; its errors are `TrackingError`s in one line."""

    tracking_uri: str

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any: ...
    def download(self, artifact_uri: str, folder: Path) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A registered model, and a version by number or alias; the newest if neither is given."""

    name: str
    version: str | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """`NAME`, `NAME/VERSION` or `NAME@ALIAS`, each also with `models:/` in front.

        Raises:
            UserMistake: it is none of these.
        """
        plain = text.removeprefix(_PREFIX).strip("/")
        name, slash, version = plain.partition("/")
        name, at, alias = (name, "", "") if slash else plain.partition("@")
        if not name or ":" in plain or (slash and not version.isdecimal()) or (at and not alias):
            raise UserMistake(
                f"{text!r} is no model. Name one as NAME, NAME/VERSION, NAME@ALIAS or "
                "models:/NAME/VERSION."
            )
        return cls(name=name, version=version or None, alias=alias or None)


def find_version(mlflow: Mlflow, reference: ModelReference) -> ModelVersion:
    """The version that is meant; without number and alias the newest.

    Raises:
        UserMistake: there is no such model, version or alias.
        TrackingError: MLflow is away or refuses.
    """
    name, held = reference.name, aliases(mlflow, reference.name)
    number = reference.version
    if reference.alias:
        number = held.get(reference.alias)
        if number is None:
            known = ", ".join(sorted(held)) or "none"
            raise UserMistake(f"Model {name!r} has no alias {reference.alias!r}; it has: {known}.")
    if number is None:
        # The alias follows the newest version; who set it by hand means that one.
        pointed = get_version(mlflow, name, held[CHALLENGER]) if CHALLENGER in held else None
        found = pointed or _newest(mlflow, name)
    else:
        found = get_version(mlflow, name, number)
    if found is None:
        raise UserMistake(
            f"Model {name!r} has no version {number}; its versions: {_listed(mlflow, name)}."
            if number
            else f"Model {name!r} has no version yet; `visiontuner tune` registers one."
        )
    return found


def get_version(mlflow: Mlflow, name: str, number: str) -> ModelVersion | None:
    """One version with its aliases; None if it is not there or deleted."""
    try:
        version: ModelVersion = mlflow.call("get_model_version", name, str(number))
    except TrackingError as error:
        if is_missing(error):
            return None
        raise
    return version


def aliases(mlflow: Mlflow, name: str) -> dict[str, str]:
    """Version numbers by alias; an alias may point to a version that was deleted.

    Raises:
        UserMistake: there is no such model.
    """
    try:
        model = mlflow.call("get_registered_model", name)
    except TrackingError as error:
        if is_missing(error):
            raise UserMistake(
                f"MLflow has no model {name!r}. It has: {_listed_models(mlflow)}. "
                "`visiontuner tune` registers one."
            ) from None
        raise
    return {alias: str(number) for alias, number in model.aliases.items()}


def find_registered(mlflow: Mlflow, digest: str) -> ModelVersion | None:
    """The newest version of a classifier, by the digest of its files; None if there is none.

    Args:
        digest: from `classifier_digest`.
    """
    found = mlflow.call("search_model_versions", f"tags.`{DIGEST_TAG}` = '{digest}'")
    return max(found, key=lambda version: version.creation_timestamp, default=None)


def versions_of_run(mlflow: Mlflow, run_id: str) -> list[ModelVersion]:
    """What was registered from a run, oldest first."""
    found = mlflow.call("search_model_versions", f"run_id = '{run_id}'")
    return sorted(found, key=lambda v: (v.name, int(v.version)))


TEST_SET_TAG = "visiontuner.test_set"
TEST_LOOKS_TAG = "visiontuner.test_looks"


def digest_of_test_set(digests: Iterable[str]) -> str:
    """SHA-256 of the test images' content digests, whatever their order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def evaluated_on(mlflow: Mlflow, name: str, test_set: str) -> list[ModelVersion]:
    """Versions of a model, in any order, that were evaluated on these test images.

    Args:
        test_set: from `digest_of_test_set`.
    """
    versions = mlflow.call("search_model_versions", _named(name))
    return [version for version in versions if version.tags.get(TEST_SET_TAG) == test_set]


def earlier_looks(mlflow: Mlflow, name: str, test_set: str) -> int:
    """How many times models of this name were evaluated on these test images, as MLflow knows.

    Each evaluation wrote its number. Those written while MLflow was away may share one: then the
    trials that were evaluated are counted.
    """
    versions = evaluated_on(mlflow, name, test_set)
    numbers = [v.tags[TEST_LOOKS_TAG] for v in versions if TEST_LOOKS_TAG in v.tags]
    trials = len({version.run_id for version in versions})
    return max([trials, *(int(n) for n in numbers if n.isdecimal())])


def logged_model_id(version: ModelVersion) -> str | None:
    """The id of the logged model behind a version; None for one that came another way."""
    source = str(version.source or "")
    behind = source.removeprefix(_PREFIX) if source.startswith(f"{_PREFIX}m-") else None
    return version.model_id or behind


def is_missing(error: TrackingError) -> bool:
    """Whether MLflow answered that there is no such thing."""
    return getattr(error.__cause__, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _newest(mlflow: Mlflow, name: str) -> ModelVersion | None:
    numbers = _numbers(mlflow, name)
    return get_version(mlflow, name, str(numbers[-1])) if numbers else None


def _numbers(mlflow: Mlflow, name: str) -> list[int]:
    found = mlflow.call("search_model_versions", _named(name))
    return sorted(int(version.version) for version in found)


def _named(name: str) -> str:
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def _listed(mlflow: Mlflow, name: str) -> str:
    return ", ".join(map(str, _numbers(mlflow, name))) or "none"


def _listed_models(mlflow: Mlflow) -> str:
    names = [model.name for model in mlflow.call("search_registered_models", max_results=6)]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "none"
