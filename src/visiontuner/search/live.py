"""The journal of a search while it runs, and the rules beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from visiontuner.diagnostics.history import (
    BestTrial,
    Predictions,
    best_of,
    best_trials,
    find_recording,
    history_of_trial,
)
from visiontuner.diagnostics.rules import LASTING_RULES, diagnose_curves, diagnose_history
from visiontuner.diagnostics.rules_search import SimilarRuns, UnequalHosts
from visiontuner.errors import VisiontunerError
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import (
    EpochRecord,
    Event,
    Finding,
    JournalWriter,
    SearchRecord,
    TrialRecord,
)
from visiontuner.search.plan import LOGITS_FILE, ValidationLabels

# The journal of a search while it runs.


Listener = Callable[[Event], None]


class Recorder:
    """The journal of a running search, what it adds up to, and who else listens."""

    def __init__(
        self, journal: JournalWriter, record: SearchRecord, listeners: Sequence[Listener] = ()
    ) -> None:
        self.record = record
        self._journal = journal
        self._listeners = listeners

    def append(self, event: str, **fields: Any) -> None:
        line = self._journal.append(event, **fields)
        self.record.apply(line)
        for listen in self._listeners:
            listen(line)

    def close(self) -> None:
        """Give the journal free for whoever comes next, in this process too."""
        self._journal.close()


def end_trial(
    recorder: Recorder, trial_id: str, state: str, *, error: str | None = None, **fields: Any
) -> None:
    """Close a trial in the journal with the epoch that is kept."""
    record = recorder.record
    trial = record.trials[trial_id]
    kept = record.kept_epoch(trial)
    recorder.append(
        "trial_ended",
        trial_id=trial_id,
        attempt=trial.attempt,
        state=state,
        best_epoch=kept.step if kept else None,
        best_value=kept.metrics.get(record.objective) if kept else None,
        error=error,
        **fields,
    )


def findings_of(notes: Iterable[str], step: int) -> list[Finding]:
    """What a training had to say of an epoch, as findings."""
    return [_finding(note, step) for note in notes]


def _finding(note: str, step: int) -> Finding:
    if "memory" not in note:
        return Finding(
            rule="training_note", severity="info", evidence=note, advice="Nothing to do.", step=step
        )
    return Finding(
        rule="out_of_memory",
        severity="warning",
        evidence=note,
        advice="The batch size stays what it was. Set training.micro_batch_size to what fits, so "
        "that no step is tried twice, or let fewer trials share the memory.",
        step=step,
    )


# Diagnostic rules beside a running search: after every epoch and at the end of every trial.


class LiveRules:
    """Writes findings into the journal, one for each rule and trial, before the trial ends there.

    After an epoch only rules whose verdict lasts are asked, and those that may stop the trial; the
    others wait for its end, when its curves and its predictions are complete.

    Args:
        labels: reads the validation images' labels, once and not before they are needed.
    """

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        labels: Callable[[], ValidationLabels],
        recorder: Recorder,
    ) -> None:
        self._folder = folder
        self._stop_on = experiment.rules.stop_on
        self._asked = tuple(dict.fromkeys([*LASTING_RULES, *self._stop_on]))
        self._read_labels = labels
        self._recorder = recorder
        self._similar = SimilarRuns()
        self._hosts = UnequalHosts()
        self._best = best_trials(recorder.record)
        self._labels: ValidationLabels | None = None
        self._waiting: dict[str, list[Finding]] = {}
        self.reasons: dict[str, str] = {}
        for trial in recorder.record.trials.values():
            if trial.finished:  # of a search that is resumed
                history = history_of_trial(recorder.record, trial)
                self._similar.add(trial.trial_id, history)
                self._hosts.add(history)

    def stops(
        self,
        trial_id: str,
        step: int,
        metrics: Mapping[str, float],
        found: Sequence[Finding] = (),
    ) -> bool:
        """Whether a rule ends this trial with the epoch that was just reported.

        Ray asks before it tells the callbacks, so what is found waits for `write_waiting`.

        Args:
            found: what the trial's own process saw in what it records.
        """
        trial = self._recorder.record.trials[trial_id]
        newest = EpochRecord(step=step, time=0.0, attempt=trial.attempt, metrics=dict(metrics))
        seen = replace(trial, epochs=[*trial.epochs_before(step), newest])
        history = replace(history_of_trial(self._recorder.record, seen), times=())
        errors = [f for f in diagnose_curves(history, self._asked) if f.severity == "error"]
        self._waiting[trial_id] = [*errors, *found]
        for finding in self._waiting[trial_id]:
            if finding.severity == "error" and finding.rule in self._stop_on:
                self.reasons[trial_id] = f"rules.stop_on: {finding.rule} in epoch {step}"
                return True
        return False

    def write_waiting(self, trial_id: str) -> None:
        """The findings of the last epoch, once that epoch is in the journal."""
        self._write(trial_id, self._waiting.pop(trial_id, []))

    def end(self, trial_id: str, *, error: str | None = None, host: str | None = None) -> None:
        """Every rule on a trial that has just ended.

        Args:
            error: what ended it, if it failed.
            host: the machine it ran on.
        """
        record = self._recorder.record
        trial = replace(record.trials[trial_id], error=error, host=host)
        predictions = None if error else self._predictions(trial)
        history = history_of_trial(
            record,
            trial,
            predictions=predictions,
            recording=find_recording(self._folder / "trials" / trial_id),
            best=self._best_so_far(trial),
        )
        findings = diagnose_history(history)
        together = self._similar.add(trial_id, history), self._hosts.add(history)
        self._write(trial_id, [*findings, *(finding for finding in together if finding)])

    def _write(self, trial_id: str, findings: list[Finding]) -> None:
        trial = self._recorder.record.trials[trial_id]
        known = {finding.rule for finding in trial.findings}
        for finding in findings:
            if finding.rule not in known:
                self._recorder.append(
                    "finding", trial_id=trial_id, attempt=trial.attempt, **asdict(finding)
                )

    def _best_so_far(self, trial: TrialRecord) -> BestTrial | None:
        trials = self._recorder.record.trials.values()
        running = [t for t in trials if t.stage == trial.stage and t.state == "running"]
        best = best_of(running, self._best.get(trial.stage))
        if best is not None:
            self._best[trial.stage] = best
        return best

    def _predictions(self, trial: TrialRecord) -> Predictions | None:
        """What the trial's best epoch said; None where it cannot be read: rules never end it."""
        path = self._folder / "trials" / trial.trial_id / LOGITS_FILE
        if not trial.epochs or not path.is_file():
            return None
        try:
            if self._labels is None:
                self._labels = self._read_labels()
            return Predictions.load(path, *self._labels)
        except (OSError, ValueError, VisiontunerError) as problem:
            logging.getLogger(__name__).info("%s: %s", path, problem)
            return None
