"""Diagnostic rules beside a running search: after every epoch and at the end of every trial."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from visiontuner.errors import VisiontunerError
from visiontuner.experiment import Experiment
from visiontuner.journal import EpochRecord, Finding, TrialRecord
from visiontuner.search.labels import ValidationLabels
from visiontuner.search.recorder import Recorder
from visiontuner.search.trial import LOGITS_FILE
from visiontuner.training.recording.records import find_recording
from visiontuner.training.rules import (
    LASTING_RULES,
    Predictions,
    SimilarRuns,
    UnequalHosts,
    diagnose_curves,
    diagnose_history,
    history_of_trial,
)


class LiveRules:
    """Writes findings into the journal, one for each rule and trial, before the trial ends there.

    After an epoch only rules whose verdict lasts are asked, and those that may stop the trial; the
    others wait for its end, when its curves and its predictions are complete.

    Args:
        labels: reads the validation pictures' labels, once and not before they are needed.
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
