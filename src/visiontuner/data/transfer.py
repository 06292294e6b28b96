"""Many transfers side by side: counted, tried again while S3 is away, ended together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from visiontuner import interrupts

Result = TypeVar("Result")

# What fails for so long is given up. The first answer is awaited less long: an address that is
# wrong never answers.
PATIENCE_SECONDS = 120.0
FIRST_PATIENCE_SECONDS = 45.0
_LONGEST_PAUSE_SECONDS = 8.0
_DAMAGED_TIMES = 3


class Damaged(Exception):
    """What came is not what was promised."""


class Transfers:
    """One run of transfers.

    Args:
        total: bytes to move.
        is_passing: whether an error is one of the connection, that passes.
        progress: called with (bytes so far, bytes in all), one call at a time.
        note: told once for each time that the other side is away.
    """

    def __init__(
        self,
        total: int,
        *,
        is_passing: Callable[[Exception], bool],
        progress: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._total = total
        self._done = 0
        self._is_passing = is_passing
        self._progress = progress
        self._note = note
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._has_answered = False
        self._is_away = False

    def run(self, work: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
        """Do everything; the first error ends all of it."""
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(one) for one in work]
            try:
                for future in interrupts.as_completed(futures):
                    future.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]

    @property
    def is_stopped(self) -> bool:
        """Whether another transfer has failed, or the user has had enough."""
        return self._stopped.is_set()

    def go_on(self) -> None:
        """For a long transfer to ask now and then.

        Raises:
            CancelledError: all of it has been ended.
        """
        if self.is_stopped:
            raise CancelledError

    def advance(self, count: int) -> None:
        """So many bytes more; fewer if something has to be moved again."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def patiently(self, action: Callable[[], Result]) -> Result:
        """Do it, again after an error that passes, until it has failed for too long."""
        failures = damages = 0
        failing_since: float | None = None
        while True:
            self.go_on()
            try:
                result = action()
            except Damaged:
                damages += 1
                if damages >= _DAMAGED_TIMES:
                    raise
            except Exception as error:
                failing_since = failing_since or time.monotonic()
                if not self._is_passing(error) or not self._may_wait(failing_since):
                    raise
                pause = min(0.25 * 2**failures, _LONGEST_PAUSE_SECONDS)
                failures += 1
                if self._stopped.wait(pause):
                    raise
            else:
                self._succeeded()
                return result

    def _may_wait(self, failing_since: float) -> bool:
        with self._lock:
            patience = PATIENCE_SECONDS if self._has_answered else FIRST_PATIENCE_SECONDS
            left = failing_since + patience - time.monotonic()
            if left > 0 and not self._is_away and self._note is not None:
                self._note(f"S3 does not answer; asking again for {left:.0f} s.")
            self._is_away = True
            return left > 0

    def _succeeded(self) -> None:
        with self._lock:
            self._has_answered = True
            self._is_away = False
