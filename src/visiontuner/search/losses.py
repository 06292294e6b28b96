"""Trials that end through no fault of their own: their worker died, or a disk is full or broken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from visiontuner.data.files import disk_problem

# So Ray writes of an actor whose process or machine has gone. What a trial itself raised begins
# with `ray::`, and an actor that could not even be made would fail anywhere.
_LOST = re.compile(r"(?:Failure # \d+ .*\n)?The actor (?!died because of an error)")
MOST_LOSSES = 3


class Losses:
    """Counts the workers that each trial has lost in this run of the search.

    Args:
        end_search: called when a disk fails a trial: it would fail the next ones as well.

    Attributes:
        disk_error: the first error that said so.
    """

    def __init__(self, end_search: Callable[[], None] = lambda: None) -> None:
        self._end_search = end_search
        self.disk_error: str | None = None
        self._lost: Counter[str] = Counter()
        self._waiting = False

    def begins_again(self, trial_id: str, told: str) -> bool:
        """Whether a trial of which Ray told this lost its worker and is to run again.

        A trial that has lost as many as `MOST_LOSSES` is taken to be what ends them.
        """
        if not _LOST.match(told):
            return False
        self._lost[trial_id] += 1
        again = self._lost[trial_id] < MOST_LOSSES
        self._waiting = self._waiting or again
        return again

    def is_of_disk(self, traceback: str, error: str) -> bool:
        """Whether a disk is why a trial failed; the search then ends, to be resumed."""
        if disk_problem(traceback) is None:
            return False
        self.disk_error = self.disk_error or error
        self._end_search()
        return True

    def take(self) -> bool:
        """Whether a trial waits to run again since this was asked last."""
        waiting, self._waiting = self._waiting, False
        return waiting
