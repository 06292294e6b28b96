"""What the rules say about the trials of a search, or about runs that MLflow holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visiontuner.diagnostics.history import (
    RECORDING_FILE,
    BestTrial,
    Predictions,
    Recording,
    TrainingHistory,
    best_trials,
    history_of_trial,
)
from visiontuner.diagnostics.rules import diagnose_history, most_severe_first, not_refuted
from visiontuner.diagnostics.rules_search import SimilarRuns
from visiontuner.errors import UserMistake, VisiontunerError
from visiontuner.journal import (
    Finding,
    SearchRecord,
    TrialRecord,
    is_running,
    newest_search,
    read_events,
)
from visiontuner.paths import JOURNAL_FILE, tracking_uri
from visiontuner.search.plan import Stores
from visiontuner.text import next_command
from visiontuner.tracking.reading import RunHistory, read_histories, write_findings


@dataclass(frozen=True, kw_only=True)
class DiagnosedRun:
    """One training and what the rules found.

    Attributes:
        findings: errors first.
        note: what a reader must know: it still runs, it has no curves, …; or empty.
    """

    name: str
    state: str
    findings: tuple[Finding, ...]
    note: str = ""
    run_id: str = ""

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was looked at, where, and what was found.

    Attributes:
        data: findings on the images themselves, from the search's journal.
    """

    target: str
    runs: tuple[DiagnosedRun, ...]
    notes: tuple[str, ...] = ()
    data: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnose(target: str | None = None, *, write: bool = False) -> Diagnosis:
    """Every rule on a search folder's trials, or on runs that MLflow holds.

    Args:
        target: a search folder (None: the newest one), or anything that names runs of MLflow: a run
            id (a parent's means its children), an experiment's name.
        write: put the findings on the runs, as tag and artifact. A search does that itself.

    Raises:
        UserMistake: there is no such folder or run, or `write` with a search folder.
        TrackingError: MLflow is away or refuses.
    """
    folder = newest_search() if target is None else Path(target)
    if folder.is_dir():
        if write:
            raise UserMistake(
                "--write goes with a run of MLflow; what the rules found in a search is written by "
                f"the search itself, or by `{next_command('sync', folder)}`."
            )
        return diagnose_search(folder)
    assert target is not None
    return _diagnose_runs(target, write=write)


def diagnose_search(folder: Path) -> Diagnosis:
    """Every rule on every trial of a search folder; reads only.

    Raises:
        JournalError: the folder holds no search.
    """

    events = read_events(folder).events
    record = SearchRecord.of(events)
    running, files = is_running(folder), _TrialFiles(folder, events)
    similar, best = SimilarRuns(), best_trials(record)
    runs = tuple(
        _diagnose_trial(record, trial, files, similar, best.get(trial.stage), running=running)
        for trial in record.trials.values()
    )
    data = tuple(
        Finding(**{name: event.get(name) for name in Finding.__dataclass_fields__})  # type: ignore[arg-type]
        for event in events
        if event["event"] == "finding" and not event.get("trial_id")
    )
    notes = [f"This search still runs; {JOURNAL_FILE} so far."] if running else []
    if not runs:
        notes.append("It has no trials yet.")
    return Diagnosis(target=str(folder), runs=runs, notes=(*notes, *files.notes), data=data)


def _diagnose_trial(
    record: SearchRecord,
    trial: TrialRecord,
    files: _TrialFiles,
    similar: SimilarRuns,
    best: BestTrial | None,
    *,
    running: bool,
) -> DiagnosedRun:
    alive = running and trial.state == "running"
    history = history_of_trial(
        record,
        trial,
        predictions=files.predictions_of(trial),
        recording=files.recording_of(trial),
        best=best,
        now=time.time() if alive else None,
    )
    found = diagnose_history(history)
    repeated = similar.add(trial.trial_id, history) if trial.finished else None
    found += [repeated] if repeated else []
    known = {finding.rule for finding in found}
    found += [f for f in not_refuted(trial.findings, history) if f.rule not in known]
    state = "interrupted" if trial.state == "running" and not running else trial.state
    return DiagnosedRun(
        name=trial.trial_id,
        state=state,
        findings=tuple(most_severe_first(found)),
        note=_note(history, state),
    )


def _note(history: TrainingHistory, state: str) -> str:
    epochs = len(history.curve("train_loss").values)
    if not history.metrics and not history.error:
        return (
            "no curves: it ended before its first epoch" if state != "running" else "no epoch yet"
        )
    return f"still running, {epochs} epochs so far" if state == "running" else ""


class _TrialFiles:
    """What a search kept of its trials: recordings, and validation predictions with their labels.

    The labels come from what it was trained on.
    """

    def __init__(self, folder: Path, events: Sequence[dict[str, Any]]) -> None:
        self._folder = folder
        self._labels: Any = None
        self._names: tuple[str, ...] = ()
        self.notes: list[str] = []
        self._open(events)

    def predictions_of(self, trial: TrialRecord) -> Predictions | None:
        path = self._folder / "trials" / trial.trial_id / "validation_logits.npy"
        if self._labels is None or not trial.epochs or not path.is_file():
            return None
        try:
            return Predictions.load(path, self._labels, self._names)
        except (OSError, ValueError):
            self.notes.append(f"{path} cannot be read; the rules on predictions pass over it.")
            return None

    def recording_of(self, trial: TrialRecord) -> Recording | None:
        path = self._folder / "trials" / trial.trial_id / RECORDING_FILE
        if not path.is_file():
            return None
        try:
            return Recording.load(path)
        except (OSError, ValueError):
            self.notes.append(f"{path} cannot be read; the rules on recordings pass over it.")
            return None

    def _open(self, events: Sequence[dict[str, Any]]) -> None:
        stores = Stores.of(events)
        if stores.features is None and stores.images is None:
            return
        try:
            folds = SearchRecord.of(events).folds is not None
            self._labels, self._names = stores.read_labels(folds=folds)
        except VisiontunerError:
            what = "features" if stores.features else "decoded images"
            self.notes.append(
                f"The {what} in {stores.features or stores.images} are gone, and the labels "
                "with them: the rules on predictions are left out."
            )


def _diagnose_runs(target: str, *, write: bool) -> Diagnosis:
    uri, similar = tracking_uri(), SimilarRuns()
    histories = read_histories(uri, target)
    runs = tuple(_diagnose_run(run, similar) for run in histories)
    notes = [] if runs else ["There are no runs to look at."]
    if write:
        foreign = {run.run_id for run in histories if not run.own}
        for run in runs:
            if run.run_id in foreign:
                write_findings(uri, run.run_id, run.findings)
        notes.append(f"Written to {len(foreign)} of {len(runs)} runs.")
        if len(foreign) < len(runs):
            notes.append("Trials of a search have their findings from the search itself.")
    return Diagnosis(target=target, runs=runs, notes=tuple(notes))


def _diagnose_run(run: RunHistory, similar: SimilarRuns) -> DiagnosedRun:
    repeated = None if run.running else similar.add(run.name, run.history)
    found = [*diagnose_history(run.history), *([repeated] if repeated else [])]
    earlier = sorted(set(run.findings) - {finding.rule for finding in found})
    losses = (run.history.curve(name).values for name in ("validation_loss", "train_loss"))
    epochs = next((len(values) for values in losses if values), 0)
    notes = [f"still running, {epochs} epochs so far"] if run.running else []
    if not run.metrics:
        notes.append("no curves: nothing was recorded")
    elif not run.known:
        shown = ", ".join(run.metrics[:4]) + (", …" if len(run.metrics) > 4 else "")
        notes.append(f"no metric that the rules know, only {shown}; they look for train_loss, …")
    if earlier and run.own:
        notes.append(f"the search found {', '.join(earlier)}: see its artifact findings.json")
    return DiagnosedRun(
        name=run.name,
        run_id=run.run_id,
        state=run.state,
        findings=tuple(most_severe_first(found)),
        note="; ".join(notes),
    )
