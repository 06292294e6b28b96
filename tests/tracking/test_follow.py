import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from visiontuner.errors import TrackingError
from visiontuner.tracking.store import Store, TrackingRefused, explain, limited
from visiontuner.tracking.writer import MlflowWriter, WriterThread


class Server:
    """A real `mlflow server` on a free port that can be stopped and started again."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder, self._database = folder, database
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", self._database]
        self._process = subprocess.Popen(
            command,
            cwd=self._folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self._answers)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It takes connections and answers nothing."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path, new_database: Callable[[Path], str]) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder, new_database(folder / "mlflow.db"))
    yield server
    server.stop()


def wait_until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.mark.slow
def test_nothing_is_lost_while_the_server_is_away(
    new_search: Callable[..., Any], server: Server
) -> None:
    server.start()
    search, notices = new_search(), list[str]()
    search.begin()
    writer = MlflowWriter(search.folder, tracking_uri=server.uri, draw=False, live=True)
    thread = WriterThread(writer, interval_seconds=0.1, share=1.0, notice=notices.append)
    search.trial(1)
    wait_until(lambda: "t0001" in writer.run_ids)
    server.stop()
    search.start(2)
    search.epoch(2, 1)
    wait_until(lambda: thread.problem)
    search.epoch(2, 2)
    search.end(2)
    server.start()
    wait_until(lambda: thread.problem is None)
    server.freeze()
    search.trial(3)
    search.finish()
    wait_until(lambda: thread.problem)
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(thread.close, timeout=60)
        wait_until(lambda: len(notices) == 4)
        server.thaw()
        assert closed.result()
    told = ["cannot be reached", "is back", "cannot be reached", "Waiting up to", "is back"]
    for notice, words in zip(notices, told, strict=True):
        assert words in notice
    client = MlflowClient(server.uri)
    for trial_id, steps in (("t0001", [1, 2, 3]), ("t0002", [1, 2]), ("t0003", [1, 2, 3])):
        run_id = writer.run_ids[trial_id]
        history = client.get_metric_history(run_id, "validation_loss")
        assert [m.step for m in history] == steps
        assert client.get_run(run_id).info.status == "FINISHED"


@pytest.fixture
def slow_store(
    new_search: Callable[..., Any],
    new_database: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> MlflowWriter:
    """Of a search whose writing takes many times as long as one call to MLflow, a second."""
    search = new_search()
    search.begin()
    for number in range(1, 16):
        search.trial(number, epochs=1)
    search.finish()
    call = Store.call

    def slow_call(self: Store, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Store, "call", slow_call)
    monkeypatch.setattr("visiontuner.tracking.writer._PROGRESS_SECONDS", 0.0)
    uri = new_database(tmp_path / "mlflow.db")
    return MlflowWriter(search.folder, tracking_uri=uri, draw=False)


def test_a_store_that_answers_has_all_the_time_it_takes(slow_store: MlflowWriter) -> None:
    progress = list[tuple[int, int]]()
    thread = WriterThread(
        slow_store, interval_seconds=3600, progress=lambda *done: progress.append(done)
    )
    assert thread.close(timeout=1.0)
    assert thread.problem is None
    assert progress == sorted(progress)
    assert progress[-1] == (15, 15)


def test_a_search_that_was_stopped_leaves_the_rest(slow_store: MlflowWriter) -> None:
    thread = WriterThread(slow_store, interval_seconds=3600)
    assert not thread.close(timeout=1.0, hard=True)
    assert thread.problem == "The time for writing to MLflow is up."
    assert slow_store.parent_run_id is not None
    assert slow_store.catch_up().complete


def test_a_server_that_never_answered_is_not_waited_for(new_search: Callable[..., Any]) -> None:
    search, notices = new_search(), list[str]()
    search.begin()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    writer = MlflowWriter(search.folder, tracking_uri=f"http://127.0.0.1:{port}", draw=False)
    thread = WriterThread(writer, interval_seconds=0.1, notice=notices.append)
    wait_until(lambda: thread.problem)
    assert not thread.close(timeout=120)
    assert notices == [thread.problem]  # it would have said how long it waits
    assert "cannot be reached: Connection refused. " in notices[0]
    assert "visiontuner sync" in notices[0]


def test_the_environment_is_as_before_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with limited(3):
        with limited(60):
            assert [os.environ[name] for name in names] == ["60", "0"]
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    assert not set(names) & set(os.environ)


def test_the_users_own_limits_win(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "77", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with limited(3), limited(120):
        assert {name: os.environ[name] for name in own} == own
    assert {name: os.environ[name] for name in own} == own


class SlowServer:
    """Answers a question after as many seconds as it was told, and remembers none."""

    def __init__(self, seconds: float) -> None:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(seconds)
                with suppress(OSError):  # nobody waits for it any more
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b"{}")

            do_GET = do_POST = do_PUT = _answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "SlowServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_only_a_live_writer_is_in_a_hurry_and_never_with_artifacts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("visiontuner.tracking.store.LIVE_SECONDS", 1)
    with SlowServer(2.0) as server:
        with pytest.raises(TrackingError, match="timed out"):
            Store(server.uri, live=True).call("search_experiments")
        assert Store(server.uri).call("search_experiments") == []
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        assert Store(server.uri, live=True).call("search_experiments") == []
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
        limits = list[str]()
        monkeypatch.setattr(
            MlflowClient,
            "log_artifacts",
            lambda *_: limits.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]),
        )
        store = Store(server.uri, live=True)
        store.call("log_artifacts", "run", "folder")
        store.deadline = time.monotonic() + 30
        store.call("log_artifacts", "run", "folder")
    assert limits[0] == "120"
    assert 20 <= int(limits[1]) <= 30, "no longer than until the deadline"


def test_errors_name_the_next_step_and_no_password() -> None:
    uri = "https://me:secret@mlflow.example"
    schema = explain(Exception("Detected out-of-date database schema (found version 1)"), uri)
    assert isinstance(schema, TrackingRefused)
    assert "mlflow db upgrade" in str(schema)
    credentials = explain(Exception("API request failed with error code 401 != 200"), uri)
    assert isinstance(credentials, TrackingRefused)
    assert "MLFLOW_TRACKING_USERNAME" in str(credentials)
    away = explain(ConnectionError(f"Max retries exceeded with {uri}"), uri)
    assert type(away) is TrackingError
    assert all("secret" not in str(error) for error in (schema, credentials, away))
