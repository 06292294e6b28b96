"""One search whose jobs meet one bad day after the other; each time the next command goes on.

The jobs are submitted, stopped and brought home by the command line, and run on a host of their
own. MLflow is a server that the host reaches, so that runs appear while it trains.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from visiontuner.aws import request as source
from visiontuner.io.s3 import upload_folder
from visiontuner.journal import SearchRecord, read_events
from visiontuner.text import next_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]

EPOCHS, TRIALS = 80, 4
SHARD = 256  # images
SPLITS = {"train": 2 * SHARD, "valid": 12}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than one shard of features holds."""
    root = tmp_path_factory.mktemp("many") / "colours"
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for number in range(count):
            colour = ("red", "green", "blue")[number % 3]
            mean = np.roll([200, 40, 40], number % 3)
            pixels = np.clip(rng.normal(mean, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
            path = root / split / colour / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def server(tmp_path: Path, new_database: Callable[[Path], str]) -> Iterator[str]:
    """URL of an MLflow server at an address of this machine that hosts reach, and nobody else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"10.214.{port >> 8}.{port & 255}"
    uri = f"http://{address}:{port}"
    subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", address, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", new_database(tmp_path / "server.db")]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    command += ["--allowed-hosts", f"{address}:{port}"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["ip", "addr", "del", f"{address}/32", "dev", "lo"], check=True)


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def jobs(
    running_jobs: Any, photos: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Images on S3, and jobs in the private network where the server is."""
    upload_folder(photos, f"s3://{running_jobs.bucket}/images")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    running_jobs.flags += ["--subnets", "subnet-1", "--security-groups", "sg-1"]
    disk = Path(running_jobs.aws.jobs) / "disk-bytes"
    yield running_jobs
    disk.unlink(missing_ok=True)


def trial_runs(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`visiontuner.kind` = 'trial'")
    by_trial = {run.data.tags["visiontuner.trial_id"]: run for run in runs}
    assert len(by_trial) == len(runs), "a trial is there twice"
    return by_trial


def test_a_search_goes_on_after_each_bad_day(
    jobs: Any,
    server: str,
    small_search: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": f"s3://{jobs.bucket}/images/"}
    experiment["model"]["image_size"] = 96
    experiment["training"]["epochs"] = EPOCHS
    experiment["search"] |= {"trials": TRIALS, "baselines": True}
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))

    # Requirements that do not install.
    monkeypatch.setattr(source, "requirements", lambda **_: ["--no-index", "no-such-package==1"])
    jobs.submit("--experiment", "experiment.yaml", "--bucket", jobs.bucket)
    came = jobs.come_home()
    assert came.exit_code == 1, came.output
    (told,) = [line for line in came.stderr.splitlines() if line.startswith("Error: ")]
    assert "before its search began: No matching distribution found for no-such-package==1" in told
    assert f"tune --on sagemaker --resume {jobs.name}" in told
    while not answers(server):  # it started meanwhile
        time.sleep(0.2)

    # A spot machine is taken, or somebody stops the job, while features are computed. What the
    # hosts need is here already; test_two_hosts.py lets pip look at all of it.
    monkeypatch.setattr(source, "requirements", lambda **_: ["numpy"])
    jobs.resume()
    jobs.when(lambda: list(jobs.host().glob("ml/checkpoints/cache/features/*/shards/train-*0.npy")))
    jobs.stop()
    came = jobs.come_home()
    assert came.exit_code == 130, came.output + jobs.log()
    again = next_command("tune", "--on", "sagemaker", "--resume", jobs.name)
    assert f"Go on there: {again}" in came.stdout
    assert [event["event"] for event in jobs.kept()] == ["search_started", "search_ended"]

    # The disk is full: there is no room for the next shard.
    disk = Path(jobs.aws.jobs) / "disk-bytes"
    disk.write_text("400000")
    jobs.resume()
    came = jobs.come_home()
    disk.unlink()
    assert came.exit_code == 1, came.output
    (why,) = [line for line in came.stdout.splitlines() if line.startswith("Why: ")]
    assert "No space left on device" in why
    assert "A disk was full: ask for a larger one with --volume" in why
    assert f"--resume {jobs.name}" in came.stdout

    # The head dies in the middle of a trial, when MLflow has heard of the one before.
    jobs.resume()
    jobs.when(lambda: "trial_ended" in [event["event"] for event in jobs.kept()])
    jobs.when(lambda: "FINISHED" in {run.info.status for run in trial_runs(server).values()})
    jobs.kill("algo-1")
    came = jobs.come_home()
    assert came.exit_code == 1, came.output
    assert "Why: InternalServerError" in came.stdout
    before = SearchRecord.load(tmp_path / "home")
    finished = {trial.trial_id for trial in before.trials.values() if trial.finished}
    assert 1 <= len(finished) < TRIALS
    assert "RUNNING" not in {run.info.status for run in trial_runs(server).values()}

    # A quiet day.
    jobs.resume()
    came = jobs.come_home()
    assert came.exit_code == 0, came.output + jobs.log()
    assert "MLflow model: models:/colours/1" in came.stdout
    assert "in 5 jobs" in came.stdout
    after = SearchRecord.load(tmp_path / "home")
    events = read_events(tmp_path / "home").events
    done = Counter(
        e["trial_id"] for e in events if e.get("state") == "completed" and "trial_id" in e
    )
    assert done == dict.fromkeys(after.trials, 1), "a finished trial ran again"
    assert len(after.trials) == TRIALS
    computed = [event["computed"] for event in events if event["event"] == "features_ready"]
    assert computed[0] <= sum(SPLITS.values()) - SHARD
    assert computed[1:] == [0]
    runs = trial_runs(server)
    assert runs.keys() == after.trials.keys()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    client = MlflowClient(server)
    for trial_id, run_ in runs.items():
        points = client.get_metric_history(run_.info.run_id, "validation_loss")
        steps, values = after.trials[trial_id].curve("validation_loss")
        # What a killed head wrote live and never sent home is there twice, with two times.
        assert {p.step: p.value for p in points} == dict(zip(steps, values, strict=True))
    assert len(client.search_model_versions("name = 'colours'")) == 1
