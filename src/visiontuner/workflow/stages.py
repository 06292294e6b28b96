"""The stages of a search, one after the other: what their trials train on, then the trials."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner import interrupts
from visiontuner.commands import next_command
from visiontuner.errors import DataError, SearchFailed
from visiontuner.journal import read_events
from visiontuner.workflow.inputs import Inputs
from visiontuner.workflow.stores import StoreRecorder
from visiontuner.workflow.validation import ValidationAnswers

if TYPE_CHECKING:
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
        self._stores = StoreRecorder(inputs, recorder)
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
        from visiontuner.search.cluster import describe_cluster

        if self.ray.joins and not self.inputs.on_cluster:
            self._start_ray()
            self.inputs.on_cluster = True
            self.observer.note(describe_cluster())
        # Ray's import and start fill one core for some seconds; the first part of the features,
        # writing the network as ONNX, the other.
        computing = self.inputs.beside(lambda: self.inputs.store(on_pictures=stage.on_pictures))
        # Packaging needs the network: load it while Ray starts, which is mostly waiting. A
        # mistake in it shows there as well.
        self.inputs.beside(lambda: self.inputs.backbone)
        try:
            self._start_ray()
            computed = interrupts.result(computing)
        except BaseException:  # a Ctrl-C, or a Ray that does not start
            self.inputs.stop()
            raise
        from visiontuner.search.run import run_trials

        stores = self._stores.record(*computed)
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

    def _start_ray(self) -> None:
        try:
            self.ray.start()
        except SearchFailed as error:
            on = ["--on", "auto"] if self.ray.joins else []
            command = next_command("tune", *on, "--resume", self.folder)
            raise SearchFailed(f"{error} Then go on with: {command}") from error

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.1, self._deadline - time.monotonic())

    # the second stage

    def _prepare_heads(self, plan: Plan, stores: Stores) -> None:
        """The heads that networks begin with: on the disk, and of the same pictures."""
        self._require_same_pictures(stores)
        record = self.recorder.record
        answers = ValidationAnswers(self.folder, record, self.inputs.experiment, inputs=self.inputs)
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
    how = "grid: every combination" if search.algorithm == "grid" else search.algorithm
    return f"{done}{remaining} trials over {names} to run ({how}{scheduler})."
