"""The labels of the validation pictures, from whatever the trials of a search were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import find_damage, has_checksums
from visiontuner.data.picture_store import PictureStore
from visiontuner.errors import DataError
from visiontuner.journal import Event
from visiontuner.model.store import FeatureSet, array_path


class ValidationLabels(NamedTuple):
    """Labels int64 (N,), in the order of the trials' logits, and the class names."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def read_labels(*, features: Path | None = None, pictures: Path | None = None) -> ValidationLabels:
    """From the first store that is named and still there; both hold the same pictures in order.

    They are verified first, but in a store of an earlier version, which has nothing to do it by.

    Raises:
        DataError: none is there and as it was written.
    """
    if features is not None:
        try:
            _verify_labels(features)
            store = FeatureSet.open(features)
            return ValidationLabels(store.split("validation").labels, store.class_names)
        except DataError:
            if pictures is None:
                raise
    if pictures is None:
        raise DataError("The journal says nothing of what its trials were trained on.")
    _verify_labels(pictures)
    prepared = PictureStore.open(pictures)
    return ValidationLabels(prepared.split("validation").labels, prepared.class_names)


def _verify_labels(folder: Path) -> None:
    if has_checksums(folder):
        damage = find_damage(folder, [array_path(folder, "validation", "labels").name])
        if damage is not None:
            raise DataError(f"The labels in {folder} {damage}. Search again to write them anew.")


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

    @property
    def are_verified(self) -> bool:
        """Whether all that is named is there and as it was written; this reads all of it."""
        return all(find_damage(folder) is None for folder in self if folder is not None)

    def read_labels(self) -> ValidationLabels:
        return read_labels(features=self.features, pictures=self.pictures)
