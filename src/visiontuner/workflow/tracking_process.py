"""MLflow beside a running search, in a process of its own, so that it never holds the search up.

`BackgroundTracking` is the search's side; it starts this module as a program.

It is told and it answers in lines of JSON, on its standard input and output:

    {"folder": …, "uri": …, "project_run": …, "draw": …}    first, what to write and where
    {"do": "close", "timeout": seconds, "hard": …}
                                            -> {"progress": [done, total]} every second, then
                                               {"problem": null or why not everything is in MLflow,
                                                "seconds": {"writing": …, "figures": …, "cpu": …}}
    {"do": "register"}                      -> {"model": "models:/NAME/VERSION"}
                                               or {"problem": …, "error": "TrackingError"}
    and at any time                         -> {"notice": …}, for the search's observer

It ends with its input: when whoever started it has ended, in whatever way.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import visiontuner
from visiontuner import errors, interrupts
from visiontuner.errors import TrackingError, VisiontunerError
from visiontuner.journal import SearchRecord
from visiontuner.paths import writable_cache_folder
from visiontuner.text import NO_TRACKING, one_line
from visiontuner.tracking.run_plans import ProjectRun
from visiontuner.workarounds import python as garbage

if TYPE_CHECKING:
    from visiontuner.experiment.schema import Experiment
    from visiontuner.tracking.writer import MlflowWriter, WriterThread
    from visiontuner.workflow.inputs import Observer

# MLflow beside a running search: in a process of its own, so that it never holds the search up.


_LINES_KEPT = 20
_GRACE_SECONDS = 60.0  # to import MLflow on a busy machine, and to answer


def register_int8(folder: Path, experiment: Experiment, observer: Observer) -> str | None:
    """`models:/NAME/VERSION` of the int8 form of a registered search, if `package` asks for it."""
    if experiment.package != "int8":
        return None
    from visiontuner.workflow.quantize import quantize_search  # with MLflow, which takes seconds

    return quantize_search(folder, observer)


class BackgroundTracking:
    """MLflow's writer beside a running search (`tracking_process.py`), for the length of a context.

    Its process imports MLflow as soon as it is made, and writes from `begin` on. What it has to say
    of MLflow's outages goes to the observer as it happens.

    Args:
        project_run: the run that `mlflow run` opened, to be the search's own.
        draw: False leaves the figures and the search's page out.

    `seconds` holds, after `close`, what was spent on `writing` and on `figures`, and the `cpu` time
    of the whole process.
    """

    def __init__(
        self,
        uri: str,
        project_run: ProjectRun | None,
        observer: Observer,
        *,
        draw: bool = True,
    ) -> None:
        self.seconds: dict[str, float] = {}
        run = None if project_run is None else asdict(project_run)
        self._settings = {"uri": uri, "project_run": run, "draw": draw}
        self._observer = observer
        self._problem: str | None = None
        self._begun = False
        # Before `begin` there is nothing to close.
        self._asked_to_close = self._closed = True
        self._answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._last_words: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process: subprocess.Popen[str] | None = None
        if uri == NO_TRACKING:
            self._problem = f"MLFLOW_TRACKING_URI is {NO_TRACKING!r}."
            return
        try:
            self._process = _start()
        except OSError as error:  # the search goes on, `sync` writes it later
            self._problem = f"MLflow's writer does not start ({error.strerror})."
            return
        self._threads = [
            threading.Thread(target=read, args=(self._process,), name="mlflow", daemon=True)
            for read in (self._read_answers, self._read_last_words)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, folder: Path) -> None:
        """Write the search in a folder, from now on."""
        if self._process is not None:
            self._begun, self._asked_to_close, self._closed = True, False, False
            self._send({"folder": str(folder.absolute()), **self._settings})

    def begin_to_close(self, *, timeout_seconds: float = 60, hard: bool = False) -> None:
        """Have the rest written, while the search has other things to do."""
        if not self._asked_to_close:
            self._asked_to_close = True
            self._send({"do": "close", "timeout": timeout_seconds, "hard": hard})

    def close(self, *, timeout_seconds: float = 60, hard: bool = False) -> str | None:
        """Write the rest, once; returns why not everything is in MLflow, or None.

        Args:
            timeout_seconds: how long MLflow may be silent before the rest is left to `sync`.
            hard: leave it after so many seconds even if MLflow answers.
        """
        self.begin_to_close(timeout_seconds=timeout_seconds, hard=hard)
        if not self._closed:
            self._closed = True  # whoever does not wait for the answer is not asked to again
            answer = self._answer(timeout_seconds)
            self._problem, self.seconds = answer["problem"], answer.get("seconds", {})
        return self._problem

    def register(self) -> str:
        """Log and register the classifier, once `close` found everything written; its model URI.

        Raises:
            TrackingError: MLflow is away or refuses.
            ClassifierError: there is no classifier of this search.
        """
        self._send({"do": "register"})
        answer = self._answer(None)
        if "model" in answer:
            return str(answer["model"])
        kind = getattr(errors, answer.get("error", ""), TrackingError)
        assert issubclass(kind, VisiontunerError)
        raise kind(answer["problem"])

    def __enter__(self) -> BackgroundTracking:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the rest, if nobody did, and end the process."""
        try:
            self.close()
        finally:
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        if not self._begun:  # nothing is lost, and a mistake in the data is told at once
            self._process.kill()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; `_answer` says so
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _answer(self, timeout: float | None) -> dict[str, Any]:
        """The next answer, or what stands for that of a process that died or does not answer."""
        while True:
            try:
                answer = interrupts.get(self._answers, timeout and timeout + _GRACE_SECONDS)
            except Empty:
                return {"problem": "MLflow's writer does not answer."}
            if answer is None or "progress" not in answer:
                break
            done, total = answer["progress"]
            self._observer.progress("Writing to MLflow", done, total, "trials")
        if answer is None:
            self._answers.put(None)  # nor will it answer the next question
            last = next((line for line in reversed(self._last_words) if line), "it said nothing")
            return {"problem": f"MLflow's writer has died ({one_line(last, 300)})."}
        return answer

    def _read_answers(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                answer = json.loads(line)
                if "notice" in answer:
                    self._observer.note(answer["notice"])
                else:
                    self._answers.put(answer)
        self._answers.put(None)

    def _read_last_words(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self._last_words.append(line.strip())


def _start() -> subprocess.Popen[str]:
    package = str(Path(visiontuner.__file__).resolve().parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        # -P: a folder of images may hold an `mlflow` too.
        [sys.executable, "-P", "-m", "visiontuner.workflow.tracking_process"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        process_group=0,  # a Ctrl-C is for the search
    )


# The process itself.

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
        from visiontuner.serving.registry import register_classifier

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
