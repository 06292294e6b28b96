"""The model in the container that SageMaker will run: `make test-container`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from click.testing import CliRunner

from visiontuner.cli.serve import preflight
from visiontuner.errors import ServingError
from visiontuner.model.classifier import Classifier
from visiontuner.serving.answers import Answer, Options
from visiontuner.serving.client import HttpTransport, decode_answers, encode_request
from visiontuner.serving.preflight import (
    Container,
    build_container_image,
    docker,
    memory_of,
    require_engine,
    run_preflight,
)
from visiontuner.serving.server import Served, wait_until_ready

WANTED = "VISIONTUNER_CONTAINER_TESTS"
READY_SECONDS = 180.0
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.environ.get(WANTED) != "1", reason=f"`make test-container` ({WANTED}=1)"),
]

# The classifier that names colours; conftest files of two folders do not see each other.
_specification = importlib.util.spec_from_file_location(
    "colours_in_container", Path(__file__).parent.parent / "serving/conftest.py"
)
assert _specification is not None
assert _specification.loader is not None
colours = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(colours)
colour_classifier = colours.colour_classifier
colour_model = colours.colour_model
photographs = colours.photographs


@pytest.fixture(scope="module")
def image(colour_model: Path) -> str:
    """Built by MLflow for the model, requirements baked in."""
    require_engine()
    return build_container_image(colour_model)


def difference(classifier: Path, images: list[bytes], answers: Sequence[Answer]) -> float:
    """The largest difference of a probability from the classifier's own."""
    own = Classifier.load(classifier)
    rows = [{c["label"]: c["probability"] for c in a.top_k} for a in answers]
    got = np.array([[row[name] for name in own.class_names] for row in rows])
    return float(np.abs(got - own.probabilities(images)).max())


class RunLocal(Served):
    """`mlflow deployments run-local -t sagemaker`, as a shell command."""

    installed = ""
    description = "run-local"
    ready_seconds = READY_SECONDS

    def __init__(self, model: Path, image: str, log: Path) -> None:
        self.name = f"colours-{uuid.uuid4().hex[:8]}"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.started_seconds = 0.0
        self.command = [
            sys.executable, "-m", "mlflow", "deployments", "run-local", "-t", "sagemaker",
            "--name", self.name, "-m", str(model), "-C", f"image={image}", "-C",
            f"port={self.port}",
        ]  # fmt: skip

    def containers(self) -> list[str]:
        return docker("ps", "--quiet", "--filter", f"publish={self.port}").split()

    def memory_mb(self) -> float:
        return memory_of(self.containers()[0])

    def last_lines(self) -> str:
        return self.log.read_text()[-400:]

    def __enter__(self) -> Self:
        began = time.monotonic()
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.process = process
        try:
            wait_until_ready(self, "run-local", began, runs=lambda: process.poll() is None)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for container in self.containers():
            docker("rm", "--force", container)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_image_holds_what_serving_needs_and_no_torch(image: str, colour_model: Path) -> None:
    listed = json.loads(
        docker("run", "--rm", "--entrypoint", "python", image, "-m", "pip", "list",
               "--format", "json")
    )  # fmt: skip
    versions = {package["name"].lower(): package["version"] for package in listed}
    pinned = dict(
        line.split("==") for line in (colour_model / "requirements.txt").read_text().splitlines()
    )
    assert pinned.items() <= versions.items()
    assert not {"torch", "torchvision", "timm", "ray", "sagemaker", "visiontuner"} & set(versions)
    assert not [name for name in versions if name.startswith("nvidia")]
    platform = docker("image", "inspect", "--format", "{{.Os}}/{{.Architecture}}", image)
    assert platform == "linux/amd64"
    assert build_container_image(colour_model) == image


@pytest.fixture(scope="module")
def run_local(image: str, colour_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunLocal:
    return RunLocal(colour_model, image, tmp_path_factory.mktemp("run-local") / "log")


def test_mlflows_own_sagemaker_container_passes_the_preflight(
    run_local: RunLocal, colour_model: Path, colour_classifier: Path, photographs: list[bytes]
) -> None:
    report = run_preflight(colour_model, run_local, name="colours", requests_measured=40)
    assert not {c.name: c.detail for c in report.checks if c.status != "ok"}
    assert run_local.containers() == []
    with run_local:
        transport = HttpTransport(run_local.url)
        answers = [
            answer
            for start in range(0, 50, 10)
            for answer in transport.ask(photographs[start : start + 10], Options(top_k=3))
        ]
    assert difference(colour_classifier, photographs, answers) <= 1e-5


ASK = """
import sys, time, urllib.error, urllib.request
body = sys.stdin.buffer.read()
for _ in range(600):
    try:
        urllib.request.urlopen("http://127.0.0.1:8080/ping", timeout=2)
        break
    except (urllib.error.URLError, OSError):
        time.sleep(0.2)
headers = {"Content-Type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8080/invocations", body, headers)
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=60).read())
"""


@pytest.fixture
def cut_off(image: str, colour_model: Path) -> Iterator[str]:
    """A container without any network but its own loopback."""
    container = docker(
        "run", "--detach", "--network", "none", "--volume", f"{colour_model}:/opt/ml/model:ro",
        image, "serve",
    )  # fmt: skip
    yield container
    docker("rm", "--force", container)


def test_it_serves_without_any_network(
    cut_off: str, colour_classifier: Path, photographs: list[bytes]
) -> None:
    body = encode_request(photographs, Options(top_k=3))
    done = subprocess.run(
        ["docker", "exec", "--interactive", cut_off, "python", "-c", ASK],
        input=body, capture_output=True, timeout=READY_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-500:]
    answers = decode_answers(done.stdout, len(photographs))
    assert difference(colour_classifier, photographs, answers) <= 1e-5


def test_preflight_serves_in_the_container_and_leaves_none(image: str, colour_model: Path) -> None:
    before = docker("ps", "--all", "--quiet")
    done = CliRunner().invoke(preflight, [str(colour_model), "--container"])
    assert done.exit_code == 0, done.output
    assert image in done.stderr
    assert "FAIL" not in done.stdout
    assert docker("ps", "--all", "--quiet") == before


def test_a_model_that_cannot_be_loaded_is_said_in_one_line_and_leaves_no_container(
    image: str, colour_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(colour_model, tmp_path / "model")
    (copy / "artifacts" / "classifier" / "model.onnx").write_bytes(b"damaged")
    before = docker("ps", "--all", "--quiet")
    with (
        pytest.raises(ServingError, match=r"model\.onnx is damaged") as said,
        Container(copy, image, ready_seconds=30),
    ):
        pass
    assert "\n" not in str(said.value)
    assert docker("ps", "--all", "--quiet") == before
