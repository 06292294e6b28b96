"""The journal of a search while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from visiontuner.journal import (
    Event,
    Finding,
    JournalWriter,
    SearchRecord,
    best_epoch,
)

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
    """Close a trial in the journal with its best epoch: the last, where none was measured."""
    record = recorder.record
    trial = record.trials[trial_id]
    best = best_epoch(trial.epochs, record.objective, record.mode)
    if record.is_unvalidated and trial.epochs:
        best = trial.epochs[-1]
    recorder.append(
        "trial_ended",
        trial_id=trial_id,
        attempt=trial.attempt,
        state=state,
        best_epoch=best.step if best else None,
        best_value=best.metrics.get(record.objective) if best else None,
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
