"""The stages of a search, one after the other: what their trials train on, then the trials."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.errors import DataError
from visiontuner.journal import Finding, read_events
from visiontuner.workflow.background import beside
from visiontuner.workflow.inputs import Inputs
from visiontuner.workflow.observing import note_findings
from visiontuner.workflow.validation import ValidationAnswers

if TYPE_CHECKING:
    from visiontuner.data.picture_store import PictureStore
    from visiontuner.model.features import FeatureSet
    from visiontuner.search.cluster import RayForSearch
    from visiontuner.search.labels import Stores
    from visiontuner.search.plan import Plan
    from visiontuner.search.recorder import Recorder
    from visiontuner.search.run import SearchState
    from visiontuner.search.stages import Stage


class StageRunner:
    """Runs what a search's journal does not hold yet."""

    def __init__(self, inputs: Inputs, folder: Path, recorder: Recorder, ray: RayForSearch) -> None:
        self.inputs = inputs
        self.folder = folder
        self.recorder = recorder
        self.ray = ray
        self.observer = inputs.observer
        self._known_findings: set[str] = set()
        budget = inputs.experiment.search.time_budget
        self._deadline = None if budget is None else time.monotonic() + budget

    def run(self) -> SearchState:
        """All stages; the first one that does not complete is the last."""
        from visiontuner.search.stages import plan_stage, stages_of

        state: SearchState = "completed"
        for stage in stages_of(self.inputs.experiment):
            plan = plan_stage(stage, self.recorder.record)
            if plan.remaining:
                state = self._run_stage(stage, plan)
            if state != "completed":
                break
        return state

    def _run_stage(self, stage: Stage, plan: Plan) -> SearchState:
        # Ray's import and start fill one core for some seconds; the first part of the features,
        # writing the network as ONNX, the other.
        computing = beside(self.inputs.pictures if stage.on_pictures else self.inputs.features)
        from visiontuner.search.run import run_trials

        # Packaging needs the network: load it while Ray starts, which is mostly waiting. A mistake
        # in it shows there as well.
        beside(lambda: self.inputs.backbone)
        self.ray.start()
        stores = self._record(computing)
        if stage.name == "network":
            self._prepare_heads(plan, stores)
        record = self.recorder.record
        finished = sum(trial.finished for trial in record.trials.values())
        self.observer.note(describe_stage(stage, finished, plan.remaining))
        self.observer.trials_begin(record, finished + plan.remaining)
        try:
            return run_trials(
                self.folder,
                stage,
                self.recorder,
                stores=stores,
                cache=self.inputs.cache,
                time_budget=self._seconds_left(),
            )
        finally:
            self.observer.trials_end()

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.1, self._deadline - time.monotonic())

    # what trials train on

    def _record(self, computing: Future[Any]) -> Stores:
        from visiontuner.model.store import FeatureSet
        from visiontuner.search.labels import Stores

        store, seconds = computing.result()
        if isinstance(store, FeatureSet):
            self._record_features(store, seconds)
            return Stores(features=store.folder, pictures=None)
        self._record_pictures(store, seconds)
        return Stores(features=None, pictures=store.folder)

    def _record_features(self, features: FeatureSet, seconds: float) -> None:
        self.recorder.append(
            "features_ready",
            **self.inputs.facts(features.folder, features.computed, seconds),
            feature_dim=features.feature_dim,
            engine=features.engine,
        )
        if not features.computed:
            self.observer.note("Features: all in the cache, nothing to compute.")
        self._record_findings(features.findings)

    def _record_pictures(self, pictures: PictureStore, seconds: float) -> None:
        self.recorder.append(
            "pictures_ready",
            **self.inputs.facts(pictures.folder, pictures.computed, seconds),
            feature_dim=self.inputs.description.feature_dim,
        )
        if not pictures.computed:
            self.observer.note("Pictures: all decoded in the cache.")
        self._record_findings(pictures.findings)

    def _record_findings(self, findings: tuple[Finding, ...]) -> None:
        """Features and pictures are made of the same files: what is wrong with one is said once."""
        new = [finding for finding in findings if finding.evidence not in self._known_findings]
        self._known_findings |= {finding.evidence for finding in new}
        for finding in new:
            self.recorder.append("finding", **asdict(finding))
        note_findings(self.observer, new)

    # the second stage

    def _prepare_heads(self, plan: Plan, stores: Stores) -> None:
        """The heads that networks begin with: on the disk, and of the same pictures."""
        self._require_same_pictures(stores)
        record = self.recorder.record
        answers = ValidationAnswers(self.folder, record, self.inputs.experiment)
        for planned in plan.known:
            if planned.starts_from is None:
                continue
            said = answers.restore(record.trials[planned.starts_from])
            if said:
                self.observer.note(said)

    def _require_same_pictures(self, stores: Stores) -> None:
        """Logits of both stages are compared picture by picture."""
        import numpy as np

        from visiontuner.search.labels import Stores, read_labels

        features = Stores.of(read_events(self.folder).events).features
        try:
            heads = read_labels(features=features)
        except DataError:
            return  # gone from the cache: the digest of the data is the same
        if not np.array_equal(heads.labels, stores.read_labels().labels):
            raise DataError(
                "Other pictures can be read now than when the heads were trained. "
                "Bring the pictures back as they were, or start a new search."
            )


def describe_stage(stage: Stage, finished: int, remaining: int) -> str:
    """What is about to run, in one line."""
    search, model = stage.experiment.search, stage.experiment.model
    done = f"{finished} trials are finished, " if finished else ""
    if stage.name == "network":
        return (
            f"{done}{remaining} go on with the network (model.train: {model.train}) for "
            f"{stage.experiment.training.epochs} epochs."
        )
    names = " and ".join(name.replace("_", " ") for name in search.space)
    scheduler = "" if search.scheduler == "none" else f", {search.scheduler} stops the weak ones"
    return f"{done}{remaining} trials over {names} to run ({search.algorithm}{scheduler})."
