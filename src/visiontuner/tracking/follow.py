"""Keep MLflow up to date with a running search, from a thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from visiontuner.errors import JournalError, TrackingError
from visiontuner.tracking.client import OutOfTime, TrackingRefused
from visiontuner.tracking.mlflow_writer import MlflowWriter

_LONGEST_PAUSE = 30.0
_FIGURES_SHARE = 0.1
_SILENT_SECONDS = 10.0  # at the end, for a server that never answered
_LAST_PAUSE = 2.0  # between tries at the end
_LOOK_SECONDS = 0.2  # at whether the thread has ended


class WriterThread:
    """Calls `writer.catch_up` every few seconds until it is closed; survives MLflow's outages.

    After a call that took long it waits longer, so that writing stays below `share` of the time,
    and figures that take more than a tenth of the time wait for the search's end. While MLflow is
    away it asks less and less often, at last every 30 seconds.

    Args:
        interval_seconds: shortest time between two calls.
        share: of the time that may be spent on writing; figures have a share of their own.
        notice: called once with the message when MLflow goes away, once when it is back, once when
            `close` waits for it, and once when it takes no artifacts.
        progress: called, once `close` was, with how many of how many trials are written.

    `problem` holds the message of the last failure until MLflow answers again.
    """

    def __init__(
        self,
        writer: MlflowWriter,
        *,
        interval_seconds: float = 2.0,
        share: float = 0.25,
        notice: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.writer = writer
        self.problem: str | None = None
        self._interval = interval_seconds
        self._share = share
        self._notice = notice or (lambda _: None)
        self._progress = progress
        self._closing = threading.Event()
        self._deadline = math.inf
        self._told_of_artifacts = False
        self._answered = False
        self._away = False
        self._written = False
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def seconds_spent(self) -> float:
        """Time in `catch_up` without the figures."""
        return self.writer.seconds_spent

    @property
    def seconds_figures(self) -> float:
        return self.writer.seconds_figures

    def close(self, timeout: float = 30.0, *, hard: bool = False) -> bool:
        """Write what is left and end the thread.

        An MLflow that answers has all the time it takes; one that went away is waited for. One that
        never answered is asked once more, and has 10 seconds.

        Args:
            timeout: seconds without an answer after which the rest is left.
            hard: end within about `timeout` seconds even if MLflow answers.

        Returns:
            Whether everything the journal holds is in MLflow now; `problem` says why not.
        """
        if self.problem is not None and not self._answered:
            timeout = min(timeout, _SILENT_SECONDS)
        store = self.writer.store
        store.patience = None if hard else timeout
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        while self._thread.is_alive():
            if store.deadline is None:  # a call of before: it ends in time, too
                store.deadline = self._deadline
            # One call that began just before the deadline may wait MLflow's 3 seconds.
            if time.monotonic() > max(self._deadline, store.deadline) + 4:
                self.problem = self.problem or f"MLflow did not answer for {timeout:g} s."
                return False
            self._thread.join(_LOOK_SECONDS)
        return self._written

    def _run(self) -> None:
        pause, opened = self._interval, False
        while not self._closing.wait(pause):
            spent = self.writer.seconds_spent
            if self._catch_up(figure_seconds=_FIGURES_SHARE * pause):
                # The first call loads MLflow's store, seconds that say nothing about the next.
                busy = self.writer.seconds_spent - spent if opened else 0.0
                opened = True
                pause = min(_LONGEST_PAUSE, max(self._interval, busy * (1 / self._share - 1)))
            else:
                pause = min(_LONGEST_PAUSE, pause * 2)
        self._written = self._finish()
        self.writer.close()

    def _finish(self) -> bool:
        told = False
        while not self._catch_up(deadline=self._deadline):
            left = self._deadline - time.monotonic()
            if not (self._answered and self._away and left > _LAST_PAUSE):
                return False
            if not told:
                self._notice(f"Waiting up to {left:.0f} s for MLflow to come back.")
            told = True
            time.sleep(_LAST_PAUSE)
        return self.problem is None

    def _catch_up(self, *, deadline: float | None = None, figure_seconds: float = math.inf) -> bool:
        try:
            done = self.writer.catch_up(
                deadline=deadline, figure_seconds=figure_seconds, progress=self._tell_progress
            )
        except JournalError:
            return deadline is None  # the search has not begun to write yet
        except Exception as error:  # a thread that dies in silence would be worse
            if self.problem is None:
                self._notice(str(error))
            self.problem = str(error)
            # Waiting helps against nothing else.
            self._away = isinstance(error, TrackingError) and not isinstance(
                error, TrackingRefused | OutOfTime
            )
            return False
        self._answered = self._answered or self.writer.parent_run_id is not None
        if self.problem is not None:
            self._notice("MLflow is back; what was missed is written.")
        self.problem = None
        if done.problem is not None:
            if not self._told_of_artifacts:
                self._notice(done.problem)
            self._told_of_artifacts = True
            # While the search runs, its end is another chance.
            self.problem = done.problem if deadline is not None else None
        return True

    def _tell_progress(self, done: int, total: int) -> None:
        if self._progress is not None and self._closing.is_set():
            self._progress(done, total)
