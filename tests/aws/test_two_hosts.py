"""Searches over two hosts of a training job, each with its own files, network and processes."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from visiontuner.journal import SearchRecord, read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUCKET = "searches"
TRIALS = 16


@pytest.fixture
def account(request: pytest.FixtureRequest, aws: Any, images: Path) -> Any:
    """A role that SageMaker may use, and the coloured images on S3."""
    request.getfixturevalue("hosts_allowed")
    aws.put_role("training")
    s3 = aws.client("s3")
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration=place)
    upload(s3, images, "images")
    return aws


def upload(s3: Any, folder: Path, prefix: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            s3.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


def runs_by_trial(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`visiontuner.kind` = 'trial'")
    by_trial = {run.data.tags["visiontuner.trial_id"]: run for run in runs}
    assert len(by_trial) == len(runs), "a trial is there twice"
    return by_trial


# What a machine's speed has no part in.
METRICS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


def curves(record: SearchRecord) -> dict[str, Any]:
    return {
        trial_id: (trial.configuration, {name: trial.curve(name) for name in METRICS})
        for trial_id, trial in record.trials.items()
    }


def written(uri: str, search: SearchRecord) -> dict[str, Any]:
    """What MLflow holds of a search's trials, but for ids, times and speeds."""
    client, found = MlflowClient(uri), {}
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    of_this = f"tags.`visiontuner.search_id` = '{search.search_id}'"
    for run in client.search_runs([experiment.experiment_id], of_this):
        trial_id = run.data.tags.get("visiontuner.trial_id")
        if trial_id is not None:
            points = {
                name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]
                for name in (*METRICS, f"best_{search.objective}", "learning_rate")
            }
            # Ids, what depends on which trials had ended before, and where the code came from.
            apart = {"visiontuner.search_id", "mlflow.parentRunId", "visiontuner.findings",
                     "mlflow.note.content", "mlflow.source.git.commit"}  # fmt: skip
            tags = {key: value for key, value in run.data.tags.items() if key not in apart}
            found[trial_id] = {
                "status": run.info.status,
                "params": run.data.params,
                "points": points,
                # What a job costs is known of jobs alone.
                "metrics": run.data.metrics.keys() - {"seconds", "cost_usd"},
                "tags": tags,
            }
    return found


def hosts_of(folder: Path) -> set[str]:
    return {e["host"] for e in read_events(folder).events if e["event"] == "trial_ended"}


def test_a_search_on_two_hosts_comes_home_with_the_numbers_of_a_local_one(
    account: Any,
    small_search: dict[str, Any],
    shared_cache: Path,
    new_database: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    images = tmp_path / "many"
    draw_many(images, {"train": 340, "valid": 12})
    upload(account.client("s3"), images, "many")
    experiment = json.loads(json.dumps(small_search))
    experiment["search"]["trials"] = 6
    experiment["data"] = {"source": f"s3://{BUCKET}/many/"}
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    uri = new_database(tmp_path / "mlflow.db")
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "VISIONTUNER_CACHE": str(shared_cache),
    }

    def tune(*arguments: str) -> str:
        command = [sys.executable, "-m", "visiontuner", "tune", "--experiment", "experiment.yaml"]
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    image = account.put_image(tag="2.14-gpu", repository="pytorch-training")
    job = ("--on", "sagemaker", "--instances", "2", "--image", image, "--price", "1.4", "--yes")
    said = tune(*job, "--output", "far")
    far = SearchRecord.load(tmp_path / "far")

    assert len(far.trials) == 6
    assert hosts_of(tmp_path / "far") == {"algo-1", "algo-2"}
    (ready,) = [e for e in read_events(tmp_path / "far").events if e["event"] == "features_ready"]
    assert ready["computed"] == 3 * (340 + 12)
    assert ready["engine"].startswith("2 machines or GPUs, each by ONNX Runtime")
    runs = runs_by_trial(uri)
    assert runs.keys() == far.trials.keys()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "models:/colours/1" in said
    assert MlflowClient(uri).get_model_version("colours", "1").status == "READY"
    # Nothing of this search is SageMaker's: its SDK could not even be imported.
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison/sagemaker.py").write_text("raise SystemExit('imported the SDK')")
    paths = [str(tmp_path / "poison"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    tune("--data", str(images), "--output", "near")
    near = SearchRecord.load(tmp_path / "near")
    assert curves(far) == curves(near)
    held, here = written(uri, far), written(uri, near)
    assert held.keys() == here.keys()
    for name in near.trials:  # a regression's last digits depend on the number of threads
        assert held[name] == here[name], name


class Job:
    """A training job made by hand, without a package to install: what the SDK adds is not here."""

    def __init__(self, account: Any, folder: Path, experiment: dict[str, Any]) -> None:
        import visiontuner

        self.account = account
        self.s3, self.sagemaker = account.client("s3"), account.client("sagemaker")
        self.folder = folder
        self.names: list[str] = []
        code = folder / "code"
        ignored = shutil.ignore_patterns("__pycache__")
        package = Path(visiontuner.__file__).parent
        shutil.copytree(package, code / "visiontuner", ignore=ignored)
        orders = {
            "checkpoints": "/opt/ml/checkpoints",
            "token": secrets.token_hex(32),
            "tracking_uri": None,
        }
        (code / "job.json").write_text(json.dumps(orders))
        experiment = experiment | {"data": {"source": "/opt/ml/input/data/images"}}
        (code / "experiment.yaml").write_text(json.dumps(experiment))
        upload(self.s3, code, "code")

    def start(self) -> Path:
        """A new job on the same checkpoints; the folder of its hosts."""
        name = f"search-{secrets.token_hex(4)}"
        command = "cd /opt/ml/input/data/code && exec python -m visiontuner.aws.container"
        self.sagemaker.create_training_job(
            TrainingJobName=name,
            RoleArn="arn:aws:iam::123456789012:role/training",
            AlgorithmSpecification={
                "TrainingImage": "image",
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["/bin/bash"],
                "ContainerArguments": ["-c", command],
            },
            ResourceConfig={
                "InstanceCount": 2,
                "InstanceType": "ml.g5.xlarge",
                "VolumeSizeInGB": 1,
            },
            InputDataConfig=[self._channel("code"), self._channel("images")],
            CheckpointConfig={"S3Uri": f"s3://{BUCKET}/checkpoints"},
            OutputDataConfig={"S3OutputPath": f"s3://{BUCKET}/output"},
            StoppingCondition={"MaxRuntimeInSeconds": 300},
        )
        self.names.append(name)
        return Path(self.account.jobs) / name

    def events(self, hosts: Path, kind: str) -> list[dict[str, Any]]:
        """Of the journal on the head's own disk."""
        folder = hosts / "algo-1/ml/checkpoints/search"
        if not (folder / "journal.jsonl").exists():
            return []
        return [event for event in read_events(folder).events if event["event"] == kind]

    def when(self, hosts: Path, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 400
        while not condition():
            assert self.status() == "InProgress", self.logs(hosts)
            assert time.monotonic() < deadline, self.logs(hosts)
            time.sleep(0.2)

    def status(self, name: str | None = None) -> str:
        described = self.sagemaker.describe_training_job(TrainingJobName=name or self.names[-1])
        return str(described["TrainingJobStatus"])

    def end(self, hosts: Path) -> str:
        deadline = time.monotonic() + 400
        while (status := self.status()) in ("InProgress", "Stopping"):
            assert time.monotonic() < deadline, self.logs(hosts)
            time.sleep(0.2)
        return status

    def checkpoints(self) -> Path:
        """What lies on S3 for the next job."""
        folder = self.folder / f"checkpoints-{len(self.names)}"
        pages = self.s3.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=BUCKET, Prefix="checkpoints/search/"):
            for entry in page["Contents"]:
                path = folder / entry["Key"].removeprefix("checkpoints/search/")
                path.parent.mkdir(parents=True, exist_ok=True)
                self.s3.download_file(BUCKET, entry["Key"], str(path))
        return folder

    def logs(self, hosts: Path) -> str:
        files = [hosts / "runner.log", *sorted(hosts.glob("algo-*/log"))]
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in files)

    def _channel(self, name: str) -> dict[str, Any]:
        source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/{name}"}
        return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


@pytest.fixture
def job(account: Any, small_search: dict[str, Any], tmp_path: Path) -> Iterator[Job]:
    experiment = json.loads(json.dumps(small_search))
    experiment["training"]["epochs"] = 60
    experiment["search"]["trials"] = TRIALS
    job = Job(account, tmp_path, experiment)
    yield job
    for name in job.names:
        if job.status(name) == "InProgress":
            job.sagemaker.stop_training_job(TrainingJobName=name)
            job.end(Path(job.account.jobs) / name)


def test_an_interrupted_search_on_two_hosts_goes_on_and_survives_the_loss_of_one(job: Job) -> None:
    hosts = job.start()
    job.when(hosts, lambda: len(job.events(hosts, "trial_ended")) >= 3)
    # To the hosts it is what a spot interruption is: SIGTERM.
    job.sagemaker.stop_training_job(TrainingJobName=job.names[-1])
    assert job.end(hosts) == "Stopped", job.logs(hosts)
    before = SearchRecord.load(job.checkpoints())
    finished = {trial_id for trial_id, trial in before.trials.items() if trial.finished}
    assert 3 <= len(finished) < TRIALS
    assert before.ended is not None
    assert before.ended["state"] == "interrupted"

    hosts = job.start()
    job.when(hosts, lambda: ran_on(job.events(hosts, "trial_ended"), "algo-2", after=finished))
    os.kill(int((hosts / "algo-2/pid").read_text()), signal.SIGKILL)
    assert job.end(hosts) == "Completed", job.logs(hosts)

    folder = job.checkpoints()
    after = SearchRecord.load(folder)
    assert len(after.trials) == TRIALS
    assert {trial.state for trial in after.trials.values()} == {"completed"}
    ended = [e for e in read_events(folder).events if e["event"] == "trial_ended"]
    done = [e["trial_id"] for e in ended if e["state"] == "completed"]
    assert sorted(done) == sorted(after.trials), "a finished trial ran again"
    assert {t: curves(before)[t] for t in finished} == {t: curves(after)[t] for t in finished}
    lost = [e["trial_id"] for e in ended if e["reason"] == "its worker died"]
    assert len(lost) == 1
    assert after.trials[lost[0]].attempt > 1
    computed = [e["computed"] for e in read_events(folder).events if e["event"] == "features_ready"]
    assert computed == [42, 0]
    assert (folder / "classifier/classifier.json").is_file()


def draw_many(folder: Path, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for label in ("a", "b", "c"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")


def ran_on(ended: list[dict[str, Any]], host: str, *, after: set[str]) -> bool:
    return any(event.get("host") == host and event["trial_id"] not in after for event in ended)
