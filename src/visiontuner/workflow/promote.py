"""The champion of a registered model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visiontuner.journal import SearchRecord
from visiontuner.locations import newest_search, tracking_uri

if TYPE_CHECKING:
    from visiontuner.serving.promotion import Promotion

ADVICE = "Check MLFLOW_TRACKING_URI, then try again."


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
    from visiontuner.tracking.client import Store

    reference = ModelReference.parse(model or _newest_model())
    store = Store(tracking_uri(), advice=ADVICE)
    return promotion.promote(store, reference, force=force, dry_run=dry_run)


def _newest_model() -> str:
    return str(SearchRecord.load(newest_search()).started["experiment"]["name"])
