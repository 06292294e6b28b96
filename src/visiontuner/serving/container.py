"""A model in the container that SageMaker will run, on this machine's Docker engine."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from visiontuner.errors import ServingError, UserMistake
from visiontuner.serving.deployment import QUIET
from visiontuner.serving.environments import wanted_by
from visiontuner.serving.server import Served, wait_until_ready

REPOSITORY = "visiontuner-serving"
# What a deployment tells the container; `serve` is SageMaker's own argument.
VARIABLES = {
    **QUIET,
    "MLFLOW_DEPLOYMENT_FLAVOR_NAME": "python_function",
    "SERVING_ENVIRONMENT": "SageMaker",
}

_PORT = 8080
_LOOK_SECONDS = 1.0
_SAID_BY_ALL = 2 * (os.cpu_count() or 1)  # MLflow starts a worker a core, and all of them again
_CALL_SECONDS = 120.0
_BUILD_SECONDS = 3600.0
_OF_NGINX = re.compile(r"GET /ping|\[(notice|error)\] \d+#")
_TELLING = re.compile(r"[\w.]+(Error|Exception): ")
_MEMORY = re.compile(r"([\d.]+)\s*([KMG]?)i?B")
_BYTES = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30}


def require_engine() -> None:
    """Make sure that a Docker engine answers.

    Raises:
        UserMistake: none does.
    """
    try:
        done = subprocess.run(
            ["docker", "info"], capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        reason = "there is no `docker` command"
    except subprocess.TimeoutExpired:
        reason = "`docker info` does not answer"
    else:
        if done.returncode == 0:
            return
        reason = _last(done.stderr) or "`docker info` fails"
    raise UserMistake(
        f"No Docker engine runs here: {reason.rstrip('.')}. Start Docker, or check the model "
        "without --container."
    )


def build_image(model: Path, *, note: Callable[[str], None] = lambda _: None) -> str:
    """The serving image for a model's requirements, built by MLflow unless it is there.

    Args:
        model: an MLflow model folder. Models with the same requirements share an image: SageMaker
            puts its own model over the one that was built in.

    Returns:
        The image's name.

    Raises:
        ClassifierError: the model does not say what it needs.
        ServingError: it cannot be built.
    """
    import mlflow.version

    requirements, python = wanted_by(model)
    wanted = "\n".join([mlflow.version.VERSION, python, *sorted(requirements.split("\n"))])
    image = f"{REPOSITORY}:{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if not docker("images", "--quiet", image):
        note(f"Building the image {image}; it takes some minutes, once.")
        _build(model, image)
    return image


def _build(model: Path, image: str) -> None:
    command = [sys.executable, "-m", "mlflow", "models", "build-docker", "-m", str(model),
               "-n", image, "--env-manager", "local"]  # fmt: skip
    # Attestations make the image of an OCI type, which SageMaker refuses.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment, timeout=_BUILD_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServingError(f"Building {image} took over {_BUILD_SECONDS:g} s.") from None
    if done.returncode != 0:
        raise ServingError(f"The image {image} cannot be built: {_reason(done.stdout)}")


class Container(Served):
    """Serves an MLflow model folder in a container while the `with` block runs.

    What runs is what `mlflow deployments run-local -t sagemaker` runs; the port is a free one of
    this machine, and the model cannot be written to. It ends with the block.

    Args:
        model: an MLflow model folder.
        image: one that MLflow built.
        ready_seconds: how long it may take until `/ping` answers.

    Raises:
        ServingError: on entering, if it ends or is not ready in time.
    """

    def __init__(self, model: Path, image: str, *, ready_seconds: float = 120.0) -> None:
        self.model = model.absolute()
        self.image = image
        self.ready_seconds = ready_seconds
        self.url = ""
        self.started_seconds = 0.0
        self._id = ""
        self._next_look = 0.0

    @property
    def description(self) -> str:
        return f"the container image {self.image}"

    @property
    def installed(self) -> str:
        size = float(docker("image", "inspect", "--format", "{{.Size}}", self.image)) / 1e6
        return f"image of {size:,.0f} MB"

    def __enter__(self) -> Self:
        variables = [part for k, v in VARIABLES.items() for part in ("--env", f"{k}={v}")]
        began = time.monotonic()
        self._id = docker(
            "run", "--detach", "--volume", f"{self.model}:/opt/ml/model:ro", *variables,
            "--publish", f"127.0.0.1::{_PORT}", self.image, "serve",
        )  # fmt: skip
        try:
            wait_until_ready(self, "The container", began, runs=self._runs)
        except BaseException:
            self.stop()
            raise
        return self

    def memory_mb(self) -> float:
        """What the whole container holds, in 10^6 bytes.

        Raises:
            ServingError: it has ended.
        """
        used = memory_of(self._id)
        if not used:
            raise ServingError(f"The container has ended: {self.last_lines()}")
        return used

    def last_lines(self) -> str:
        """Why it does not serve, or the end of what it printed, in one line."""
        lines = self._log()
        telling = [line for line in lines if _TELLING.match(line)]
        return " ".join(" ".join(telling[-1:] or lines).split())[-400:] or "it printed nothing"

    def stop(self) -> None:
        """End the container and remove it."""
        container, self._id = self._id, ""
        if container:
            with suppress(ServingError):
                docker("rm", "--force", "--volumes", container)

    def _runs(self) -> bool:
        """Whether it has not ended; its port is known from then on.

        Raises:
            ServingError: the server in it cannot start. The container does not end then: MLflow
                starts the server again and again.
        """
        if time.monotonic() < self._next_look:
            return True
        self._next_look = time.monotonic() + _LOOK_SECONDS
        if docker("inspect", "--format", "{{.State.Running}}", self._id) != "true":
            return False
        published = docker("port", self._id, str(_PORT)).splitlines()
        if not published:  # it ended just now
            return False
        self.url = f"http://127.0.0.1:{published[0].rpartition(':')[2]}"
        said = Counter(line for line in self._log() if _TELLING.match(line))
        if said and max(said.values()) >= _SAID_BY_ALL:
            raise ServingError(f"The server in the container cannot start: {self.last_lines()}")
        return True

    def _log(self) -> list[str]:
        """The last lines that it printed, without nginx's."""
        try:
            done = subprocess.run(
                ["docker", "logs", "--tail", "5000", self._id],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return []
        lines = done.stdout.decode(errors="replace").splitlines()
        return [line for line in lines if line.strip() and not _OF_NGINX.search(line)]


def memory_of(container: str) -> float:
    """What a container holds, in 10^6 bytes; 0 if it has ended."""
    used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container)
    match = _MEMORY.match(used)  # as "123.4MiB / 7.7GiB"
    return float(match[1]) * _BYTES[match[2]] / 1e6 if match else 0.0


def docker(*arguments: str) -> str:
    """What one `docker` command prints.

    Raises:
        ServingError: it fails.
    """
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=_CALL_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServingError(f"`docker {arguments[0]}` fails: {type(error).__name__}.") from None
    if done.returncode != 0:
        raise ServingError(f"`docker {arguments[0]}` fails: {_last(done.stderr)}")
    return done.stdout.strip()


def _reason(text: str) -> str:
    """The line of a build's log that says why, if one does."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "ERROR" in line or "denied" in line or "no such" in line]
    return (telling or lines or ["it printed nothing"])[-1][-300:]


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[-300:] if lines else ""
