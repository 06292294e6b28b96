"""Write searches into MLflow: beside the search in a process of its own, late, or elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import visiontuner
from visiontuner import errors, interrupts
from visiontuner.errors import TrackingError, VisiontunerError
from visiontuner.journal import SearchRecord, is_running
from visiontuner.paths import CLASSIFIER_FOLDER, EVALUATION_FOLDER, EVALUATION_REPORT, tracking_uri
from visiontuner.text import NO_TRACKING, one_line
from visiontuner.tracking.plan import ProjectRun
from visiontuner.workflow.inputs import Observer, Silent
from visiontuner.workflow.run import SearchResult, register_classifier

if TYPE_CHECKING:
    from visiontuner.search.run import SearchState


# Write a search into MLflow, late or elsewhere.


def sync_search(
    folder: Path, *, project_run: ProjectRun | None = None, observer: Observer | None = None
) -> SearchResult:
    """Write a search's journal into MLflow, model and registration included.

    Repeating it changes nothing. Nothing is computed: a search that ended without its classifier
    gets it from `resume_search`.

    Args:
        project_run: the run that `mlflow run` opened, to adopt as the search's own if MLflow
            holds none of it yet.
        observer: told how far it is, and why that run is left alone.

    Raises:
        JournalError: the folder holds no search, or it is still running elsewhere.
        TrackingError: MLflow is away or refuses; or it has all numbers and does not take artifacts.
    """
    from visiontuner.tracking.writer import MlflowWriter

    observer = observer or Silent()
    record, uri = SearchRecord.load(folder), tracking_uri()
    with MlflowWriter(
        folder, tracking_uri=uri, project_run=project_run, notice=observer.note
    ) as writer:
        written = writer.catch_up(
            search_is_over=not is_running(folder),
            progress=lambda done, total: observer.progress(
                "Writing to MLflow", done, total, "trials"
            ),
        )
        run_ids, parent_run_id = writer.run_ids, writer.parent_run_id
    classifier = folder / CLASSIFIER_FOLDER
    state: SearchState = record.ended["state"] if record.ended else "interrupted"
    model = None
    if classifier.is_dir() and record.best is not None:
        evaluation = _log_evaluation(folder, run_ids, parent_run_id, uri)
        model = register_classifier(folder, record, run_ids, uri, tags=evaluation)
    if written.problem is not None:
        raise TrackingError(written.problem)
    return SearchResult(
        folder=folder,
        record=record,
        state=state,
        tracking_uri=uri,
        classifier=classifier if classifier.is_dir() else None,
        model=model,
    )


def _log_evaluation(
    folder: Path, run_ids: Mapping[str, str], parent_run_id: str | None, uri: str
) -> dict[str, str]:
    """The evaluation of this classifier, if there is one, on its trial's run.

    Returns:
        What the registered version should say of it.
    """
    if not (folder / EVALUATION_FOLDER / EVALUATION_REPORT).is_file():
        return {}
    from visiontuner.serving.registry import classifier_digest
    from visiontuner.tracking.page import write_page
    from visiontuner.tracking.store import Store
    from visiontuner.tracking.writer import (
        TEST_LOOKS,
        log_evaluation,
        read_evaluation,
        version_tags,
    )

    evaluation = read_evaluation(folder / EVALUATION_FOLDER)
    store = Store(uri)
    if parent_run_id is not None:
        store.call("set_tag", parent_run_id, TEST_LOOKS, str(evaluation.looks))
    log_evaluation(store, evaluation, run_id=run_ids[evaluation.trial_id])
    if parent_run_id is not None:
        store.call("log_artifact", parent_run_id, str(write_page(folder)))
    if evaluation.classifier_digest != classifier_digest(folder / CLASSIFIER_FOLDER):
        return {}  # packaged again since: another artifact
    return version_tags(evaluation)


# MLflow beside a running search: in a process of its own, so that it never holds the search up.


_LINES_KEPT = 20
_GRACE_SECONDS = 60.0  # to import MLflow on a busy machine, and to answer


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
        # -P: a folder of pictures may hold an `mlflow` too.
        [sys.executable, "-P", "-m", "visiontuner.workflow.tracking_process"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        process_group=0,  # a Ctrl-C is for the search
    )
