"""What trials train on, as the journal names it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from visiontuner.data.dataset import find_emptied_classes
from visiontuner.journal import Finding
from visiontuner.workflow.inputs import Inputs
from visiontuner.workflow.observing import note_findings

if TYPE_CHECKING:
    from visiontuner.data.picture_store import PictureStore
    from visiontuner.model.features import FeatureSet
    from visiontuner.search.labels import Stores
    from visiontuner.search.recorder import Recorder


class StoreRecorder:
    """Writes what features and decoded pictures are ready, and what is wrong with some."""

    def __init__(self, inputs: Inputs, recorder: Recorder) -> None:
        self._inputs = inputs
        self._recorder = recorder
        self._known_findings: set[str] = set()

    def record(self, store: FeatureSet | PictureStore, seconds: float) -> Stores:
        """Either kind; `seconds` is how long it took to get it."""
        from visiontuner.model.store import FeatureSet
        from visiontuner.search.labels import Stores

        self._record_emptied_classes(store)
        if isinstance(store, FeatureSet):
            self._record_features(store, seconds)
            return Stores(features=store.folder, pictures=None)
        self._record_pictures(store, seconds)
        return Stores(features=None, pictures=store.folder)

    def record_findings(self, findings: Iterable[Finding]) -> None:
        """Features and pictures are made of the same files: what is wrong with one is said once."""
        new = [finding for finding in findings if finding.evidence not in self._known_findings]
        self._known_findings |= {finding.evidence for finding in new}
        for finding in new:
            self._recorder.append("finding", **finding.to_dict())
        note_findings(self._inputs.observer, new)

    def _record_emptied_classes(self, store: FeatureSet | PictureStore) -> None:
        """Before the unreadable pictures themselves, which may be many."""
        readable = {name: store.split(name).labels.tolist() for name in ("train", "validation")}
        self.record_findings(find_emptied_classes(self._inputs.dataset, readable))

    def _record_features(self, features: FeatureSet, seconds: float) -> None:
        self._recorder.append(
            "features_ready",
            **self._inputs.facts(features.folder, features.computed, seconds),
            feature_dim=features.feature_dim,
            engine=features.engine,
        )
        if not features.computed:
            self._inputs.observer.note("Features: all in the cache, nothing to compute.")
        self.record_findings(features.findings)

    def _record_pictures(self, pictures: PictureStore, seconds: float) -> None:
        self._recorder.append(
            "pictures_ready",
            **self._inputs.facts(pictures.folder, pictures.computed, seconds),
            feature_dim=self._inputs.description.feature_dim,
        )
        if not pictures.computed:
            self._inputs.observer.note("Pictures: all decoded in the cache.")
        self.record_findings(pictures.findings)
