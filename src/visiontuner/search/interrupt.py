"""Signals and the time budget: reasons to end a search in order."""

from __future__ import annotations

import time
from typing import Literal

from ray.tune import Stopper

from visiontuner import interrupts

Reason = Literal["interrupted", "time_budget"]


class EndInOrder(Stopper):
    """Asked by Ray Tune ten times a second whether the whole search ends now.

    The first signal ends it in order; another one does so at once, with a KeyboardInterrupt.
    """

    def __init__(self, time_budget_seconds: float | None) -> None:
        self._deadline = time.monotonic() + time_budget_seconds if time_budget_seconds else None
        self.reason: Reason | None = None

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        return False  # never one trial alone

    def interrupt(self) -> None:
        """End the whole search in order, as a signal does."""
        self.reason = "interrupted"

    def stop_all(self) -> bool:
        if interrupts.take():
            if self.reason == "interrupted":
                raise KeyboardInterrupt
            self.reason = "interrupted"
        if self.reason is None and self._deadline and time.monotonic() > self._deadline:
            self.reason = "time_budget"
        return self.reason is not None
