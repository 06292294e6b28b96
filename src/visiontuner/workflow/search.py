"""A search from the pictures to the registered model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visiontuner import interrupts
from visiontuner.commands import next_command
from visiontuner.data.files import disk_problem
from visiontuner.errors import (
    DiskError,
    JournalError,
    SearchFailed,
    SearchInterrupted,
    TrackingError,
    UserMistake,
)
from visiontuner.experiment import Experiment
from visiontuner.journal import FILE_NAME, SearchRecord, TrialRecord
from visiontuner.layout import CLASSIFIER_FOLDER, EXPERIMENT_FILE
from visiontuner.locations import SEARCHES, take_project_run, tracking_uri
from visiontuner.text import one_line
from visiontuner.workflow.inputs import Inputs, with_absolute_paths
from visiontuner.workflow.journals import open_journal, read_record
from visiontuner.workflow.layout import SearchResult, claim_folder
from visiontuner.workflow.observing import Observer, Silent
from visiontuner.workflow.packaging import is_packaged, package_trial
from visiontuner.workflow.recording import BackgroundTracking
from visiontuner.workflow.stages import StageRunner

# Heavy parts are imported where they are used: a mistake in the data is told before torch is
# loaded, and Ray starts while it is.
if TYPE_CHECKING:
    from visiontuner.search.recorder import Recorder
    from visiontuner.search.run import SearchState

Where = Literal["local", "auto"]
CHANGEABLE = "search.time_budget"
"""What `--set` may change with `--resume`: no trial depends on it."""


def run_search(
    experiment: Experiment,
    *,
    output: Path | None = None,
    on: Where = "local",
    observer: Observer | None = None,
) -> SearchResult:
    """Search, write every trial to MLflow, package and register the best.

    Args:
        output: a new folder for the search; default: `searches/NAME-TIME` here.
        on: `local` starts a Ray on this machine, `auto` joins the cluster it is in.

    Raises:
        UserMistake: the folder is taken, or data or backbone do not fit the experiment.
        SearchFailed: no trial was usable; the message has the first trial's error.
    """
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserMistake(
            f"{output} is taken. Choose another --output, or go on with: "
            f"{next_command('tune', '--resume', output)}"
        )
    folder = output or SEARCHES / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = _Run(with_absolute_paths(experiment), folder, on, observer or Silent())
    return run.run(is_named=output is not None)


def resume_search(
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    on: Where = "local",
    observer: Observer | None = None,
) -> SearchResult:
    """Go on with a search after any death: finished trials stay, the others run.

    Args:
        overrides: `search.time_budget=…`, for this time; `null` takes it away.

    Raises:
        JournalError: the folder holds no search, or another process is running it.
        UserMistake: the pictures are not those the search began with, or an override would make
            another search of it.
    """
    for override in overrides:
        if override.partition("=")[0].strip() != CHANGEABLE:
            raise UserMistake(
                "--resume goes on with the search as it was, and "
                f"{override!r} would make another one of it; only {CHANGEABLE} can be set."
            )
    path = folder / EXPERIMENT_FILE
    if not path.is_file():
        raise JournalError(f"{folder} is no search folder: it has no {EXPERIMENT_FILE}.")
    if (folder / FILE_NAME).is_file() and SearchRecord.load(folder).is_training:
        raise JournalError(
            f"{folder} holds one training: {next_command('train', '--resume', folder)}"
        )
    return _Run(Experiment.load(path, overrides), folder, on, observer or Silent()).run()


class _Run:
    """One run of a search, from the pictures to the registered model."""

    def __init__(self, experiment: Experiment, folder: Path, on: Where, observer: Observer) -> None:
        self.experiment = experiment
        self.folder = folder
        self.on = on
        self.observer = observer
        self.inputs = Inputs(experiment, observer)
        self.tracking_uri = tracking_uri()
        self.project_run = take_project_run()

    def run(self, *, is_named: bool = True) -> SearchResult:
        """Everything; a folder that nobody has named gets a name that nobody else has taken."""
        from visiontuner.search.stages import remaining_trials

        with (
            interrupts.handled(),
            closing(self.inputs),
            BackgroundTracking(self.tracking_uri, self.project_run, self.observer) as tracking,
            ExitStack() as journal,
        ):
            record = read_record(self.folder, self.inputs.dataset)
            remaining = remaining_trials(self.experiment, record)
            self._had_ended = record.best is not None and not remaining
            self._require_what_it_needs()
            if not is_named:
                self.folder = claim_folder(self.folder)
            journal.enter_context(interrupts.in_order())
            state, recorder = self._run_trials(record, remaining, tracking, journal)
            try:
                return self._conclude(state, recorder, tracking)
            except KeyboardInterrupt:
                raise SearchInterrupted(
                    "Stopped after the last trial. "
                    f"Go on with: {next_command('tune', '--resume', self.folder)}"
                ) from None

    def _require_what_it_needs(self) -> None:
        """What cannot work ends here, before there is a folder or a run to clean up."""
        from visiontuner.search.cluster import require_room

        _ = self.inputs.description
        if self.on == "local":
            require_room(self.experiment.search)

    def _run_trials(
        self,
        record: SearchRecord,
        remaining: int,
        tracking: BackgroundTracking,
        journal: ExitStack,
    ) -> tuple[SearchState, Recorder]:
        """The part of a search that needs Ray; `journal` closes the recorder."""
        from visiontuner.search.cluster import RayForSearch

        with RayForSearch(self.on, on_loss=self._tell_that_ray_is_gone) as ray:
            recorder = journal.enter_context(closing(self._open_journal(record)))
            tracking.begin(self.folder)
            state: SearchState = "completed"
            try:
                if remaining:
                    state = StageRunner(self.inputs, self.folder, recorder, ray).run()
            except KeyboardInterrupt:
                state = "interrupted"
            except Exception as error:
                if disk_problem(error) is not None:
                    raise self._interrupted_by_disk(error, recorder) from None
                recorder.append("search_ended", state="failed", best_trial=None, error=str(error))
                raise
            # Before Ray ends, which takes seconds that a signal may not leave.
            best = recorder.record.best
            recorder.append("search_ended", state=state, best_trial=best and best.trial_id)
            return state, recorder

    def _tell_that_ray_is_gone(self) -> None:
        self.observer.trials_end()
        self.observer.note(
            "Error: A process of Ray's was killed, perhaps since memory was full. Nothing that "
            f"ended is lost. Go on with: {next_command('tune', '--resume', self.folder)}"
        )

    def _interrupted_by_disk(self, error: Exception, recorder: Recorder) -> DiskError:
        """Nothing has failed for good: the search goes on where there is room."""
        best = recorder.record.best
        with suppress(SearchFailed):  # the journal's own disk may be the full one
            recorder.append("search_ended", state="interrupted", best_trial=best and best.trial_id)
        return DiskError(
            f"{one_line(error, 500).rstrip('.')}. The search is interrupted, nothing is lost. Make "
            f"room, then go on with: {next_command('tune', '--resume', self.folder)}"
        )

    def _open_journal(self, record: SearchRecord) -> Recorder:
        return open_journal(
            self.folder, self.experiment, self.inputs.dataset, record, self.observer
        )

    def _conclude(
        self, state: SearchState, recorder: Recorder, tracking: BackgroundTracking
    ) -> SearchResult:
        if state == "interrupted":
            return self._result(state, recorder, tracking.close(timeout_seconds=10, hard=True))
        best = recorder.record.best
        if best is None:
            raise SearchFailed(
                _first_error(recorder.record, self.folder, self.experiment.search.time_budget)
            )
        tracking.begin_to_close()
        classifier = self._package(best, recorder.record)
        problem = tracking.close()
        model = None
        if problem is None:
            try:
                model = tracking.register()
            except TrackingError as error:
                problem = str(error)
        return self._result(state, recorder, problem, classifier=classifier, model=model)

    def _package(self, best: TrialRecord, record: SearchRecord) -> Path:
        if self._had_ended and is_packaged(self.folder, record):
            return self.folder / CLASSIFIER_FOLDER  # and perhaps evaluated since
        self.observer.note(f"Packaging {best.trial_id} as a classifier.")
        packaging = self.inputs.beside(
            lambda: package_trial(
                self.folder,
                best,
                experiment=self.experiment,
                dataset=self.inputs.dataset,
                backbone=self.inputs.backbone,
                cache=self.inputs.cache,
            )
        )
        return interrupts.result(packaging)

    def _result(
        self, state: SearchState, recorder: Recorder, problem: str | None, **parts: Any
    ) -> SearchResult:
        return SearchResult(
            folder=self.folder,
            record=recorder.record,
            state=state,
            tracking_uri=self.tracking_uri,
            tracking_problem=problem,
            **parts,
        )


def _first_error(record: SearchRecord, folder: Path, budget: float | None) -> str:
    errors = [trial.error for trial in record.trials.values() if trial.error]
    if not errors:
        more = ("--set", f"{CHANGEABLE}={math.ceil(10 * (budget or 60))}s")
        return (
            "The search's time was over before any trial finished, and trials begin again. Give it "
            f"more, or all it takes (null): {next_command('tune', '--resume', folder, *more)}"
        )
    return f"All {len(record.trials)} trials failed. The first said: {errors[0]}"
