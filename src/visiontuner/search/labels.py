"""The labels of the validation pictures, from whatever the trials of a search were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.picture_store import PictureStore
from visiontuner.errors import DataError
from visiontuner.journal import Event
from visiontuner.model.store import FeatureSet


class ValidationLabels(NamedTuple):
    """Labels int64 (N,), in the order of the trials' logits, and the class names."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def read_labels(*, features: Path | None = None, pictures: Path | None = None) -> ValidationLabels:
    """From the first store that is named and still there; both hold the same pictures in order.

    Raises:
        DataError: none is.
    """
    if features is not None:
        try:
            store = FeatureSet.open(features)
            return ValidationLabels(store.split("validation").labels, store.class_names)
        except DataError:
            if pictures is None:
                raise
    if pictures is None:
        raise DataError("The journal says nothing of what its trials were trained on.")
    prepared = PictureStore.open(pictures)
    return ValidationLabels(prepared.split("validation").labels, prepared.class_names)


class Stores(NamedTuple):
    """Where the features and the pictures of a search lie, as far as it has them."""

    features: Path | None
    pictures: Path | None

    @classmethod
    def of(cls, events: Iterable[Event]) -> Stores:
        """As a search's journal names them last."""
        found: dict[str, Path] = {}
        for event in events:
            if event["event"] in ("features_ready", "pictures_ready") and event.get("folder"):
                found[event["event"]] = Path(str(event["folder"]))
        return cls(found.get("features_ready"), found.get("pictures_ready"))

    def read_labels(self) -> ValidationLabels:
        return read_labels(features=self.features, pictures=self.pictures)
