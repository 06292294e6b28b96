"""Where things lie: the cache, the searches, and the name of every file of a search folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import platformdirs

from visiontuner.errors import DataError, UserMistake
from visiontuner.text import DEFAULT_TRACKING_URI, without_secrets

# What lies where, by name; a search folder's parts have the same names in MLflow's artifacts.


# Where the commands run:
SEARCHES_FOLDER = "searches"
RANGE_TESTS_FOLDER = "lr-find"
SUSPECTS_FOLDER = "suspects"  # or in a search folder
# In the folder of a range test:
RANGE_TEST_FILE = "range_test.json"
SUGGEST_FOLDER = "suggestions"
# In a folder of suspects:
SUSPECTS_FILE = "suspects.csv"
SUSPECTS_SHEET = "suspects.png"
ODD_FILE = "odd.csv"  # images that are odd but for their label
# In a folder of suggestions:
SUGGEST_FILE = "suggest.csv"
SUGGEST_SHEET = "suggest.png"
SUGGEST_SORT_FOLDER = "sort"
# In a search folder, or where `--output` says: a folder for each check of drift, and in it
DRIFT_FOLDER = "drift"
DRIFT_FILE = "drift.json"
DRIFT_TABLE = "drift.csv"
DRIFT_FIGURE = "drift.png"
DRIFT_NEW_SHEET = "new.png"
DRIFT_NEW_FOLDER = "new"
CAPTURED_FOLDER = "captured"  # what an endpoint was asked, fetched for such a check
# In the cache folder:
CACHE_MARK_FILE = ".writable"
# In a search folder, beside its journal:
EXPERIMENT_FILE = "experiment.yaml"
MLFLOW_FILE = "mlflow.json"  # where in MLflow its runs are
IMAGE_MAP_FILE = "image_map.json"  # what the report shows of single images
TEST_FEATURES_FILE = "test_features.npz"  # of evaluated test images, for that
CLASSIFIER_FOLDER = "classifier"
EVALUATION_FOLDER = "evaluation"
TEST_LOOKS_FILE = "test_looks.json"  # beside the evaluation, which may not get written after a look
# In the evaluation folder:
EVALUATION_REPORT = "report.json"
EVALUATION_PREDICTIONS = "predictions.npz"
EVALUATION_CLASSES = "classes.csv"


# Variables of this process, and of those that it starts.


def set_environment(values: Mapping[str, str | None]) -> None:
    """Set variables; None: unset."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def changed_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Variables for the length of a context; as they were afterwards."""
    before = {name: os.environ.get(name) for name in values}
    set_environment(values)
    try:
        yield
    finally:
        set_environment(before)


# Where things are when nobody says: the cache, the tracking store, the searches.


SEARCHES = Path(SEARCHES_FOLDER)


def cache_folder() -> Path:
    """Features, exported networks, downloads: `VISIONTUNER_CACHE` or the user's cache folder.

    Raises:
        UserMistake: the user has no home, as in a container whose user id has no name.
    """
    chosen = os.environ.get("VISIONTUNER_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()

    try:
        return Path(platformdirs.user_cache_dir("visiontuner", appauthor=False))
    except RuntimeError:
        raise UserMistake(
            "This user has no home folder for the cache (HOME is not set). "
            "Name a folder: `export VISIONTUNER_CACHE=FOLDER`."
        ) from None


def writable_cache_folder() -> Path:
    """The cache folder, made if it is not there.

    Raises:
        UserMistake: nothing can be written there.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CACHE_MARK_FILE).touch()
    except OSError as error:
        raise UserMistake(
            f"Cannot write the cache folder {folder}: {error.strerror}. "
            "Set VISIONTUNER_CACHE to another one."
        ) from None
    return folder


def tracking_uri() -> str:
    """Where MLflow is: `MLFLOW_TRACKING_URI` or a database in this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI


def at_hand(source: str) -> str:
    """A data source that SageMaker laid beside a training job, as the folder where it lies.

    `VISIONTUNER_CHANNEL` is `SOURCE=FOLDER`; a file in that source lies in the folder. Any other
    source stays as it is.
    """
    channel, _, folder = os.environ.get("VISIONTUNER_CHANNEL", "").rpartition("=")
    if channel.endswith("/") and source.startswith(channel):
        return f"{folder}/{source.removeprefix(channel)}".rstrip("/")
    return folder if channel and channel == source else source


def local_path(source: str) -> str:
    """The path that a `file://` address stands for; any other source as it is.

    Raises:
        DataError: the address names a machine.
    """
    if not source.lower().startswith("file://"):
        return source
    parts = urlsplit(source)
    if parts.netloc.lower() not in ("", "localhost"):
        raise DataError(
            f"{source} is on the machine {parts.netloc}: a path begins after three slashes, "
            f"file:///{parts.netloc}{parts.path}."
        )
    return unquote(parts.path)


_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,62})(?:/(.*))?", re.DOTALL | re.IGNORECASE)


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://BUCKET/KEY` -> bucket and key; the key may be empty.

    Raises:
        DataError: it is no such address.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise DataError(f"{without_secrets(uri)!r} is no place on S3; write s3://BUCKET/FOLDER.")
    return match[1], match[2] or ""


def split_folder(uri: str) -> tuple[str, str]:
    """`s3://BUCKET/FOLDER` -> bucket and prefix: empty, or with a slash at its end."""
    bucket, key = split_uri(uri)
    key = key.rstrip("/")
    return bucket, f"{key}/" if key else ""


JOURNAL_FILE = "journal.jsonl"
