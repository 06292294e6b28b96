"""MLflow beside a running search: a real process, its store, and its death or its driver's."""

import fcntl
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from visiontuner.errors import ClassifierError
from visiontuner.text import NO_TRACKING
from visiontuner.tracking.writer import LOCK_FILE
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.sync import sync_search
from visiontuner.workflow.tracking_process import BackgroundTracking

pytestmark = pytest.mark.slow


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def wait_until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.05)


def writers() -> list[psutil.Process]:
    """Writing processes of this one."""
    return [
        process
        for process in psutil.Process().children()
        if not ended(process) and "visiontuner.workflow.tracking_process" in process.cmdline()
    ]


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # nobody may be there to take its end
    except psutil.NoSuchProcess:
        return True


def is_free(lock: Path) -> bool:
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def finished(new_search: Callable[..., Any]) -> Iterator[Any]:
    search = new_search()
    search.begin()
    search.trial(1)
    search.finish()
    yield search
    assert writers() == []


def names(uri: str) -> list[str]:
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return sorted(str(run.info.run_name) for run in client.search_runs(experiments))


def test_without_mlflow_nothing_is_written_and_it_is_said(tmp_path: Path) -> None:
    with BackgroundTracking(NO_TRACKING, None, Silent()) as tracking:
        tracking.begin(tmp_path)
        assert tracking.close() == "MLFLOW_TRACKING_URI is 'none'."
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_never_began_is_not_written(uri: str, finished: Any) -> None:
    with (
        pytest.raises(KeyError),
        BackgroundTracking(uri, None, Silent()),
    ):
        raise KeyError("a mistake in the data")
    assert names(uri) == []
    assert not (finished.folder / LOCK_FILE).exists()


def test_everything_is_written_when_it_closes(
    finished: Any, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the user's that has the name of a library.
    (tmp_path / "here/mlflow").mkdir(parents=True)
    (tmp_path / "here/mlflow/__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path / "here")
    with BackgroundTracking(uri, None, Silent(), draw=False) as tracking:
        tracking.begin(finished.folder)
        wait_until((finished.folder / LOCK_FILE).exists)
        writers()[0].send_signal(signal.SIGINT)  # a Ctrl-C is for the search
        assert tracking.close() is None
        assert tracking.close() is None
        assert len(names(uri)) == 2
        with pytest.raises(ClassifierError, match="is not from this search"):
            tracking.register()
    assert all(tracking.seconds[kind] > 0 for kind in ("cpu", "writing"))


def test_a_store_that_cannot_be_opened_is_said_once_and_left_to_sync(
    finished: Any, tmp_path: Path
) -> None:
    observer, nowhere = Notes(), tmp_path / "file"
    nowhere.touch()
    with BackgroundTracking(f"sqlite:///{nowhere}/mlflow.db", None, observer) as tracking:
        tracking.begin(finished.folder)
        problem = tracking.close()
    assert problem is not None
    assert observer.notes == [problem]


def test_a_writer_that_does_not_start_is_said_and_ends_nothing(
    finished: Any, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with BackgroundTracking(uri, None, Silent()) as tracking:
        tracking.begin(finished.folder)
        problem = tracking.close()
    assert problem == "MLflow's writer does not start (No such file or directory)."


def test_a_writer_that_dies_is_said_and_loses_nothing(
    finished: Any, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BackgroundTracking(uri, None, Silent()) as tracking:
        tracking.begin(finished.folder)
        (process,) = writers()
        process.kill()
        assert tracking.close() == "MLflow's writer has died (it said nothing)."
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    sync_search(finished.folder)
    assert len(names(uri)) == 2


def test_the_writer_ends_with_its_search(finished: Any, uri: str) -> None:
    script = f"""
        import os, sys, time
        from pathlib import Path
        from visiontuner.workflow.inputs import Silent
        from visiontuner.workflow.tracking_process import BackgroundTracking

        tracking = BackgroundTracking({uri!r}, None, Silent())
        tracking.begin(Path({str(finished.folder)!r}))
        print(tracking._process.pid, flush=True)
        time.sleep(600)
        """
    search = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert search.stdout is not None
    writer = psutil.Process(int(search.stdout.readline()))
    wait_until((finished.folder / LOCK_FILE).exists)
    search.kill()
    search.communicate()
    wait_until(lambda: ended(writer))
    wait_until(lambda: is_free(finished.folder / LOCK_FILE))
