"""A search that joins a Ray cluster of two machines, as inside `ray job submit`."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from visiontuner.journal import SearchRecord
from visiontuner.sagemaker.processes import Child

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
    pictures: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    tmp_path: Path,
) -> None:
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": str(pictures)}
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
