"""The champion of a registered model, and which model a text means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visiontuner.errors import UserMistake
from visiontuner.io.files import temporary_folder
from visiontuner.journal import SearchRecord, newest_search
from visiontuner.paths import CLASSIFIER_FOLDER, tracking_uri
from visiontuner.serving import promotion
from visiontuner.serving.promotion import Promotion
from visiontuner.serving.registry import CHAMPION, ModelReference, aliases, find_version
from visiontuner.tracking.store import Store

# The champion of a registered model.


_ADVICE = "Check MLFLOW_TRACKING_URI, then try again."


def promote(model: str | None = None, *, force: bool = False, dry_run: bool = False) -> Promotion:
    """Make a model's newest version the champion if it is better than the one that is.

    Args:
        model: NAME, NAME/VERSION, NAME@ALIAS or models:/…; the newest search's if None.
        force: whatever the paired test says, or if there can be none.
        dry_run: decide and change nothing.

    Raises:
        UserMistake: there is nothing that could be compared; `force` is the way out.
        TrackingError: MLflow is away or refuses.
    """

    reference = ModelReference.parse(model or newest_model())
    return promotion.promote(open_store(), reference, force=force, dry_run=dry_run)


def open_store() -> Store:
    """The MLflow store for looking things up; it must be there.

    Raises:
        TrackingError: there is none.
    """

    return Store(tracking_uri(), advice=_ADVICE, must_exist=True)


def newest_model() -> str:
    """The name of the newest search's registered model.

    Raises:
        JournalError: there is no search here.
    """
    return str(SearchRecord.load(newest_search()).started["experiment"]["name"])


# Which model a text means: the one in a folder that is there, or a registered one.


_MODEL_FILES = ("MLmodel", "classifier.json")


def locate_model(model: str | None) -> Path | str:
    """The folder that a text names, or `models:/NAME/VERSION` of the registered model.

    A folder without a model in it hides none: models are named after the folder of their images.

    Args:
        model: an MLflow model's, a classifier's or a search's folder, or NAME (its champion, or the
            newest version while there is none), NAME/VERSION, NAME@ALIAS, models:/…;
            None: the NAME of the newest search's.

    Returns:
        A folder that holds MLmodel or classifier.json, or the URI.

    Raises:
        UserMistake: there is neither such a folder nor such a model, version or alias.
        JournalError: None was given, and there is no search here.
        TrackingError: MLflow is away or refuses.
    """
    if model is None:
        return model_uri(newest_model())
    folder = Path(model)
    for one in (folder, folder / CLASSIFIER_FOLDER):
        if any((one / name).is_file() for name in _MODEL_FILES):
            return one
    try:
        return model_uri(model)
    except UserMistake as error:
        if folder.is_dir():
            raise UserMistake(f"The folder {model} holds no model. {error}") from None
        raise


def passed_over(model: str | None, located: Path | str) -> str | None:
    """The newest version of a model, as NAME/VERSION, if a name alone means an older champion.

    Args:
        model: what `locate_model` was asked.
        located: what it found.

    Raises:
        TrackingError: MLflow is away or refuses.
    """

    if isinstance(located, Path):
        return None
    meant, found = (ModelReference.parse(text) for text in (model or located, located))
    if model is not None and (meant.version or meant.alias):
        return None
    newest = find_version(open_store(), ModelReference(name=found.name))
    is_newer = int(newest.version) > int(found.version or 0)
    return f"{newest.name}/{newest.version}" if is_newer else None


@contextmanager
def model_folder(model: str) -> Iterator[Path]:
    """The folder of what `locate_model` finds; a registered model's is fetched for now.

    Raises:
        UserMistake: there is no such model.
        TrackingError: MLflow is away or refuses.
    """
    located = locate_model(model)
    if isinstance(located, Path):
        yield located
        return
    with temporary_folder() as temporary:
        yield open_store().download(located, temporary)


def model_uri(model: str) -> str:
    """`models:/NAME/VERSION` of a registered model.

    Raises:
        UserMistake: there is no such model, version or alias.
        TrackingError: MLflow is away or refuses.
    """

    reference = ModelReference.parse(model)
    store = open_store()
    if not (reference.version or reference.alias) and CHAMPION in aliases(store, reference.name):
        reference = ModelReference(name=reference.name, alias=CHAMPION)
    version = find_version(store, reference)
    return f"models:/{version.name}/{version.version}"
