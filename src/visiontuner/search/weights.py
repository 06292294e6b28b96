"""Which trials' weights and logits stay on the disk: those of the best, and of what still runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from visiontuner.experiment import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.stages import starting_heads
from visiontuner.search.trial import (
    CHECKPOINT_FOLDER,
    HEAD_FILE,
    LOGITS_FILE,
    NETWORK_FILE,
    SCORES_FILE,
)

WEIGHTS_KEPT = 5


class WeightsOnDisk:
    """Takes the weights of ended trials off the disk that are not among the best of their stage.

    Their validation logits go with them, where the scores are there that every trial keeps.
    A running or interrupted trial keeps its own, so that there are never more than `keep` and those
    of the running ones; in the first of two stages also the heads that the second begins with.
    """

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        record: SearchRecord,
        *,
        keep: int = WEIGHTS_KEPT,
    ) -> None:
        self._folder = folder
        self._experiment = experiment
        self._record = record
        self._keep = keep
        self._removed: set[str] = set()  # many trials end: each is looked at once

    def prune(self) -> None:
        """To be called when a trial has ended, and before the first one begins."""
        kept = self._kept()
        for trial in self._record.trials.values():
            if not trial.finished or trial.trial_id in self._removed:
                continue
            folder = self._folder / "trials" / trial.trial_id
            shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)
            for half_written in folder.glob(".*.part"):  # by a worker that was killed
                half_written.unlink(missing_ok=True)
            if trial.trial_id not in kept:
                scored = (folder / SCORES_FILE).is_file()  # not by an earlier version
                for name in (HEAD_FILE, NETWORK_FILE, *([LOGITS_FILE] if scored else [])):
                    (folder / name).unlink(missing_ok=True)
                self._removed.add(trial.trial_id)

    def _kept(self) -> set[str]:
        kept = {trial.trial_id for trial in starting_heads(self._experiment, self._record)}
        ranking = self._record.ranking()
        for stage in {trial.stage for trial in ranking}:
            of_stage = [trial.trial_id for trial in ranking if trial.stage == stage]
            kept |= set(of_stage[: self._keep])
        return kept


def kept_weights(folder: Path, trial_id: str) -> Path | None:
    """The head or the network of a trial's best epoch, if it is among those kept."""
    for name in (NETWORK_FILE, HEAD_FILE):
        path = folder / "trials" / trial_id / name
        if path.is_file():
            return path
    return None
