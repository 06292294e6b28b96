"""What the main commands leave on the machine, and whom they call."""

import base64
import ipaddress
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.version
import pytest

from visiontuner import NO_TELEMETRY
from visiontuner.model.backbones import load_backbone
from visiontuner.model.onnx import export_backbone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Variables of a shell whose values nobody else may learn.
IN_VARIABLES = {
    name: secrets.token_hex(20)
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_SECURITY_TOKEN",
        "DATABRICKS_TOKEN",
        "GITHUB_TOKEN",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "WANDB_API_KEY",
    )
}
# Stands in the SageMaker SDK's place for a command and all processes that it starts.
POISON = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
raise ImportError("the SageMaker SDK")
"""

# Secrets in URLs that the commands are given.
IN_URLS: dict[str, str] = {}
SECRETS = IN_VARIABLES | IN_URLS

# Set by continuous integration, or by this process, which has imported visiontuner: with one of
# them libraries send nothing anyway.
QUIETER = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "DO_NOT_TRACK", *NO_TELEMETRY)

REGION = "eu-west-1"

# Python's own connections and look-ups, where there is no strace; beside it the names.
RECORDER = """
import atexit, os, sys, threading
def record(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        told = args[1][:2]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        told = (args[0], 0)
    else:
        return
    log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"{{told[0]}} {{told[1]}}\\n".encode())
    os.close(log)
def wait():
    # The SageMaker SDK reports from a thread that ends with the process.
    for thread in threading.enumerate():
        if thread.name == "sagemaker-telemetry":
            thread.join(20)
sys.addaudithook(record)
atexit.register(wait)
"""


@dataclass
class Machine:
    """Where the commands run: everything that they write is below `root`, `logs` is ours."""

    root: Path
    logs: Path
    environment: dict[str, str]
    printed: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, *arguments: str, **more: str) -> None:
        done = subprocess.run(
            [*self._strace(), sys.executable, "-m", "visiontuner", *arguments],
            cwd=self.root / "work",
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        self.printed[name], self.codes[name] = done.stdout, done.returncode

    def _strace(self) -> list[str]:
        strace = shutil.which("strace")
        if strace is None:
            return []
        seen = ["-e", "trace=connect,sendto,sendmmsg", "-e", "signal=none"]
        return [strace, "-f", "-A", "-qq", "--seccomp-bpf", *seen, "-o", str(self.logs / "strace")]

    def calls(self) -> set[tuple[str, int]]:
        """Every host and port that was called or looked up."""
        found = set()
        for line in (self.logs / "python").read_text().splitlines():
            host, _, port = line.rpartition(" ")
            found.add((host.removeprefix("b'").removesuffix("'"), int(port)))
        address = re.compile(r'htons\((\d+)\).*?inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"')
        with suppress(FileNotFoundError):
            text = (self.logs / "strace").read_text(errors="replace")
            found |= {(host, int(port)) for port, host in address.findall(text)}
        return found

    def leaks(self) -> dict[str, list[str]]:
        """Each file, or command, that tells a secret: the secrets' names."""
        content = {f"visiontuner {name}": text.encode() for name, text in self.printed.items()}
        for path in self.root.rglob("*"):
            if path.is_file():
                content[str(path.relative_to(self.root))] = path.read_bytes()
        found = {place: sorted(secrets_in(text)) for place, text in content.items()}
        return {place: names for place, names in found.items() if names}


def secrets_in(text: bytes) -> Iterator[str]:
    for name, value in SECRETS.items():
        if value.encode() in text or base64.b64encode(value.encode()).rstrip(b"=") in text:
            yield name


@pytest.fixture(scope="module")
def machine(
    stand_in: Any,
    images: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    new_database: Callable[[Path], str],
) -> Iterator[Machine]:
    """A search, an evaluation, a preflight, two deployments, one of them refused, and a job."""
    stand_in.reset()
    stand_in.put_image(tag=mlflow.version.VERSION)
    stand_in.put_role("endpoints")
    image = stand_in.put_image(tag="1", repository="jobs")
    s3 = stand_in.client("s3")
    s3.create_bucket(Bucket="photos", CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket="photos", Key="colours/train/red/1.png", Body=b"x" * 100)
    # Ray's sockets need a short path, in which it would otherwise leave its logs.
    with (
        tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as root,
        tempfile.TemporaryDirectory() as logs,
    ):
        machine = Machine(Path(root), Path(logs), _environment(Path(root), stand_in.environment))
        for name in ("work", "home", "t", "cache"):
            (machine.root / name).mkdir()
        exported = export_backbone(
            load_backbone("resnet18", weights="none", image_size=32, cache=shared_cache),
            cache=shared_cache,
        ).parent
        shutil.copytree(exported, machine.root / "cache" / exported.relative_to(shared_cache))
        (machine.logs / "sitecustomize.py").write_text(RECORDER.format(log=f"{logs}/python"))
        paths = [logs, *filter(None, [os.environ.get("PYTHONPATH")])]
        machine.environment["PYTHONPATH"] = os.pathsep.join(paths)
        new_database(machine.root / "work/mlflow.db")
        small = {
            "data": {"source": str(images)},
            "training": {"epochs": 2},
            "search": {**small_search["search"], "trials": 1},
        }
        experiment = json.dumps(small_search | small)
        (machine.root / "work/experiment.yaml").write_text(experiment)
        (machine.logs / "poison").mkdir()
        (machine.logs / "poison/sagemaker.py").write_text(POISON)
        without_sdk = os.pathsep.join([f"{logs}/poison", *paths])
        search = ["--experiment", "experiment.yaml", "--output", "search"]
        machine.run("tune", "tune", *search, PYTHONPATH=without_sdk)
        machine.run("evaluate", "evaluate", "search", PYTHONPATH=without_sdk)
        local = ["--env-manager", "local"]
        machine.run("preflight", "preflight", "colours/1", *local)
        machine.run("deploy", "deploy", "colours/1", "--dry-run", *local)
        machine.run("refused", "deploy", "colours/1", "--role", "nobody", *local)
        job = [
            "--on",
            "sagemaker",
            "--image",
            image,
            "--price",
            "2",
            "--data",
            "s3://photos/colours",
        ]
        machine.run("submit", "tune", *job, "--yes", "--no-wait")
        yield machine


def _environment(root: Path, aws: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_") and k not in QUIETER}
    return {
        **kept,
        **aws,
        **SECRETS,
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "t"),
        "VISIONTUNER_CACHE": str(root / "cache"),
    }


def test_the_commands_did_what_they_are_for(machine: Machine) -> None:
    failed = {name for name, code in machine.codes.items() if code}
    assert failed == {"refused"}, machine.printed
    assert "nobody" in machine.printed["refused"]
    assert "Submitted " in machine.printed["submit"]


def test_a_local_search_never_imports_the_sagemaker_sdk(machine: Machine) -> None:
    assert machine.codes["tune"] == machine.codes["evaluate"] == 0
    assert not (machine.logs / "poison/imported").exists()


def test_nothing_tells_a_secret(machine: Machine) -> None:
    assert machine.leaks() == {}


def test_a_secret_in_any_file_would_be_found(machine: Machine) -> None:
    """The search above looks where commands write, and hidden files too."""
    planted = machine.root / "t/.hidden/log"
    planted.parent.mkdir()
    planted.write_text(f"token={IN_VARIABLES['HF_TOKEN']}")
    try:
        assert machine.leaks() == {"t/.hidden/log": ["HF_TOKEN"]}
    finally:
        shutil.rmtree(planted.parent)


def test_nothing_but_torchs_folder_is_left_among_temporary_files(machine: Machine) -> None:
    left = [path.name for path in (machine.root / "t").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []


def test_nothing_calls_beyond_this_machine(machine: Machine) -> None:
    calls = machine.calls()
    assert any(host == "127.0.0.1" for host, _ in calls), "nothing was recorded"
    assert sorted(call for call in calls if not _stays_here(*call)) == []


def _stays_here(host: str, port: int) -> bool:
    if port == 53:  # a name server, perhaps one on this machine
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("None", "localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified
