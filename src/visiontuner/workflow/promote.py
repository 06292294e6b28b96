"""The champion of a registered model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visiontuner.journal import SearchRecord
from visiontuner.locations import newest_search, tracking_uri

if TYPE_CHECKING:
    from visiontuner.serving.promotion import Promotion
    from visiontuner.tracking.client import Store

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
    from visiontuner.serving import promotion
    from visiontuner.serving.versions import ModelReference

    reference = ModelReference.parse(model or newest_model())
    return promotion.promote(open_store(), reference, force=force, dry_run=dry_run)


def open_store() -> Store:
    """The MLflow store for looking things up; it must be there.

    Raises:
        TrackingError: there is none.
    """
    from visiontuner.tracking.client import Store

    return Store(tracking_uri(), advice=_ADVICE, must_exist=True)


def newest_model() -> str:
    """The name of the newest search's registered model.

    Raises:
        JournalError: there is no search here.
    """
    return str(SearchRecord.load(newest_search()).started["experiment"]["name"])
