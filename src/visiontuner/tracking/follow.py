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


class WriterThread:
    """Calls `writer.catch_up` every few seconds until it is closed; survives MLflow's outages.

    After a call that took long it waits longer, so that writing stays below `share` of the time,
    and figures that take more than a tenth of the time wait for the search's end. While MLflow is
    away it asks less and less often, at last every 30 seconds.

    Args:
        interval_seconds: shortest time between two calls.
        share: of the time that may be spent on writing; figures have a share of their own.
        notice: called once with the message when MLflow goes away, once when it is back, and
            once when `close` waits for it.

    `problem` holds the message of the last failure until MLflow answers again.
    """

    def __init__(
        self,
        writer: MlflowWriter,
        *,
        interval_seconds: float = 2.0,
        share: float = 0.25,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.writer = writer
        self.problem: str | None = None
        self._interval = interval_seconds
        self._share = share
        self._notice = notice or (lambda _: None)
        self._closing = threading.Event()
        self._deadline: float | None = None
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

    def close(self, timeout: float = 30.0) -> bool:
        """Write what is left and end the thread, within about `timeout` seconds.

        An MLflow that went away is waited for until then; one that never answered is asked once
        more, and has 10 seconds.

        Returns:
            Whether everything the journal holds is in MLflow now; `problem` says why not.
        """
        if self.problem is not None and not self._answered:
            timeout = min(timeout, _SILENT_SECONDS)
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        # One call that began just before the deadline may wait MLflow's 3 seconds.
        self._thread.join(timeout + 4)
        if self._thread.is_alive():
            self.problem = self.problem or f"MLflow did not answer within {timeout:g} s."
            return False
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
        self._written = self._finish(self._deadline or time.monotonic())
        self.writer.close()

    def _finish(self, deadline: float) -> bool:
        told = False
        while not self._catch_up(deadline=deadline):
            left = deadline - time.monotonic()
            if not (self._answered and self._away and left > _LAST_PAUSE):
                return False
            if not told:
                self._notice(f"Waiting up to {left:.0f} s for MLflow to come back.")
            told = True
            time.sleep(_LAST_PAUSE)
        return True

    def _catch_up(self, *, deadline: float | None = None, figure_seconds: float = math.inf) -> bool:
        try:
            self.writer.catch_up(deadline=deadline, figure_seconds=figure_seconds)
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
        return True
