"""The journal of a search -> MLflow: one parent run, one child run a trial."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow.entities import Run

from visiontuner.diagnostics.history import Recording, find_recording
from visiontuner.errors import DataError, JournalError, TrackingError
from visiontuner.evaluation.report import image_count
from visiontuner.io.files import temporary_folder
from visiontuner.journal import read_events
from visiontuner.paths import EVALUATION_FOLDER, EVALUATION_REPORT, MLFLOW_FILE
from visiontuner.text import next_command, without_secrets
from visiontuner.tracking import store as runs
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.recording import files_of, points_of
from visiontuner.tracking.figures.searches import search_figures, search_numbers, trial_curves
from visiontuner.tracking.page import write_page
from visiontuner.tracking.run_plans import (
    KIND,
    SEARCH_ID,
    STATE,
    STATUS_OF,
    TRIAL_ID,
    Point,
    ProjectRun,
    SearchPlan,
    Status,
    TrialPlan,
)
from visiontuner.tracking.store import OutOfTime, Store, TrackingRefused, explain, log_batch
from visiontuner.tracking.view import (
    VIEW_TAG,
    describe_search,
    describe_trial,
    described,
    shared_view,
)

# What a run gets besides numbers: figures, the numbers behind them, recordings, the search's page.
#
# matplotlib is imported with the first.


class RunFiles:
    """The files of one search's runs, content by path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._curves: Figure | None = None  # the last trial's, to draw the next one's into

    def of_trial(
        self, plan: SearchPlan, trial: TrialPlan, recording: Recording | None
    ) -> dict[str, bytes]:
        """A trial's curves, and the figures of what was recorded of it."""

        record, files = plan.record.named(trial.trial_id), dict[str, bytes]()
        if record is not None and record.epochs and trial.has_curves:
            into, self._curves = self._curves, None
            curves = trial_curves(record, into=into)
            files["figures/curves.png"] = to_png(curves)
            self._curves = curves
        if recording is not None:
            files |= files_of(self._folder / "trials" / trial.trial_id, recording)
        return files

    def of_search(self, plan: SearchPlan, places: Mapping[str, Any]) -> dict[str, bytes]:
        """The search's figures, the numbers behind them, and the page that shows it all.

        Args:
            places: where its runs are.
        """

        drawn = {n: to_png(f) for n, f in search_figures(plan.record).items()}
        page = write_page(self._folder, figures=drawn, state=plan.state, where=places)
        numbers = search_numbers(plan.record)
        return {
            **{f"figures/{name}.png": png for name, png in drawn.items()},
            **{f"figures/{name}": text.encode() for name, text in numbers.items()},
            page.name: page.read_bytes(),
        }


# The journal of a search -> MLflow: one parent run, one child run a trial.
#
# The writer compares what the journal says (`plan.py`) with what it knows MLflow to hold and
# writes the difference. It can do so late, again, elsewhere, or after a kill at any moment,
# because
#
# - runs are created together with the tags they are found by, and looked for first;
# - MLflow stores a point with the same key, time, step and value once: the journal's;
# - a run gets its final status last, so that one that has it needs nothing more;
# - a run whose artifacts MLflow did not take says so by a tag, and gets them another time: numbers,
#   which come first, never wait for artifacts.
#
# `mlflow.json` in the search folder tells people and other commands where the runs are. The writer
# itself reads nothing from it.


LOCK_FILE = "mlflow.lock"

MISSING_ARTIFACTS = "visiontuner.missing_artifacts"
"""On a run whose artifacts MLflow did not take: why. A later `sync` writes them and removes it."""

_PARENT = "mlflow.parentRunId"
_NAME = "mlflow.runName"
_EXPERIMENT_FILE = "experiment.yaml"
_MOST_FAILURES = 3  # in a row, before the rest of the artifacts is left for later
_REASON_LENGTH = 500
_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one `catch_up` did.

    `complete`: the search is over, and all of its journal is in MLflow; the artifacts too, unless
    `problem` says why not.
    """

    events: int
    complete: bool
    problem: str | None = None


@dataclass(kw_only=True)
class _Held:
    """What MLflow is known to hold of one run.

    `recorded`: the points of its recording; `described`: its experiment file was sent, perhaps in
    vain; `missing`: it lacks artifacts, and says so.
    """

    run_id: str
    status: str
    tags: dict[str, str]
    points: int = 0
    params: bool = False
    recorded: bool = False
    described: bool = False
    missing: bool = False


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
        self._shared = False
        self._report: dict[str, Any] | None = None
        self._failures = 0  # artifacts in a row
        self._artifact_problem: TrackingError | None = None
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
        progress: Callable[[int, int], None] | None = None,
    ) -> Progress:
        """Write everything the journal has and MLflow has not. Repeating it changes nothing.

        Args:
            search_is_over: nobody runs this search any more: trials that the journal shows as
                running were interrupted.
            deadline: of `time.monotonic`; no call to MLflow starts after it.
            figure_seconds: while the search runs, once figures took that long, those that are
                left wait for a later call, and the final status of their runs with them.
            progress: called every second with how many of how many trials are written.

        Raises:
            JournalError: the folder has no readable journal.
            TrackingRefused: MLflow says no: deleted run or experiment, credentials, schema.
            TrackingError: MLflow is away, the deadline has passed, or another process is writing
                this search. Nothing is lost: the next call goes on from there.
        """
        began, drawn = time.monotonic(), self.seconds_figures
        self.store.deadline = deadline
        self._figures_until = drawn + figure_seconds
        self._failures, self._artifact_problem = 0, None
        try:
            self._take_lock()
            events = self._read()
            if search_is_over:
                self.plan.interrupt_running()
            if not self.plan.started:
                return Progress(events=events, complete=False)
            self._write(_every_second(progress))
            problem = self._missing()
            return Progress(events=events, complete=self.plan.over and not problem, problem=problem)
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

    def _write(self, progress: Callable[[int, int], None]) -> None:
        if not self._found:
            self._find_runs()
            self._look_at_project_run()
            self._note_a_second_adoption()
            self._found = True
        if self._parent is None:
            self._parent = self._open_parent()
        if not self._parent.params:
            self._describe(self._parent)
        self._share_view()
        self._report = self._read_report()
        trials = list(self.plan.trials.values())
        for done, trial in enumerate(trials, start=1):
            self._write_numbers(trial)
            progress(done // 2, len(trials))
        self._write_search_numbers(self._parent)
        self._send_experiment(self._parent)
        for done, trial in enumerate(trials, start=1):
            self._end_trial(trial)
            progress((len(trials) + done) // 2, len(trials))
        self._end_search(self._parent)

    def _missing(self) -> str | None:
        """Which artifacts MLflow did not take, and why, for a person."""
        held = [*self._trials.values(), *filter(None, [self._parent])]
        count = sum(one.missing for one in held)
        if self._artifact_problem is None or not count:
            return None
        runs_ = "1 run" if count == 1 else f"{count} runs"
        return (
            f"All numbers are in MLflow, but not the artifacts of {runs_}. {self._artifact_problem}"
        )

    def _share_view(self) -> None:
        """Columns, order and charts of the experiment's page, once; that of the newest search."""
        if self._shared:
            return
        experiment = self.plan.experiment()
        view = shared_view(self.plan.record.objective, experiment.search.space)
        with suppress(TrackingRefused):  # who may write runs may perhaps not write here
            self.store.call("set_experiment_tag", self.experiment_id, VIEW_TAG, view)
        self._shared = True

    def _read_report(self) -> dict[str, Any] | None:
        """What the evaluation in the folder says, once the search is over."""
        folder = self.folder / EVALUATION_FOLDER
        if self.plan.over and (folder / EVALUATION_REPORT).is_file():
            with suppress(DataError):
                return read_evaluation(folder).report
        return None

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
            elif kind not in ("trial", "baseline") or trial_id in self._trials:
                continue
            elif trial_id in self.plan.trials:
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
            described=True,  # and once more with the search's other files
            missing=MISSING_ARTIFACTS in run.data.tags,
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
            tags={**self._origin(), **tags, _NAME: name},
            run_name=name,
        )
        return _Held(run_id=run.info.run_id, status="RUNNING", tags=dict(tags))

    def _origin(self) -> dict[str, str]:
        """User and source, under the names by which MLflow's pages show them."""
        commit = self.plan.tags().get("visiontuner.code_commit")
        command = "train" if self.plan.record.is_training else "tune"
        origin = {
            "mlflow.source.name": f"visiontuner {command}",
            "mlflow.source.type": "LOCAL",
            **({"mlflow.source.git.commit": commit} if commit else {}),
        }
        with suppress(OSError, KeyError, ImportError):  # a container's user without a name
            origin["mlflow.user"] = getpass.getuser()
        return origin

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
        if data.get("digest"):
            self.store.call("log_inputs", run_id, datasets=[runs.dataset_input(data)])
        # Any other state is the last thing that a search's run gets.
        tags = {**self.plan.tags(), STATE: "running"}
        self._log_batch(run_id, params=self.plan.params(), tags=tags)
        parent.params = True
        parent.tags.update(tags)

    def _write_numbers(self, trial: TrialPlan) -> None:
        """A trial's run with everything that is no artifact, but its final status."""
        held = self._trials.get(trial.trial_id)
        tags = trial.tags()
        if held is None:
            parents = {_PARENT: self.parent_run_id or ""}
            held = self._create_run(trial.trial_id, trial.started, {**tags, **parents})
            self._trials[trial.trial_id] = held
        if trial.status == "RUNNING" and held.status != "RUNNING":
            self._set_status(held, "RUNNING")
            held.recorded = False
        if trial.state != "running":
            own = (self._report or {}).get("trial_id") == trial.trial_id
            text = describe_trial(self.plan.record, trial.trial_id, self._report if own else None)
            tags |= described(text, held.tags)
        changed = _changed(tags, held.tags)
        if held.points < len(trial.points) or not held.params or changed:
            params = {} if held.params else trial.params()
            self._log_batch(held.run_id, trial.points[held.points :], params, changed)
            held.points, held.params = len(trial.points), True
            held.tags.update(tags)
        if held.status != trial.status and not held.recorded:
            recording = find_recording(self._folder_of(trial))
            if recording is not None:
                epoch, time = max(trial.steps, default=0), trial.ended or trial.last_seen
                self._log_batch(held.run_id, points_of(recording, time=time, epoch=epoch))
            held.recorded = True

    def _end_trial(self, trial: TrialPlan) -> None:
        """The artifacts of a trial that has ended, then its final status."""
        held = self._trials[trial.trial_id]
        may_end = self.plan.over or self.seconds_figures < self._figures_until
        again = held.missing and self.plan.over
        if not may_end or (held.status == trial.status and not again):
            return

        def files() -> dict[str, bytes]:
            return self._files.of_trial(self.plan, trial, find_recording(self._folder_of(trial)))

        if self._draw:
            self._log_files(held, files)
        if held.status != trial.status:
            self._set_status(held, trial.status, trial.ended)

    def _write_search_numbers(self, parent: _Held) -> None:
        """The search's own curve, and what came out; all but its state."""
        tags = self.plan.tags()
        del tags[STATE]
        best = self._trials.get(tags.get("visiontuner.best_trial", ""))
        if best is not None:
            tags["visiontuner.best_run_id"] = best.run_id
        if self.plan.over:
            text = describe_search(self.plan.record, self.folder, self._report)
            tags |= described(text, parent.tags)
        points, changed = self.plan.points[parent.points :], _changed(tags, parent.tags)
        if points or changed:
            self._log_batch(parent.run_id, points, tags=changed)
            parent.points = len(self.plan.points)
            parent.tags.update(changed)

    def _send_experiment(self, parent: _Held) -> None:
        """The experiment file, while the search runs; at its end it comes with the other files."""
        if parent.described or self.plan.over:
            return
        parent.described = True
        with self._without_artifact():
            text = self.plan.experiment().to_yaml()
            self.store.call("log_text", parent.run_id, text, _EXPERIMENT_FILE)

    def _end_search(self, parent: _Held) -> None:
        """Once the search is over its files, its state and its status."""
        state = self.plan.state
        if parent.tags.get(STATE) != state or (parent.missing and self.plan.over):
            if self.plan.over:
                self._log_files(parent, self._search_files)
            self._log_batch(parent.run_id, tags={STATE: state})
            parent.tags[STATE] = state
        if parent.status != self.plan.status and not self._is_adopted(parent):
            self._set_status(parent, self.plan.status, self.plan.last_seen)

    def _search_files(self) -> dict[str, bytes]:
        files = {_EXPERIMENT_FILE: self.plan.experiment().to_yaml().encode()}
        if self._draw:
            files |= self._files.of_search(self.plan, self._known_places())
        return files

    def _folder_of(self, trial: TrialPlan) -> Path:
        return self.folder / "trials" / trial.trial_id

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

    def _log_files(self, held: _Held, make: Callable[[], dict[str, bytes]]) -> None:
        """A run's files; one that MLflow does not take leaves a tag and no error."""
        began = time.monotonic()
        failures = self._failures
        with self._without_artifact(), temporary_folder() as folder:
            if failures < _MOST_FAILURES:
                files = make()
                for name, content in files.items():
                    path = folder / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(content)
                if files:
                    self.store.call("log_artifacts", held.run_id, str(folder))
                self._failures = 0
        self.seconds_figures += time.monotonic() - began
        failed = self._failures > failures or failures >= _MOST_FAILURES
        if failed:
            reason = str(self._artifact_problem)[:_REASON_LENGTH]
            self._log_batch(held.run_id, tags={MISSING_ARTIFACTS: reason})
        elif held.missing:
            self.store.call("delete_tag", held.run_id, MISSING_ARTIFACTS)
        held.missing = failed

    @contextmanager
    def _without_artifact(self) -> Iterator[None]:
        """Go on without an artifact that cannot be made or stored."""
        try:
            yield
        except OutOfTime:
            raise
        except TrackingError as error:
            self._failures, self._artifact_problem = self._failures + 1, error
        except OSError as error:  # no room for it here
            problem = explain(error, self.store.tracking_uri)
            self._failures, self._artifact_problem = self._failures + 1, problem

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
        and MISSING_ARTIFACTS not in tags
    )
    return _Held(
        run_id=run.info.run_id,
        # A run with the right status may still miss its figure: end it again.
        status=run.info.status if complete or run.info.status == "RUNNING" else "",
        tags=tags,
        points=len(trial.points) if complete else 0,
        params=set(trial.params()) <= set(run.data.params),
        missing=MISSING_ARTIFACTS in tags,
    )


def _every_second(tell: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
    """Passes on one call a second, from the first second's end on: what is short needs no bar."""
    told = time.monotonic()

    def tell_sometimes(done: int, total: int) -> None:
        nonlocal told
        if tell is not None and time.monotonic() - told >= _PROGRESS_SECONDS:
            told = time.monotonic()
            tell(done, total)

    return tell_sometimes


def _changed(wanted: Mapping[str, str], held: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in wanted.items() if held.get(key) != value}


# Keep MLflow up to date with a running search, from a thread.


_LONGEST_PAUSE = 30.0
_FIGURES_SHARE = 0.1
_SILENT_SECONDS = 10.0  # at the end, for a server that never answered
_LAST_PAUSE = 2.0  # between tries at the end
_LOOK_SECONDS = 0.2  # at whether the thread has ended


class WriterThread:
    """Calls `writer.catch_up` every few seconds until it is closed; survives MLflow's outages.

    After a call that took long it waits longer, so that writing stays below `share` of the time,
    and figures that take more than a tenth of the time wait for the search's end. While MLflow is
    away it asks less and less often, at last every 30 seconds.

    Args:
        interval_seconds: shortest time between two calls.
        share: of the time that may be spent on writing; figures have a share of their own.
        notice: called once with the message when MLflow goes away, once when it is back, once when
            `close` waits for it, and once when it takes no artifacts.
        progress: called, once `close` was, with how many of how many trials are written.

    `problem` holds the message of the last failure until MLflow answers again.
    """

    def __init__(
        self,
        writer: MlflowWriter,
        *,
        interval_seconds: float = 2.0,
        share: float = 0.25,
        notice: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.writer = writer
        self.problem: str | None = None
        self._interval = interval_seconds
        self._share = share
        self._notice = notice or (lambda _: None)
        self._progress = progress
        self._closing = threading.Event()
        self._deadline = math.inf
        self._told_of_artifacts = False
        self._answered = False
        self._away = False
        self._written = False
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def seconds_spent(self) -> float:
        """Time in `catch_up` without the figures."""
        return self.writer.seconds_spent

    @property
    def seconds_figures(self) -> float:
        return self.writer.seconds_figures

    def close(self, timeout: float = 30.0, *, hard: bool = False) -> bool:
        """Write what is left and end the thread.

        An MLflow that answers has all the time it takes; one that went away is waited for. One that
        never answered is asked once more, and has 10 seconds.

        Args:
            timeout: seconds without an answer after which the rest is left.
            hard: end within about `timeout` seconds even if MLflow answers.

        Returns:
            Whether everything the journal holds is in MLflow now; `problem` says why not.
        """
        if self.problem is not None and not self._answered:
            timeout = min(timeout, _SILENT_SECONDS)
        store = self.writer.store
        store.patience = None if hard else timeout
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        while self._thread.is_alive():
            if store.deadline is None:  # a call of before: it ends in time, too
                store.deadline = self._deadline
            # One call that began just before the deadline may wait MLflow's 3 seconds.
            if time.monotonic() > max(self._deadline, store.deadline) + 4:
                self.problem = self.problem or f"MLflow did not answer for {timeout:g} s."
                return False
            self._thread.join(_LOOK_SECONDS)
        return self._written

    def _run(self) -> None:
        pause, opened = self._interval, False
        while not self._closing.wait(pause):
            spent = self.writer.seconds_spent
            if self._catch_up(figure_seconds=_FIGURES_SHARE * pause):
                # The first call loads MLflow's store, seconds that say nothing about the next.
                busy = self.writer.seconds_spent - spent if opened else 0.0
                opened = True
                pause = min(_LONGEST_PAUSE, max(self._interval, busy * (1 / self._share - 1)))
            else:
                pause = min(_LONGEST_PAUSE, pause * 2)
        self._written = self._finish()
        self.writer.close()

    def _finish(self) -> bool:
        told = False
        while not self._catch_up(deadline=self._deadline):
            left = self._deadline - time.monotonic()
            if not (self._answered and self._away and left > _LAST_PAUSE):
                return False
            if not told:
                self._notice(f"Waiting up to {left:.0f} s for MLflow to come back.")
            told = True
            time.sleep(_LAST_PAUSE)
        return self.problem is None

    def _catch_up(self, *, deadline: float | None = None, figure_seconds: float = math.inf) -> bool:
        try:
            done = self.writer.catch_up(
                deadline=deadline, figure_seconds=figure_seconds, progress=self._tell_progress
            )
        except JournalError:
            return deadline is None  # the search has not begun to write yet
        except Exception as error:  # a thread that dies in silence would be worse
            if self.problem is None:
                self._notice(str(error))
            self.problem = str(error)
            # Waiting helps against nothing else.
            self._away = isinstance(error, TrackingError) and not isinstance(
                error, TrackingRefused | OutOfTime
            )
            return False
        self._answered = self._answered or self.writer.parent_run_id is not None
        if self.problem is not None:
            self._notice("MLflow is back; what was missed is written.")
        self.problem = None
        if done.problem is not None:
            if not self._told_of_artifacts:
                self._notice(done.problem)
            self._told_of_artifacts = True
            # While the search runs, its end is another chance.
            self.problem = done.problem if deadline is not None else None
        return True

    def _tell_progress(self, done: int, total: int) -> None:
        if self._progress is not None and self._closing.is_set():
            self._progress(done, total)


# An evaluation folder -> metrics, tags and artifacts on the run of the trial that it is about.


TEST_LOOKS = "visiontuner.test_looks"
TEST_SET = "visiontuner.test_set"
EVALUATION_DIGEST = "visiontuner.evaluation_digest"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a search folder holds of an evaluation.

    Args:
        digest: of report.json; by it a repetition is known.
        looks: how many times models of this name were evaluated on these test images.
        report: the whole of report.json.
    """

    folder: Path
    digest: str
    trial_id: str
    classifier_digest: str
    looks: int
    report: dict[str, Any]


def read_evaluation(folder: Path) -> Evaluation:
    """Read FOLDER/report.json.

    Raises:
        DataError: it is damaged.
    """
    try:
        content = (folder / EVALUATION_REPORT).read_bytes()
        report = json.loads(content)
        return Evaluation(
            folder=folder,
            digest=hashlib.sha256(content).hexdigest(),
            trial_id=str(report["trial_id"]),
            classifier_digest=str(report["classifier_digest"]),
            looks=int(report["looks"]),
            report=report,
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} is damaged ({type(error).__name__}). Evaluate again with "
            f"`{next_command('evaluate', folder.parent)}`."
        ) from None


def log_evaluation(store: Store, evaluation: Evaluation, *, run_id: str) -> None:
    """Write metrics with their intervals, every file of the folder, and the number of looks.

    Repeating it changes nothing: the digest is the last thing that is written.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    tags = store.call("get_run", run_id).data.tags
    if tags.get(EVALUATION_DIGEST) == evaluation.digest:
        return
    now = round(float(evaluation.report.get("time", time.time())) * 1000)
    points = [
        Point(key, value, now, max(1, evaluation.looks))
        for key, value in metrics(evaluation).items()
    ]
    # Numbers do not wait for files.
    log_batch(store, run_id, points, {}, _look(evaluation))
    store.call("log_artifacts", run_id, str(evaluation.folder), EVALUATION_FOLDER)
    store.call("set_tag", run_id, EVALUATION_DIGEST, evaluation.digest)


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """`test_NAME` with `_low` and `_high`, temperature and threshold, as MLflow gets them."""
    values: dict[str, float] = {"temperature": float(evaluation.report["temperature"])}
    intervals = dict(evaluation.report["metrics"])
    threshold = evaluation.report.get("threshold") or {}
    intervals["precision_above_threshold"] = threshold.get("precision")
    intervals["coverage_above_threshold"] = threshold.get("coverage")
    for name, interval in intervals.items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if interval and interval.get(part) is not None:
                values[f"test_{name}{suffix}"] = float(interval[part])
    if threshold.get("value") is not None:
        values["confidence_threshold"] = float(threshold["value"])
    return values


def version_tags(evaluation: Evaluation) -> dict[str, str]:
    """What a registered version says of its evaluation."""
    accuracy = (evaluation.report["metrics"].get("accuracy") or {}).get("value")
    tags = _look(evaluation)
    if accuracy is not None:
        tags |= {
            "visiontuner.evaluated": "true",
            "visiontuner.test_accuracy": f"{accuracy:.4f}",
            "visiontuner.test_images": str(image_count(evaluation.report)),
        }
    return tags


def version_description(evaluation: Evaluation) -> str | None:
    """`573 of 600 test images right (95.5 %, 93.8 to 97.0).`; None without test images."""
    accuracy, images = evaluation.report["metrics"].get("accuracy"), image_count(evaluation.report)
    if not accuracy or not images:
        return None
    value, low, high = (100 * accuracy[name] for name in ("value", "low", "high"))
    right = round(accuracy["value"] * images)
    return f"{right} of {images} test images right ({value:.1f} %, {low:.1f} to {high:.1f})."


def _look(evaluation: Evaluation) -> dict[str, str]:
    """Which test images were looked at, and how many times."""
    test_set = evaluation.report.get("test_set")
    known = {TEST_SET: str(test_set)} if test_set else {}
    return {TEST_LOOKS: str(evaluation.looks), **known}


# What a search cost, beside its runs in MLflow.


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds and US dollars of a search and of its trials; dollars None where no price is known.

    Attributes:
        time: when they were known, in milliseconds since the epoch.
        trial_seconds: training time by trial id.
        tags: where it ran, for the search's run.
    """

    time: int
    machine_seconds: float
    dollars: float | None
    trial_seconds: Mapping[str, float]
    trial_dollars: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def log_costs(store: Store, folder: Path, costs: Costs) -> None:
    """Write them as metrics of the runs that `mlflow.json` in a search folder names.

    `seconds` and `cost_usd` of each trial, `machine_seconds` and `cost_usd` of the search.
    """
    known = json.loads((folder / MLFLOW_FILE).read_text(encoding="utf-8"))
    whole = {"machine_seconds": costs.machine_seconds, "cost_usd": costs.dollars}
    _log(store, known["parent_run_id"], whole, costs.time, costs.tags)
    for trial_id, run_id in known["runs"].items():
        if trial_id in costs.trial_seconds:
            part = {
                "seconds": costs.trial_seconds[trial_id],
                "cost_usd": costs.trial_dollars.get(trial_id),
            }
            _log(store, run_id, part, costs.time, {})


def _log(
    store: Store,
    run_id: str,
    values: Mapping[str, float | None],
    time: int,
    tags: Mapping[str, str],
) -> None:
    points = [Point(name, value, time, 0) for name, value in values.items() if value is not None]
    runs.log_batch(store, run_id, points, {}, tags)


# Checks of an endpoint's images as MLflow runs, in an experiment of their own: beside trainings
# they would be rows without any of their columns.


@dataclass(frozen=True, kw_only=True)
class DriftCheck:
    """One check.

    Args:
        name: of the search's MLflow experiment; that of the checks is `NAME drift`.
        subject: whose images were checked, which the run is named after.
        search_id: whose model was asked.
        moved: names of the measures that have moved.
        files: its artifacts.
    """

    name: str
    subject: str
    search_id: str
    moved: Sequence[str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    files: Sequence[Path]


def write_drift_check(store: Store, check: DriftCheck) -> str:
    """Write a run, FINISHED, or KILLED if it could not be written to its end.

    Returns:
        Its id.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    began = int(time.time() * 1000)
    tags = {
        KIND: "drift",
        "visiontuner.drift_of": check.search_id,  # no SEARCH_ID: it is none of the search's runs
        "visiontuner.drift": ", ".join(check.moved) or "none",
    }
    run_id = _create(store, _experiment(store, f"{check.name} drift"), check.subject, began, tags)
    points = [Point(key, value, began, 0) for key, value in check.metrics.items()]
    params = {key: without_secrets(value)[:_REASON_LENGTH] for key, value in check.params.items()}
    with _none_left_running(store, run_id):
        runs.log_batch(store, run_id, points, params, {})
        for file in check.files:
            store.call("log_artifact", run_id, str(file))
        store.call("set_terminated", run_id, status="FINISHED")
    return run_id


# Searches of other tools as MLflow runs: one parent, a child for each training.

# MLflow takes 250 characters; some are for `best_`, for the names of tags and for a digest.
_LONGEST_NAME = 200
_NOT_ALLOWED = re.compile(r"[^\w.\- :/]+")


@dataclass(frozen=True, kw_only=True)
class ForeignTrial:
    """One training; times are milliseconds since the epoch, `ended` None while it runs."""

    name: str
    state: str
    started: int
    ended: int | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ForeignSearch:
    """A search; `search_id` finds its runs again."""

    search_id: str
    name: str
    state: str
    started: int
    ended: int | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    trials: Sequence[ForeignTrial]


def valid_names(originals: Iterable[str], *, taken: Iterable[str] = ()) -> dict[str, str]:
    """A name that MLflow takes for every metric or parameter of another tool, each its own.

    Args:
        taken: names that are used for something else.
    """
    names = {original: _valid(original) for original in originals}
    shared = {name for name, uses in Counter([*names.values(), *taken]).items() if uses > 1}
    kept = {name for original, name in names.items() if name == original} - set(taken)
    return {
        original: _apart(original, name) if name in shared - ({original} & kept) else name
        for original, name in names.items()
    }


def _valid(original: str) -> str:
    name = _NOT_ALLOWED.sub("_", original)
    if name != original:
        name = name.strip("_ ")
    # MLflow refuses what would be another path as a file's name.
    if re.search(r"^/|/$|//|(^|/)\.{1,2}(/|$)|^\.\.", name):
        name = name.replace("/", "_").lstrip(".")
    return name[:_LONGEST_NAME] or "_"


def _apart(original: str, name: str) -> str:
    return f"{name}-{hashlib.sha256(original.encode()).hexdigest()[:6]}"


def write_foreign_search(store: Store, search: ForeignSearch) -> str:
    """Write the runs that MLflow does not hold yet; repeating it changes nothing.

    What breaks it off leaves its runs KILLED, and the next call completes them.

    Returns:
        The parent's run id.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    held = {
        run.data.tags.get(TRIAL_ID, ""): run
        for run in runs.search_runs(store, search.search_id)
        if run.info.lifecycle_stage == "active"
    }
    experiment = _experiment(store, search.name)
    tags = {KIND: "search", SEARCH_ID: search.search_id, **search.tags}
    parent = held[""].info.run_id if "" in held else None
    if parent is None:
        parent = _create(store, experiment, search.name, search.started, tags)
    with _none_left_running(store, parent):
        for trial in search.trials:
            known = held.get(trial.name)
            if known is not None and _is_written(known, trial):
                continue
            own = {SEARCH_ID: search.search_id, TRIAL_ID: trial.name, _PARENT: parent}
            run_id = (
                known.info.run_id
                if known is not None
                else _create(store, experiment, trial.name, trial.started, {KIND: "trial", **own})
            )
            with _none_left_running(store, run_id):
                _fill(store, run_id, trial)
        _fill(store, parent, search)
    return parent


def _is_written(run: Run, trial: ForeignTrial) -> bool:
    """Whether all of a training that has ended is there: its state is written last."""
    status = STATUS_OF[trial.state]
    return run.info.status == status != "RUNNING" and run.data.tags.get(STATE) == trial.state


@contextmanager
def _none_left_running(store: Store, run_id: str) -> Iterator[None]:
    """A run that is not written to its end does not look as if it were still training."""
    try:
        yield
    except BaseException:
        with suppress(TrackingError):
            store.call("set_terminated", run_id, status="KILLED")
        raise


def _fill(store: Store, run_id: str, what: ForeignTrial | ForeignSearch) -> None:
    time = what.ended or what.started
    points = [Point(name, value, time, 0) for name, value in what.metrics.items()]
    runs.log_batch(store, run_id, points, what.params, {**what.tags, STATE: what.state})
    status = STATUS_OF.get(what.state, "FINISHED")
    if status == "RUNNING":
        store.call("update_run", run_id, status=status)
    else:
        store.call("set_terminated", run_id, status=status, end_time=time)


def _experiment(store: Store, name: str) -> str:
    found = store.call("get_experiment_by_name", name)
    if found is None:
        return str(store.call("create_experiment", name))
    if found.lifecycle_stage == "deleted":
        raise runs.deleted_experiment(name, found.experiment_id)
    return str(found.experiment_id)


def _create(store: Store, experiment: str, name: str, started: int, tags: Mapping[str, str]) -> str:
    run = store.call(
        "create_run",
        experiment,
        start_time=started,
        tags={**tags, "mlflow.runName": name},
        run_name=name,
    )
    return str(run.info.run_id)
