"""The process that writes a running search into MLflow; `recording.BackgroundTracking` starts it.

It is told and it answers in lines of JSON, on its standard input and output:

    {"folder": …, "uri": …, "project_run": …, "draw": …}    first, what to write and where
    {"do": "close", "timeout": seconds, "hard": …}
                                            -> {"progress": [done, total]} every second, then
                                               {"problem": null or why not everything is in MLflow,
                                                "seconds": {"writing": …, "figures": …, "cpu": …}}
    {"do": "register"}                      -> {"model": "models:/NAME/VERSION"}
                                               or {"problem": …, "error": "TrackingError"}
    and at any time                         -> {"notice": …}, for who watches the search

It ends with its input: when whoever started it has ended, in whatever way.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from visiontuner.errors import TrackingError, VisiontunerError
from visiontuner.journal import SearchRecord
from visiontuner.paths import writable_cache_folder
from visiontuner.tracking.plan import ProjectRun
from visiontuner.workarounds import python as garbage
from visiontuner.workflow.run import register_classifier

if TYPE_CHECKING:
    from visiontuner.tracking.writer import MlflowWriter, WriterThread

# Trials go first: on busy cores this process gets a third of what one of theirs gets.
_NICE = 5


class TrackingProcess:
    """What the process does with what it is told.

    Args:
        tell: sends one answer or notice.
    """

    def __init__(self, settings: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        self._folder = Path(settings["folder"])
        self._uri: str = settings["uri"]
        self._tell = tell
        self._writer: MlflowWriter | None = None
        self._thread: WriterThread | None = None
        self._problem: str | None = None
        self._open(settings)

    def do(self, order: Mapping[str, Any]) -> None:
        if order["do"] == "close":
            problem = self._close(order["timeout"], hard=order["hard"])
            self._tell({"problem": problem, "seconds": self._seconds()})
        else:
            self._tell(self._register())

    def _open(self, settings: Mapping[str, Any]) -> None:
        from visiontuner.tracking.writer import MlflowWriter, WriterThread

        run = settings["project_run"]
        try:
            self._writer = MlflowWriter(
                self._folder,
                tracking_uri=self._uri,
                project_run=None if run is None else ProjectRun(**run),
                draw=settings["draw"],
                live=True,
                templates=writable_cache_folder() / "databases",
                notice=self._notice,
            )
        except TrackingError as error:  # the search goes on, `sync` writes it elsewhere
            self._problem = str(error)
            self._notice(self._problem)
            return
        self._thread = WriterThread(self._writer, notice=self._notice, progress=self._progress)

    def _close(self, timeout: float, *, hard: bool) -> str | None:
        if self._thread is None:
            return self._problem
        if self._thread.close(timeout, hard=hard):
            return None
        return self._thread.problem or "MLflow does not hold everything yet."

    def _seconds(self) -> dict[str, float]:
        """Until now: in calls that write, in figures, and the processor's for all, imports too."""
        seconds = {"cpu": time.process_time()}
        if self._writer is not None:
            seconds["writing"] = self._writer.seconds_spent
            seconds["figures"] = self._writer.seconds_figures
        return seconds

    def _register(self) -> dict[str, Any]:
        assert self._writer is not None
        try:
            model = register_classifier(
                self._folder, SearchRecord.load(self._folder), self._writer.run_ids, self._uri
            )
        except VisiontunerError as error:
            return {"problem": str(error), "error": _kind(error)}
        return {"model": model}

    def _notice(self, text: str) -> None:
        self._tell({"notice": text})

    def _progress(self, done: int, total: int) -> None:
        self._tell({"progress": [done, total]})


def _kind(error: VisiontunerError) -> str:
    """The class in `errors` that says what a caller can do about it."""
    return "TrackingError" if isinstance(error, TrackingError) else type(error).__name__


def main() -> None:
    """Do what the standard input says until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the search
    os.nice(_NICE)
    garbage.collect_rarely()
    tell = _only_answers_on_stdout()
    orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_read_into, args=(orders,), daemon=True).start()
    # Seconds, in which nobody has to know yet what is to be written.
    importlib.import_module("visiontuner.tracking.writer")
    process = TrackingProcess(orders.get(), tell)
    while True:
        process.do(orders.get())


def _only_answers_on_stdout() -> Callable[[dict[str, Any]], None]:
    """What sends an answer; anything that is printed goes to the standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(answer: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(answer), file=answers, flush=True)

    return tell


def _read_into(orders: SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    # Nobody waits for an answer; what is not written yet is in the journal.
    os._exit(0)


if __name__ == "__main__":
    main()
