"""MLflow's scoring server in a process of its own, on a free port of this machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import psutil
import requests
import yaml
from filelock import FileLock

from visiontuner import NO_TELEMETRY, interrupts
from visiontuner.errors import ClassifierError, ServingError

# A clean Python environment from a model's pinned requirements, built once for each set.


_TIMEOUT_SECONDS = 1800
_COMPLETE = ".complete"  # written last, with the seconds it took


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a model is served.

    Args:
        python: its interpreter.
        install_seconds: what installing took when it was built; None if it is this process's own.
        size_mb: of its packages, in 10^6 bytes; None likewise.
    """

    python: Path
    install_seconds: float | None = None
    size_mb: float | None = None


def local_environment() -> Environment:
    """The one that this process runs in."""
    return Environment(python=Path(sys.executable))


def clean_environment(model: Path, cache: Path) -> Environment:
    """One with exactly what a model's `requirements.txt` pins, from the cache if it is there.

    Args:
        model: an MLflow model folder.
        cache: environments are kept below it.

    Raises:
        ClassifierError: the model does not say what it needs.
        ServingError: it cannot be installed.
    """
    requirements, version = wanted_by(model)
    wanted = "\n".join([version, platform.platform(), *sorted(requirements.split("\n"))])
    folder = cache / "environments" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _COMPLETE).is_file():
            _build(folder, model / "requirements.txt", version)
        seconds = float((folder / _COMPLETE).read_text(encoding="utf-8"))
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    return Environment(
        python=folder / "bin" / "python", install_seconds=seconds, size_mb=size / 1e6
    )


def wanted_by(model: Path) -> tuple[str, str]:
    """The lines of a model's requirements, and its Python's version as `3.11`.

    Raises:
        ClassifierError: the model does not say what it needs.
    """
    try:
        requirements = (model / "requirements.txt").read_text(encoding="utf-8").strip()
        raw = yaml.safe_load((model / "python_env.yaml").read_text(encoding="utf-8"))
        major, minor = str(raw["python"]).split(".")[:2]
        return requirements, f"{int(major)}.{int(minor)}"
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError):
        raise ClassifierError(
            f"{model} does not say what it needs (requirements.txt, python_env.yaml); "
            "is it an MLflow model?"
        ) from None


def _build(folder: Path, requirements: Path, version: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    own = version == f"{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = sys.executable if own else version
    python = folder / "bin" / "python"
    uv = _find_uv()
    began = time.monotonic()
    if uv:
        _run([uv, "venv", "--quiet", "--python", interpreter, str(folder)])
        _run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(requirements)])
    elif own:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
    else:
        raise ServingError(
            f"The model was made with Python {version}; `pip install uv` to serve it from here."
        )
    (folder / _COMPLETE).write_text(f"{time.monotonic() - began:.1f}", encoding="utf-8")


def _find_uv() -> str | None:
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.is_file() else None)


def _run(command: list[str]) -> None:
    foreign = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServingError(f"Installing took over {_TIMEOUT_SECONDS} s: {command[0]}.") from None
    if done.returncode != 0:
        last = " ".join(done.stderr.split())[-300:]
        raise ServingError(
            f"The model's requirements cannot be installed: {last} "
            "`--env-manager local` serves it in this environment."
        )


_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_PORT_TRIES = 3
_PORT_TAKEN = "address already in use"
# They would bring packages or settings of this process into the model's.
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MLFLOW_RUN_ID")


class Served(Protocol):
    """A model that answers over HTTP while a `with` block runs.

    `description` says where, `installed` how large that is ("" if it is this machine's own);
    `ready_seconds` is how long it may take to start, `started_seconds` how long it took.
    """

    url: str
    ready_seconds: float
    started_seconds: float

    @property
    def description(self) -> str: ...
    @property
    def installed(self) -> str: ...
    def memory_mb(self) -> float: ...
    def last_lines(self) -> str: ...
    def stop(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class ScoringServer(Served):
    """Serves an MLflow model folder while the `with` block runs.

    The command is the one that SageMaker's container runs: uvicorn with MLflow's application, one
    worker. It ends with the block, whatever happened in it.

    Args:
        model: an MLflow model folder.
        ready_seconds: how long it may take until `/ping` answers.

    Raises:
        ServingError: on entering, if it ends or is not ready in time.
    """

    def __init__(
        self, model: Path, environment: Environment, *, ready_seconds: float = 120.0
    ) -> None:
        self.model = model.absolute()
        self.environment = environment
        self.ready_seconds = ready_seconds
        self.url = ""
        self.started_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def description(self) -> str:
        return str(self.environment.python)

    @property
    def installed(self) -> str:
        seconds, size = self.environment.install_seconds, self.environment.size_mb
        if seconds is None or size is None:
            return ""
        return f"clean environment of {size:,.0f} MB, installed in {seconds:.0f} s"

    def __enter__(self) -> Self:
        for tries_left in range(_PORT_TRIES - 1, -1, -1):
            try:
                self._start()
                return self
            except BaseException as error:
                self.stop()
                if not tries_left or _PORT_TAKEN not in str(error):
                    raise
        raise AssertionError("the last try returns or raises")

    def memory_mb(self) -> float:
        """Resident memory of the server and its children, in 10^6 bytes.

        Raises:
            ServingError: it has ended.
        """
        if self._process is None or self._process.poll() is not None:
            raise ServingError(f"The scoring server has ended: {self.last_lines()}")
        try:
            parent = psutil.Process(self._process.pid)
            processes = [parent, *parent.children(recursive=True)]
            return float(sum(process.memory_info().rss for process in processes)) / 1e6
        except psutil.Error as error:
            raise ServingError(f"The scoring server has ended: {error}.") from None

    def last_lines(self) -> str:
        """The end of what it printed, in one line."""
        if self._log is None:
            return "it printed nothing"
        self._log.seek(0)
        return " ".join(self._log.read().decode(errors="replace").split())[-400:]

    def stop(self) -> None:
        """End the server and all that it started."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `stop`
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED_ON}
        began = time.monotonic()
        self._process = subprocess.Popen(
            [str(self.environment.python), "-m", "uvicorn", "--host", "127.0.0.1", "--port",
             str(port), "--log-level", "warning", "mlflow.pyfunc.scoring_server.app:app"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment | {"__pyfunc_model_path__": str(self.model), "PYTHONNOUSERSITE": "1"},
            cwd=tempfile.gettempdir(),
            start_new_session=True,  # a Ctrl-C is ours; `stop` ends the whole group
        )  # fmt: skip
        process = self._process
        wait_until_ready(self, "The scoring server", began, runs=lambda: process.poll() is None)


def wait_until_ready(server: Served, what: str, began: float, *, runs: Callable[[], bool]) -> None:
    """Until a server that was just started answers `/ping`; notes how long that took.

    Args:
        what: the start of a sentence about it.
        began: when it was started, by the monotonic clock.
        runs: whether it has not ended; asked before each ping.

    Raises:
        ServingError: it ended, or is not ready in time; with what it printed.
    """
    while time.monotonic() - began < server.ready_seconds:
        if not runs():
            raise ServingError(f"{what} ended while starting: {server.last_lines()}")
        if answers_ping(server.url):
            server.started_seconds = time.monotonic() - began
            return
        interrupts.sleep(_POLL_SECONDS)
    raise ServingError(
        f"{what} was not ready after {server.ready_seconds:g} s: {server.last_lines()}"
    )


def answers_ping(url: str) -> bool:
    """Whether a server is ready."""
    with requests.Session() as session:
        session.trust_env = False  # no proxy
        try:
            return session.get(f"{url}/ping", timeout=2).status_code == 200
        except requests.RequestException:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# In the container MLflow is imported before the model, which brings its own copy of this package.
QUIET = {n: NO_TELEMETRY[n] for n in ("MLFLOW_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY")}
