"""Where things are when nobody says: the cache, the tracking store, the searches."""

from __future__ import annotations

import os
from pathlib import Path

from visiontuner.commands import DEFAULT_TRACKING_URI
from visiontuner.errors import JournalError, UserMistake
from visiontuner.journal import FILE_NAME
from visiontuner.layout import CACHE_MARK_FILE, SEARCHES_FOLDER
from visiontuner.tracking.plan import ProjectRun

SEARCHES = Path(SEARCHES_FOLDER)


def cache_folder() -> Path:
    """Features, exported networks, downloads: `VISIONTUNER_CACHE` or the user's cache folder.

    Raises:
        UserMistake: the user has no home, as in a container whose user id has no name.
    """
    chosen = os.environ.get("VISIONTUNER_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

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


def take_project_run() -> ProjectRun | None:
    """`MLFLOW_RUN_ID`, out of the environment: Ray's workers must not inherit it.

    It may be left over from anything: `MlflowWriter` looks at the run before it adopts it.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if not run_id:
        return None
    return ProjectRun(run_id=run_id, experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID"))


def at_hand(source: str) -> str:
    """A data source that SageMaker laid beside a training job, as the folder where it lies.

    `VISIONTUNER_CHANNEL` is `SOURCE=FOLDER`. Any other source stays as it is.
    """
    channel, _, folder = os.environ.get("VISIONTUNER_CHANNEL", "").rpartition("=")
    return folder if channel and channel == source else source


def newest_search(searches: Path = SEARCHES) -> Path:
    """The search folder whose journal was written last.

    Raises:
        JournalError: there is none.
    """
    journals = list(searches.glob(f"*/{FILE_NAME}"))
    if not journals:
        raise JournalError(f"There is no search in {searches}/ yet; `visiontuner tune` makes one.")
    return max(journals, key=lambda journal: journal.stat().st_mtime).parent
