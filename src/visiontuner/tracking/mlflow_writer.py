"""The journal of a search -> MLflow: one parent run, one child run a trial.

The writer compares what the journal says (`plan.py`) with what it knows MLflow to hold and writes
the difference. It can do so late, again, elsewhere, or after a kill at any moment, because

- runs are created together with the tags they are found by, and looked for before they are created;
- MLflow stores a point with the same key, time, step and value once, and these are the journal's;
- a run gets its final status last, so that one that has it needs nothing more.

`mlflow.json` in the search folder tells people and other commands where the runs are. The writer
itself reads nothing from it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from visiontuner.commands import next_command
from visiontuner.data.files import temporary_folder
from visiontuner.errors import TrackingError
from visiontuner.journal import read_events
from visiontuner.layout import MLFLOW_FILE
from visiontuner.text import without_secrets
from visiontuner.tracking import runs
from visiontuner.tracking.client import Store
from visiontuner.tracking.plan import (
    KIND,
    SEARCH_ID,
    STATE,
    TRIAL_ID,
    Point,
    ProjectRun,
    SearchPlan,
    Status,
    TrialPlan,
)
from visiontuner.tracking.recordings import points_of
from visiontuner.tracking.run_files import RunFiles
from visiontuner.training.recording.records import find_recording

LOCK_FILE = "mlflow.lock"

_PARENT = "mlflow.parentRunId"
_NAME = "mlflow.runName"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one `catch_up` did.

    `complete`: the search is over, and all of its journal is in MLflow.
    """

    events: int
    complete: bool


@dataclass(kw_only=True)
class _Held:
    """What MLflow is known to hold of one run."""

    run_id: str
    status: str
    tags: dict[str, str]
    points: int = 0
    params: bool = False


class MlflowWriter:
    """Writes one search folder into one MLflow store.

    Args:
        folder: the search folder.
        tracking_uri: where to write.
        experiment_name: the MLflow experiment of a new parent run; the name in the search's
            experiment file if None. An adopted parent run stays in its own.
        project_run: the run that `mlflow run` opened, to adopt as the parent if it is one
            (`runs.why_not_adopted`). Its name and its final status stay MLflow's.
        draw: False leaves the figures and the search's page out.
        live: beside a search that runs: an MLflow that does not answer at once is asked again soon.
        templates: of new databases, see `client.create_database`.
        notice: called with the reason why `project_run` is left alone.

    `seconds_spent` counts everything that `catch_up` took but figures and page, `seconds_figures`
    these.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tracking_uri: str,
        experiment_name: str | None = None,
        project_run: ProjectRun | None = None,
        draw: bool = True,
        live: bool = False,
        templates: Path | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder
        later = f"The journal keeps everything; `{next_command('sync', folder)}` writes it later."
        self.store = Store(tracking_uri, advice=later, live=live, templates=templates)
        self.plan = SearchPlan()
        self.seconds_spent = 0.0
        self.seconds_figures = 0.0
        self.experiment_id: str | None = None
        self._experiment_name = experiment_name
        self._project_run = project_run  # until it is looked at
        self._adopted: ProjectRun | None = None
        self._notice = notice or (lambda _: None)
        self._draw = draw
        self._figures_until = math.inf  # of `seconds_figures`
        self._files = RunFiles(folder)
        self._offset = 0
        self._parent: _Held | None = None
        self._trials: dict[str, _Held] = {}
        self._found = False
        self._lock: int | None = None
        self._memory = ""

    @property
    def parent_run_id(self) -> str | None:
        """The parent run, once it is known."""
        return self._parent.run_id if self._parent else None

    @property
    def run_ids(self) -> dict[str, str]:
        """The known runs by trial id."""
        return {trial_id: held.run_id for trial_id, held in self._trials.items()}

    def catch_up(
        self,
        *,
        search_is_over: bool = False,
        deadline: float | None = None,
        figure_seconds: float = math.inf,
    ) -> Progress:
        """Write everything the journal has and MLflow has not. Repeating it changes nothing.

        Args:
            search_is_over: nobody runs this search any more: trials that the journal shows as
                running were interrupted.
            deadline: of `time.monotonic`; no call to MLflow starts after it.
            figure_seconds: while the search runs, once figures took that long, those that are
                left wait for a later call, and the final status of their runs with them.

        Raises:
            JournalError: the folder has no readable journal.
            TrackingRefused: MLflow says no: deleted run or experiment, credentials, schema.
            TrackingError: MLflow is away, the deadline has passed, or another process is writing
                this search. Nothing is lost: the next call goes on from there.
        """
        began, drawn = time.monotonic(), self.seconds_figures
        self.store.deadline = deadline
        self._figures_until = drawn + figure_seconds
        try:
            self._take_lock()
            events = self._read()
            if search_is_over:
                self.plan.interrupt_running()
            if not self.plan.started:
                return Progress(events=events, complete=False)
            self._write()
            return Progress(events=events, complete=self.plan.over)
        except BaseException:
            # The server may have done what it could not answer: look again before creating.
            self._found = False
            raise
        finally:
            self._remember()
            self.seconds_spent += time.monotonic() - began - (self.seconds_figures - drawn)

    def close(self) -> None:
        """Let other processes write this search."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> MlflowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> int:
        read = read_events(self.folder, self._offset)
        for event in read.events:
            self.plan.apply(event)
        self._offset = read.offset
        return len(read.events)

    def _write(self) -> None:
        if not self._found:
            self._find_runs()
            self._look_at_project_run()
            self._note_a_second_adoption()
            self._found = True
        if self._parent is None:
            self._parent = self._open_parent()
        if not self._parent.params:
            self._describe(self._parent)
        for trial in self.plan.trials.values():
            self._write_trial(trial)
        self._write_parent(self._parent)

    # Finding and opening runs

    def _find_runs(self) -> None:
        """Learn what MLflow holds of this search, in whichever experiment it lies."""
        self._parent, self._trials = None, {}
        found = runs.search_runs(self.store, self.plan.search_id)
        for run in sorted(found, key=lambda r: (r.info.start_time, r.info.run_id)):
            kind, trial_id = run.data.tags.get(KIND), run.data.tags.get(TRIAL_ID)
            if kind == "search" and self._parent is None:
                runs.refuse_deleted(run, "parent run")
                self._parent = self._held_parent(run)
                self.experiment_id = run.info.experiment_id
            elif kind == "trial" and trial_id in self.plan.trials and trial_id not in self._trials:
                runs.refuse_deleted(run, f"run of trial {trial_id}")
                self._trials[trial_id] = _held_trial(run, self.plan.trials[trial_id])

    def _look_at_project_run(self) -> None:
        """Adopt the run of `mlflow run`, or say why not; decided once."""
        project = self._project_run
        if project is None:
            return
        why_not = runs.why_not_adopted(self.store, project, self.plan.search_id)
        if why_not is None:
            self._adopted = project
        else:
            self._notice(
                f"warning: the run of MLFLOW_RUN_ID, {project.run_id}, is left as it is: "
                f"{why_not}. This search has a run of its own."
            )
        self._project_run = None

    def _held_parent(self, run: Run) -> _Held:
        plan = self.plan
        finished = run.data.metrics.get("trials_finished", 0)
        complete = run.data.tags.get(STATE) == plan.state and finished == len(plan.finished)
        return _Held(
            run_id=run.info.run_id,
            status=run.info.status,
            tags=dict(run.data.tags),
            points=len(plan.points) if complete and plan.over else 0,
            params=set(plan.params()) <= set(run.data.params),
        )

    def _open_parent(self) -> _Held:
        tags = {KIND: "search", SEARCH_ID: self.plan.search_id}
        if self._adopted is not None:
            self.experiment_id = self._adopted.experiment_id
            self._log_batch(self._adopted.run_id, tags=tags)
            return _Held(run_id=self._adopted.run_id, status="RUNNING", tags=tags)
        self.experiment_id = self._open_experiment()
        return self._create_run(self.plan.name, self.plan.started["time"] * 1000, tags)

    def _open_experiment(self) -> str:
        name = self._experiment_name or self.plan.experiment().name
        experiment = self.store.call("get_experiment_by_name", name)
        if experiment is None:
            # MLflow's page then opens with its tables for training, not for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.store.call("create_experiment", name, tags=kind))
        if experiment.lifecycle_stage == "deleted":
            raise runs.deleted_experiment(name, experiment.experiment_id)
        return str(experiment.experiment_id)

    def _create_run(self, name: str, started: float, tags: Mapping[str, str]) -> _Held:
        run = self.store.call(
            "create_run",
            self.experiment_id,
            start_time=round(started),
            tags={**tags, _NAME: name},
            run_name=name,
        )
        return _Held(run_id=run.info.run_id, status="RUNNING", tags=dict(tags))

    def _note_a_second_adoption(self) -> None:
        """A search resumed under `mlflow run` keeps its first parent; the new run says so."""
        if self._adopted is None or self._parent is None or self._is_adopted(self._parent):
            return
        note = f"Continues the search in run {self._parent.run_id}."
        self._log_batch(
            self._adopted.run_id,
            tags={KIND: "resume", SEARCH_ID: self.plan.search_id, "mlflow.note.content": note},
        )

    def _is_adopted(self, parent: _Held) -> bool:
        return self._adopted is not None and self._adopted.run_id == parent.run_id

    # Writing

    def _describe(self, parent: _Held) -> None:
        """What the search is; the parameters come last and mark it as done."""
        run_id, data = parent.run_id, self.plan.started.get("data") or {}
        self.store.call("log_text", run_id, self.plan.experiment().to_yaml(), "experiment.yaml")
        if data.get("digest"):
            self.store.call("log_inputs", run_id, datasets=[runs.dataset_input(data)])
        # Any other state is the last thing that a search's run gets.
        tags = {**self.plan.tags(), STATE: "running"}
        self._log_batch(run_id, params=self.plan.params(), tags=tags)
        parent.params = True
        parent.tags.update(tags)

    def _write_trial(self, trial: TrialPlan) -> None:
        held = self._trials.get(trial.trial_id)
        tags = trial.tags()
        if held is None:
            parents = {_PARENT: self.parent_run_id or ""}
            held = self._create_run(trial.trial_id, trial.started, {**tags, **parents})
            self._trials[trial.trial_id] = held
        if trial.status == "RUNNING" and held.status != "RUNNING":
            self._set_status(held, "RUNNING")
        changed = _changed(tags, held.tags)
        if held.points < len(trial.points) or not held.params or changed:
            params = {} if held.params else trial.params()
            self._log_batch(held.run_id, trial.points[held.points :], params, changed)
            held.points, held.params = len(trial.points), True
            held.tags.update(tags)
        may_end = self.plan.over or self.seconds_figures < self._figures_until
        if held.status != trial.status and may_end:
            folder = self.folder / "trials" / trial.trial_id
            recording = find_recording(folder)
            if recording is not None:
                epoch, time = max(trial.steps, default=0), trial.ended or trial.last_seen
                self._log_batch(held.run_id, points_of(recording, time=time, epoch=epoch))
            self._log_files(held.run_id, lambda: self._files.of_trial(self.plan, trial, recording))
            self._set_status(held, trial.status, trial.ended)

    def _write_parent(self, parent: _Held) -> None:
        """The search's own curve; once it is over its figures, status and, last, its state."""
        tags = self.plan.tags()
        state = tags.pop(STATE)
        best = self._trials.get(tags.get("visiontuner.best_trial", ""))
        if best is not None:
            tags["visiontuner.best_run_id"] = best.run_id
        points, changed = self.plan.points[parent.points :], _changed(tags, parent.tags)
        if points or changed:
            self._log_batch(parent.run_id, points, tags=changed)
            parent.points = len(self.plan.points)
            parent.tags.update(changed)
        if parent.tags.get(STATE) != state:
            if self.plan.over:
                self._log_files(
                    parent.run_id, lambda: self._files.of_search(self.plan, self._known_places())
                )
            self._log_batch(parent.run_id, tags={STATE: state})
            parent.tags[STATE] = state
        if parent.status != self.plan.status and not self._is_adopted(parent):
            self._set_status(parent, self.plan.status, self.plan.last_seen)

    def _log_batch(
        self,
        run_id: str,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        runs.log_batch(self.store, run_id, points, params or {}, tags or {})

    def _set_status(self, held: _Held, status: Status, ended: int | None = None) -> None:
        if status == "RUNNING":
            self.store.call("update_run", held.run_id, status=status)
        else:
            self.store.call("set_terminated", held.run_id, status=status, end_time=ended)
        held.status = status

    # Figures and the page

    def _log_files(self, run_id: str, make: Callable[[], dict[str, bytes]]) -> None:
        if not self._draw:
            return
        began = time.monotonic()
        try:
            with temporary_folder() as folder:
                files = make()
                for name, content in files.items():
                    path = folder / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(content)
                if files:
                    self.store.call("log_artifacts", run_id, folder)
        finally:
            self.seconds_figures += time.monotonic() - began

    # The folder

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise TrackingError(
                f"Another process is writing {self.folder} to MLflow; wait until it is done."
            ) from None
        self._lock = descriptor

    def _remember(self) -> None:
        """Keep `mlflow.json` up to date; a password in the URI stays out of it."""
        if self._parent is None:
            return
        text = json.dumps({**self._known_places(), "offset": self._offset}, indent=1) + "\n"
        if text != self._memory:
            path = self.folder / MLFLOW_FILE
            fresh = path.with_suffix(".new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
            self._memory = text

    def _known_places(self) -> dict[str, Any]:
        return {
            "tracking_uri": without_secrets(self.store.tracking_uri),
            "experiment_id": self.experiment_id,
            "parent_run_id": self.parent_run_id,
            "runs": self.run_ids,
        }


def _held_trial(run: Run, trial: TrialPlan) -> _Held:
    tags = dict(run.data.tags)
    # The final status is written last and the tags count attempts and epochs, so that a run
    # which has both right is complete. Any other is written again: MLflow drops what it has.
    complete = (
        trial.status != "RUNNING"
        and run.info.status == trial.status
        and not _changed(trial.tags(), tags)
    )
    return _Held(
        run_id=run.info.run_id,
        # A run with the right status may still miss its figure: end it again.
        status=run.info.status if complete or run.info.status == "RUNNING" else "",
        tags=tags,
        points=len(trial.points) if complete else 0,
        params=set(trial.params()) <= set(run.data.params),
    )


def _changed(wanted: Mapping[str, str], held: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in wanted.items() if held.get(key) != value}
