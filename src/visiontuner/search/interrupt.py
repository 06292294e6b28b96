"""Ctrl-C, SIGTERM and the time budget: reasons to end a search in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from ray.tune import Stopper

Reason = Literal["interrupted", "time_budget"]


class EndInOrder(Stopper):
    """Asked by Ray Tune after every step whether the whole search ends now."""

    def __init__(self, time_budget_seconds: float | None) -> None:
        self._deadline = time.monotonic() + time_budget_seconds if time_budget_seconds else None
        self.reason: Reason | None = None

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        return False  # never one trial alone

    def stop_all(self) -> bool:
        if self.reason is None and self._deadline and time.monotonic() > self._deadline:
            self.reason = "time_budget"
        return self.reason is not None

    def interrupt(self) -> None:
        self.reason = "interrupted"


@contextmanager
def signals_end(stopper: EndInOrder) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the search in order; a second one does so at once.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stopper.reason == "interrupted":
            raise KeyboardInterrupt
        stopper.interrupt()

    watched = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle) for number in watched}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
