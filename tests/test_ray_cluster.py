"""A search that joins a cluster of two machines, and a Ray that does not start or is killed."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from visiontuner.aws.container import Child
from visiontuner.journal import SearchRecord, is_running

pytestmark = pytest.mark.slow

UP_WITHIN_SECONDS = 90


def ray(*arguments: str) -> Child:
    """One machine of one core."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    sizes = ["--num-cpus=1", "--object-store-memory=80000000"]
    return Child([*command, *sizes, "--disable-usage-stats"], os.environ)


def wait_until_up(machine: Child) -> None:
    deadline = time.monotonic() + UP_WITHIN_SECONDS
    while not any("Ray runtime started" in line for line in machine.tail):
        assert not machine.ended, list(machine.tail)
        assert time.monotonic() < deadline, list(machine.tail)
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two machines, which are this one twice.

    They ask for this user's token, as they do wherever a search has run before.
    """
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    own = f"/tmp/ray-{port}"  # Ray's sockets need a short path
    with ExitStack() as machines:
        machines.callback(shutil.rmtree, own, ignore_errors=True)
        head = ray("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={own}")
        wait_until_up(machines.enter_context(head))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        other = ray(f"--address={address}")
        monkeypatch.delenv("RAY_AUTH_MODE")
        wait_until_up(machines.enter_context(other))
        yield address
        assert [head.ended, other.ended] == [False, False], "the search ended the cluster"


def test_a_search_joins_the_cluster_and_leaves_it_running(
    cluster: str,
    images: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    tmp_path: Path,
) -> None:
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": str(images)}
    experiment["search"]["trials"] = 4
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    command = [sys.executable, "-m", "visiontuner", "tune", "--on", "auto"]
    done = subprocess.run(
        [*command, "--experiment", "experiment.yaml", "--output", "search"],
        cwd=tmp_path,
        env={
            **os.environ,
            "RAY_ADDRESS": cluster,
            "MLFLOW_TRACKING_URI": "none",
            "VISIONTUNER_CACHE": str(shared_cache),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    port = cluster.partition(":")[2]
    assert re.search(rf"Joined the Ray cluster at \S+:{port}: 2 machines, 2 cores\.", done.stdout)
    trials = SearchRecord.load(tmp_path / "search").trials
    assert [trial.state for trial in trials.values()] == ["completed"] * 4


def test_a_ray_that_does_not_start_is_one_line_with_the_command_that_goes_on(
    images: Path, small_search: dict[str, Any], shared_cache: Path, tmp_path: Path
) -> None:
    experiment = small_search | {"data": {"source": str(images)}}
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    command = [sys.executable, "-m", "visiontuner", "tune", "--output", "my search"]
    done = subprocess.run(
        [*command, "--experiment", "experiment.yaml"],
        cwd=tmp_path,
        env={
            **os.environ,
            "RAY_gcs_server_port_wait_time_s": "0",  # Ray's first process is never up so soon
            "MLFLOW_TRACKING_URI": "none",
            "VISIONTUNER_CACHE": str(shared_cache),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert told.startswith("Error: Ray does not start here (")
    assert "Then go on with: " in told
    assert told.endswith("visiontuner tune --resume 'my search'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_killed_part_of_ray_ends_a_search_with_the_command_that_goes_on(
    part: str,
    images: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    tmp_path: Path,
) -> None:
    experiment = json.loads(json.dumps(small_search | {"data": {"source": str(images)}}))
    experiment["training"]["epochs"] = 1_000_000  # it lasts until it is killed
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    command = [sys.executable, "-m", "visiontuner", "tune", "--output", "search"]
    with (
        tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as temporary,
        subprocess.Popen(
            [*command, "--experiment", "experiment.yaml"],
            cwd=tmp_path,
            env={
                **os.environ,
                "TMPDIR": temporary,
                "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',  # one worker is enough
                "MLFLOW_TRACKING_URI": "none",
                "VISIONTUNER_CACHE": str(shared_cache),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as search,
    ):
        journal = tmp_path / "search/journal.jsonl"
        while not (journal.is_file() and '"event": "epoch"' in journal.read_text()):
            assert search.poll() is None, search.communicate()[0]
            time.sleep(0.05)
        (found,) = [p for p in psutil.Process(search.pid).children() if p.name() == part]
        found.kill()
        output, _ = search.communicate(timeout=120)
        assert [path.name for path in Path(temporary).glob("vt-*")] == []
    assert search.returncode == 1
    last = output.splitlines()[-1]
    assert last.startswith("Error: A Ray process was killed"), output
    assert "Go on with: " in last
    assert last.endswith("visiontuner tune --resume search")
    assert not is_running(tmp_path / "search")
    assert SearchRecord.load(tmp_path / "search").trials
