"""Calls to MLflow: they fail fast, say little, and end in errors that name the next step."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow.version
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.db import upgrade
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException, RestException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from visiontuner.data.labels import is_table_name
from visiontuner.errors import TrackingError
from visiontuner.io.files import encode_json
from visiontuner.journal import Finding
from visiontuner.paths import set_environment
from visiontuner.text import one_line, shell_word, without_secrets
from visiontuner.tracking.run_plans import SEARCH_ID, Point, ProjectRun

# Calls to MLflow: they end in time, say little, and fail with errors that name the next step.


# MLflow reads these at each call. The user's own values win.
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
# With MLflow's own seven one call to a server that is away blocks for minutes.
_NO_RETRIES = "0"
_ENVIRONMENT = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
LIVE_SECONDS = 3
"""For one answer while a search is followed live: the next try is seconds away."""
PATIENT_SECONDS = 120
"""For one answer to someone who waits for it, and for any artifact; MLflow's own default."""
_ARTIFACT_METHODS = ("log_artifact", "log_artifacts", "log_text", "download_artifacts")
_NOISY_LOGGERS = ("alembic", "mlflow.store.db.utils", "mlflow.tracking.request_header.registry")
_SYNC_LATER = "The journal keeps everything; `visiontuner sync FOLDER` writes it later."
_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_PARAMETER_VALUE", "INVALID_STATE")


class TrackingRefused(TrackingError):
    """MLflow answers, and trying again unchanged will not help."""


class OutOfTime(TrackingError):
    """The time given for writing is up; the next call goes on from here."""


class Store:
    """One MLflow tracking store; the only place that calls it.

    Args:
        tracking_uri: `sqlite:///…` or another database URL, `http(s)://…`, `databricks`.
        advice: what to do while MLflow is away; a sentence.
        must_exist: for who only reads: do not make a new SQLite database.
        live: give an answer that is no artifact 3 seconds: what fails is tried again soon.
        templates: where an empty database is kept, to copy for the next new one.

    `deadline`, of `time.monotonic`: no call starts after it, and none lasts much longer. Each
    answer puts it off to `patience` seconds from then, if that is set.

    Raises:
        TrackingRefused: for a file store, or a folder for the database that is not there.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        advice: str = _SYNC_LATER,
        must_exist: bool = False,
        live: bool = False,
        templates: Path | None = None,
    ) -> None:
        check_tracking_uri(tracking_uri)
        path = sqlite_file(tracking_uri)
        if must_exist and path is not None and not path.exists():
            raise TrackingRefused(
                f"There is no MLflow database at {path}; set MLFLOW_TRACKING_URI, or write a "
                "search into it with `visiontuner sync FOLDER`."
            )
        self.tracking_uri = tracking_uri
        self.advice = advice
        self.deadline: float | None = None
        self.patience: float | None = None
        self.calls = 0
        self._live = live
        self._templates = templates
        self._client: MlflowClient | None = None

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """`MlflowClient.method(*args, **kwargs)`.

        Raises:
            TrackingRefused: MLflow says no.
            TrackingError: MLflow is away or failed.
            OutOfTime: `deadline` (of `time.monotonic`) has passed; nothing was called.
        """
        quick = self._live and method not in _ARTIFACT_METHODS
        return self._ask(lambda client: getattr(client, method)(*args, **kwargs), quick=quick)

    def download(self, artifact_uri: str, folder: Path) -> Path:
        """Bring a file or folder of artifacts into an existing folder, under its own name.

        Raises:
            TrackingError: as `call`.
        """

        to = {"dst_path": str(folder), "tracking_uri": self.tracking_uri}
        return Path(self._ask(lambda _: download_artifacts(artifact_uri=artifact_uri, **to)))

    def _ask(self, question: Callable[[MlflowClient], Any], *, quick: bool = False) -> Any:
        seconds: float = LIVE_SECONDS if quick else PATIENT_SECONDS
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left < 0:
                raise OutOfTime("The time for writing to MLflow is up.")
            seconds = max(LIVE_SECONDS, min(seconds, left))
        self.calls += 1
        with limited(seconds):
            try:
                if self._client is None:
                    create_database(self.tracking_uri, templates=self._templates)
                    self._client = MlflowClient(self.tracking_uri, self.tracking_uri)
                answer = question(self._client)
            except Exception as error:  # MLflow lets its backends' own exceptions of any type out
                raise explain(error, self.tracking_uri, self.advice) from error
        if self.deadline is not None and self.patience is not None:
            self.deadline = time.monotonic() + self.patience
        return answer


def check_tracking_uri(tracking_uri: str) -> None:
    """Refuse what cannot work before anything is tried; touches no network."""
    scheme, separator, _ = tracking_uri.partition(":")
    if tracking_uri == "databricks":
        return
    if not separator or scheme.lower() == "file":
        raise TrackingRefused(
            f"MLflow's file store ({without_secrets(tracking_uri)}) is not supported; "
            "set MLFLOW_TRACKING_URI to sqlite:///mlflow.db or to a server."
        )
    path = sqlite_file(tracking_uri)
    if path is not None and not path.parent.is_dir():
        # MLflow itself would retry for minutes before it says so.
        raise TrackingRefused(
            f"The folder of MLflow's database {path} does not exist; create it first."
        )


def create_database(tracking_uri: str, *, templates: Path | None = None) -> None:
    """A new SQLite database appears whole or not at all; any other store is left alone.

    MLflow makes its tables one by one, for seconds. Killed meanwhile, it leaves a file that it can
    never open again.

    Args:
        templates: a folder with an empty database by MLflow version, made by the first call and
            copied by the next ones.
    """
    path = sqlite_file(tracking_uri)
    if path is None or path.exists():
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    fresh.unlink(missing_ok=True)
    try:
        if templates is None or not _copied(_template(templates), fresh):
            _migrate(fresh)
            if templates is not None:
                _keep(fresh, _template(templates))
        _give_name(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _migrate(path: Path) -> None:
    """Make an empty database by way of a temporary folder, whose name needs no quoting in a URI."""

    assert upgrade.callback is not None
    with TemporaryDirectory(prefix="visiontuner-") as folder:
        made = Path(folder, "mlflow.db")
        upgrade.callback(f"sqlite:///{made}")
        shutil.copyfile(made, path)


def _template(folder: Path) -> Path:
    return folder / f"mlflow-{mlflow.version.VERSION}.db"


def _copied(template: Path, path: Path) -> bool:
    with suppress(OSError):
        shutil.copyfile(template, path)
        return path.stat().st_size > 0
    return False


def _keep(path: Path, template: Path) -> None:
    """Whole or not at all; without it the next database takes its seconds again."""
    part = template.with_name(f"{template.name}.{os.getpid()}.part")
    with suppress(OSError):
        template.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, part)
        part.replace(template)


def _give_name(fresh: Path, path: Path) -> None:
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass  # another process was faster: its database is as good
    except OSError:  # a file system without links
        fresh.replace(path)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file that a SQLite URI names, absolute; None for a database in memory or elsewhere.

    The URI is read as SQLAlchemy reads it for MLflow: `%20` is a space, and `?timeout=20` an option
    that belongs to no file name.

    Raises:
        TrackingRefused: it is no database URI.
    """
    if not re.match(r"sqlite\b", tracking_uri, re.IGNORECASE):
        return None
    try:
        url = make_url(tracking_uri)
    except ArgumentError as error:
        raise TrackingRefused(
            f"{without_secrets(tracking_uri)} is no database URI ({error}); "
            "set MLFLOW_TRACKING_URI to sqlite:///mlflow.db, for example."
        ) from None
    name = url.database or ":memory:"
    if str(url.query.get("uri", "")).lower() in ("true", "1") and name.startswith("file:"):
        # SQLite's own URI in SQLAlchemy's: SQLite decodes it once more.
        name = unquote(urlsplit(name).path)
        if url.query.get("mode") == "memory":
            name = ":memory:"
    return None if name == ":memory:" else Path(name).absolute()


def explain(error: Exception, tracking_uri: str, advice: str = _SYNC_LATER) -> TrackingError:
    """MLflow's error as one line with a next step; `advice` is for an MLflow that is away."""
    where = without_secrets(tracking_uri)
    text = " ".join(str(error).split())
    short = one_line(text, 300)
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        uri = shell_word(tracking_uri, "MLFLOW_TRACKING_URI")
        return TrackingRefused(
            f"The MLflow database at {where} has another version's schema; back it up and run "
            f"`mlflow db upgrade {uri}`, or set MLFLOW_TRACKING_URI to another one."
        )
    if isinstance(error, ModuleNotFoundError):
        package = driver_package(error)
        return TrackingRefused(
            f"The database at {where} needs the package {package}: `{install(package)}`."
        )
    refused = _refusal(error, text)
    if refused is not None:
        status, words = refused
        said = f": {without_secrets(words)}" if words else ""
        said += "" if said.endswith((".", "!")) else "."
        return TrackingRefused(f"MLflow at {where} refuses ({status}){said} {_way_in(words)}")
    code = getattr(error, "error_code", "")
    if code == "RESOURCE_DOES_NOT_EXIST":
        return TrackingRefused(f"MLflow at {where} has no such run or experiment: {short}")
    if isinstance(error, MlflowException) and code in _REFUSALS:
        return TrackingRefused(f"MLflow at {where} refuses: {short}")
    reason = _network_reason(text)
    if reason:
        return TrackingError(f"MLflow at {where} cannot be reached: {reason}. {advice}")
    return TrackingError(f"MLflow at {where} cannot be reached or failed: {short} {advice}")


# Where the module's name is not the package's.
_DRIVERS = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}


def driver_package(error: ModuleNotFoundError) -> str:
    """The package that holds the module of a database's driver."""
    module = (error.name or str(error)).partition(".")[0]
    return _DRIVERS.get(module, module)


def install(package: str) -> str:
    """The command that installs a package."""
    return f"pip install {shlex.quote(package)}"


_CREDENTIALS = (
    "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to those "
    "of someone who may do this."
)


def _refusal(error: Exception, text: str) -> tuple[int, str] | None:
    """The HTTP status by which a server says that it does not let us in, and its own words."""
    by_name = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}
    found = re.search(r"\b(?:error code|status code|HTTP) ?:? ?(401|403)\b", text) or re.search(
        r"\b(401|403) Client Error\b", text
    )
    if isinstance(error, RestException) and error.error_code in by_name:
        return by_name[error.error_code], str(error.json.get("message", ""))[:300]
    if found is None:
        return None
    body = re.search(r"Response (?:body|text): '?(.*?)'?$", text)
    words = re.sub(r"<[^>]*>", " ", body[1]) if body else ""
    return int(found[1]), " ".join(words.split())[:300]


def _way_in(words: str) -> str:
    if "host header" in words.lower():
        return "Start the server with --allowed-hosts and the name in this address, or use another."
    return _CREDENTIALS


def _network_reason(text: str) -> str | None:
    """The end of a chain of nested exceptions, which is what says something."""
    known = r"\[Errno -?\d+\] ([A-Z][\w ]+)|(too many \d+ error responses|\w+ timed out)"
    found = re.search(known, text) if "failed with" in text else None
    return (found[1] or found[2]) if found else None


_limits_lock = threading.Lock()
_limits: list[int] = []
_saved: dict[str, str | None] = {}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """MLflow's settings for our calls only; the environment is as before when the last one ends.

    Calls from several threads share one environment: the longest of their limits holds.

    Args:
        seconds: for one answer, where the user's MLFLOW_HTTP_REQUEST_TIMEOUT says nothing.
    """
    with _limits_lock:
        if not _limits:
            names = (*_ENVIRONMENT, _RETRIES, _TIMEOUT)
            _saved.update({name: os.environ.get(name) for name in names})
            os.environ.update(_ENVIRONMENT)
            os.environ.setdefault(_RETRIES, _NO_RETRIES)
            for name in _NOISY_LOGGERS:
                logging.getLogger(name).addFilter(_is_important)
        _limits.append(round(seconds))
        _set_timeout()
    try:
        yield
    finally:
        with _limits_lock:
            _limits.remove(round(seconds))
            if _limits:
                _set_timeout()
            else:
                _restore()


def _set_timeout() -> None:
    os.environ[_TIMEOUT] = _saved[_TIMEOUT] or str(max(_limits))


def _restore() -> None:
    set_environment(_saved)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).removeFilter(_is_important)


def _is_important(record: logging.LogRecord) -> bool:
    """Drops the migrations of a new database and a plugin's harmless complaint."""
    return record.levelno > logging.ERROR


# What the writer asks of MLflow, in as few calls as it allows.


# MLflow takes 1,000 metrics, 100 parameters and 100 tags a call, 1,000 of all together.
_METRICS_A_CALL = 800
_PARAMS_A_CALL = 90
_TAGS_A_CALL = 90


def search_runs(store: Store, search_id: str) -> Iterator[Run]:
    """All runs of a search, in whichever experiment they lie, deleted ones included.

    Raises:
        TrackingRefused: their experiment is deleted.
    """
    experiments = list(
        _pages(store, "search_experiments", view_type=ViewType.ALL, max_results=1000)
    )
    deleted = {e.experiment_id: e.name for e in experiments if e.lifecycle_stage == "deleted"}
    for run in _pages(
        store,
        "search_runs",
        [experiment.experiment_id for experiment in experiments],
        filter_string=f"tags.`{SEARCH_ID}` = '{search_id}'",
        run_view_type=ViewType.ALL,
        max_results=1000,
    ):
        if run.info.experiment_id in deleted:
            raise deleted_experiment(deleted[run.info.experiment_id], run.info.experiment_id)
        yield run


def why_not_adopted(store: Store, project: ProjectRun, search_id: str) -> str | None:
    """Why a run is not the one that `mlflow run` opened for this search; None if it is.

    `MLFLOW_RUN_ID` stays set in many shells and notebooks. A run that something else has written or
    ended would get a search's parameters, and trials of two searches would lie below one run.

    Raises:
        TrackingError: MLflow is away.
    """
    try:
        run: Run = store.call("get_run", project.run_id)
    except TrackingRefused as error:
        return str(error).rstrip(".")
    tags = run.data.tags
    if tags.get("mlflow.source.type") != "PROJECT":
        return "`mlflow run` did not open it"
    if run.info.experiment_id != project.experiment_id:
        return "it is not in the experiment of MLFLOW_EXPERIMENT_ID"
    if run.info.lifecycle_stage == "deleted":
        return "it is deleted"
    if run.info.status != "RUNNING":
        return f"it is {run.info.status}, not RUNNING"
    if tags.get(SEARCH_ID) != search_id and any(tag.startswith("visiontuner.") for tag in tags):
        return "it belongs to another search"
    return None


def log_batch(
    store: Store,
    run_id: str,
    points: Sequence[Point],
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> None:
    """As few calls as MLflow's limits allow; the last tags travel in the last one."""
    metrics = [Metric(p.key, p.value, p.time, p.step) for p in points]
    rows = [Param(key, value) for key, value in params.items()]
    while len(metrics) > _METRICS_A_CALL or len(rows) > _PARAMS_A_CALL:
        store.call(
            "log_batch", run_id, metrics=metrics[:_METRICS_A_CALL], params=rows[:_PARAMS_A_CALL]
        )
        metrics, rows = metrics[_METRICS_A_CALL:], rows[_PARAMS_A_CALL:]
    labels = [RunTag(key, value) for key, value in tags.items()]
    while len(labels) > _TAGS_A_CALL:
        store.call("log_batch", run_id, tags=labels[:_TAGS_A_CALL])
        labels = labels[_TAGS_A_CALL:]
    if metrics or rows or labels:
        store.call("log_batch", run_id, metrics=metrics, params=rows, tags=labels)


def findings_text(findings: Iterable[Finding]) -> str:
    """The artifact `findings.json`: a list of rule, severity, evidence, advice and step."""
    return encode_json([asdict(finding) for finding in findings], indent=1).decode()


def dataset_input(data: Mapping[str, Any]) -> DatasetInput:
    """A dataset entry made from the journal alone: no image is looked at."""
    source = str(data.get("source") or data.get("root") or "")
    folder = source.rpartition("/")[0] if is_table_name(source) else source
    profile = {"counts": data.get("counts"), "classes": len(data.get("class_names") or ())}
    return DatasetInput(
        Dataset(
            name=folder.rstrip("/").rsplit("/", 1)[-1][:500] or "images",
            digest=str(data["digest"])[:36],  # MLflow's limit; the tag has all of it
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
    )


def _pages(store: Store, method: str, /, *args: Any, **kwargs: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = store.call(method, *args, page_token=token, **kwargs)
        yield from page
        token = page.token
        if not token:
            return


def refuse_deleted(run: Run, what: str) -> None:
    if run.info.lifecycle_stage == "deleted":
        raise TrackingRefused(
            f"The {what} of this search is deleted in MLflow; bring it back with "
            f"`mlflow runs restore --run-id {run.info.run_id}`, or remove it for good with "
            f"`mlflow gc --run-ids {run.info.run_id}`."
        )


def deleted_experiment(name: str, experiment_id: str) -> TrackingRefused:
    return TrackingRefused(
        f"The MLflow experiment {name!r} is deleted; bring it back with "
        f"`mlflow experiments restore --experiment-id {experiment_id}`, or choose another name."
    )
