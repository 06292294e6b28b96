"""Workers that die under their trials: which errors say so, and how often a trial begins again."""

from __future__ import annotations

import re
from collections import Counter

# Ray's own errors for a machine or a process that has gone; all else the trial itself raised.
_LOST = re.compile(
    r"ray\.exceptions\.(ActorDiedError|ActorUnavailableError|RayActorError|NodeDiedError"
    r"|LocalRayletDiedError|WorkerCrashedError|ObjectLostError|OwnerDiedError)"
)
MOST_LOSSES = 3


class Losses:
    """Counts the workers that each trial has lost in this run of the search."""

    def __init__(self) -> None:
        self._lost: Counter[str] = Counter()
        self._waiting = False

    def begins_again(self, trial_id: str, traceback: str) -> bool:
        """Whether a trial that ended with this traceback lost its worker and is to run again.

        A trial that has lost as many as `MOST_LOSSES` is taken to be what ends them.
        """
        if not _LOST.search(traceback):
            return False
        self._lost[trial_id] += 1
        again = self._lost[trial_id] < MOST_LOSSES
        self._waiting = self._waiting or again
        return again

    def take(self) -> bool:
        """Whether a trial waits to run again since this was asked last."""
        waiting, self._waiting = self._waiting, False
        return waiting
