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
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from PIL import Image

from visiontuner.aws import request as source
from visiontuner.cli.main import main
from visiontuner.io.s3 import upload_folder
from visiontuner.journal import SearchRecord, read_events
from visiontuner.paths import JOURNAL_FILE
from visiontuner.text import next_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]

BUCKET = "searches"
EPOCHS, TRIALS = 240, 6
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
        until(lambda: answers(uri), seconds=120)
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


def until(condition: Callable[[], Any], *, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)  # what is asked costs the stand-in more than the wait


class Jobs:
    """The jobs of one search, one after the other."""

    def __init__(self, aws: Any) -> None:
        self.aws = aws
        self.s3, self.sagemaker = aws.client("s3"), aws.client("sagemaker")
        self.names: list[str] = []
        self.image = aws.put_image(tag="1", repository="training")
        self.disk = Path(aws.jobs) / "disk-bytes"

    @property
    def name(self) -> str:
        return self.names[-1]

    @property
    def host(self) -> Path:
        return Path(self.aws.jobs) / self.name / "algo-1"

    def submit(self, *arguments: str) -> None:
        """The first job, or with `--resume` the next."""
        # The server's address is a private one, which only a VPC leads to.
        vpc = ("--subnets", "subnet-1", "--security-groups", "sg-1")
        flags = ("--on", "sagemaker", "--image", self.image, "--price", "2", "--yes", "--no-wait")
        done = run("tune", *flags, *vpc, *arguments)
        assert done.exit_code == 0, done.output
        lines = [line for line in done.stdout.splitlines() if line.startswith("Submitted ")]
        self.names.append(lines[0].split()[-1].rstrip("."))

    def resume(self) -> None:
        self.submit("--resume", self.name)

    def status(self) -> str:
        told = self.sagemaker.describe_training_job(TrainingJobName=self.name)
        return str(told["TrainingJobStatus"])

    def when(self, condition: Callable[[], Any]) -> None:
        """Return when something is the case while the job runs."""

        def looked() -> bool:
            assert self.status() == "InProgress", self.log()
            return bool(condition())

        until(looked)

    def come_home(self) -> Result:
        """What `attach` says, once the job has ended."""
        until(lambda: self.status() not in ("InProgress", "Stopping"))
        return run("attach", self.name, "--output", "home")

    def kept(self) -> list[dict[str, Any]]:
        """The events of the journal that S3 has."""
        described = self.sagemaker.describe_training_job(TrainingJobName=self.name)
        prefix = described["CheckpointConfig"]["S3Uri"].removeprefix(f"s3://{BUCKET}/")
        try:
            body = self.s3.get_object(Bucket=BUCKET, Key=f"{prefix}/search/{JOURNAL_FILE}")["Body"]
        except self.s3.exceptions.NoSuchKey:
            return []
        return [json.loads(line) for line in body.read().split(b"\n")[:-1]]

    def log(self) -> str:
        files = [self.host.parent / "runner.log", self.host / "log"]
        return "\n".join(f.read_text(errors="replace")[-4000:] for f in files if f.exists())


@pytest.fixture
def jobs(aws: Any, photos: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """An account with a role, and images on S3."""
    aws.put_role("training")
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    aws.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration=place)
    upload_folder(photos, f"s3://{BUCKET}/images")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    jobs = Jobs(aws)
    yield jobs
    jobs.disk.unlink(missing_ok=True)
    if jobs.names and jobs.status() == "InProgress":
        jobs.sagemaker.stop_training_job(TrainingJobName=jobs.name)
        until(lambda: jobs.status() not in ("InProgress", "Stopping"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def trial_runs(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`visiontuner.kind` = 'trial'")
    by_trial = {run.data.tags["visiontuner.trial_id"]: run for run in runs}
    assert len(by_trial) == len(runs), "a trial is there twice"
    return by_trial


@pytest.mark.usefixtures("hosts_allowed")
def test_a_search_goes_on_after_each_bad_day(
    jobs: Jobs,
    server: str,
    small_search: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": f"s3://{BUCKET}/images/"}
    experiment["model"]["image_size"] = 128
    experiment["training"]["epochs"] = EPOCHS
    experiment["search"]["trials"] = TRIALS
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))

    # Requirements that do not install.
    monkeypatch.setattr(source, "requirements", lambda **_: ["--no-index", "no-such-package==1"])
    jobs.submit("--experiment", "experiment.yaml", "--bucket", BUCKET)
    came = jobs.come_home()
    assert came.exit_code == 1, came.output
    (told,) = [line for line in came.stderr.splitlines() if line.startswith("Error: ")]
    assert "before its search began: No matching distribution found for no-such-package==1" in told
    assert f"tune --on sagemaker --resume {jobs.name}" in told

    # A spot machine is taken, or somebody stops the job, while features are computed. What the
    # hosts need is here already; test_two_hosts.py lets pip look at all of it.
    monkeypatch.setattr(source, "requirements", lambda **_: ["numpy"])
    jobs.resume()
    jobs.when(lambda: list(jobs.host.glob("ml/checkpoints/cache/features/*/shards/train-*0.npy")))
    assert run("stop", jobs.name).exit_code == 0
    came = jobs.come_home()
    assert came.exit_code == 130, came.output + jobs.log()
    again = next_command("tune", "--on", "sagemaker", "--resume", jobs.name)
    assert f"Go on there: {again}" in came.stdout
    assert [event["event"] for event in jobs.kept()] == ["search_started", "search_ended"]

    # The disk is full: there is no room for the next shard.
    jobs.disk.write_text("400000")
    jobs.resume()
    came = jobs.come_home()
    jobs.disk.unlink()
    assert came.exit_code == 1, came.output
    (why,) = [line for line in came.stdout.splitlines() if line.startswith("Why: ")]
    assert "No space left on device" in why
    assert "A disk was full: ask for a larger one with --volume" in why
    assert f"--resume {jobs.name}" in came.stdout

    # The head dies in the middle of a trial, when MLflow has heard of the one before.
    jobs.resume()
    jobs.when(lambda: "trial_ended" in [event["event"] for event in jobs.kept()])
    jobs.when(lambda: "FINISHED" in {run.info.status for run in trial_runs(server).values()})
    os.kill(int((jobs.host / "pid").read_text()), signal.SIGKILL)
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
