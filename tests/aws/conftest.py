"""The AWS stand-in that every AWS test shares, and a model to put behind an endpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.cli.main import main
from visiontuner.journal import read_events
from visiontuner.paths import JOURNAL_FILE

HERE = Path(__file__).parent
REGION = "eu-west-1"
ACCOUNT = "123456789012"  # moto's
REPOSITORY = "mlflow-pyfunc"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def _conftest_of(folder: str) -> ModuleType:
    """Conftest files of two folders do not see each other."""
    path = HERE.parent / folder / "conftest.py"
    specification = importlib.util.spec_from_file_location(f"{folder}_conftest", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# The classifier that names colours, and searches whose journals are written by hand.
colours, journals = _conftest_of("serving"), _conftest_of("tracking")
colour_classifier = colours.colour_classifier
colour_model = colours.colour_model
make_image = colours.make_image
photographs = colours.photographs
new_search = journals.new_search


@dataclass(frozen=True)
class Aws:
    """The stand-in: its URL, the environment of who uses it, and the folder of training jobs."""

    url: str
    environment: dict[str, str]
    jobs: Path
    process: subprocess.Popen[str]
    _clients: dict[tuple[str, str], Any] = field(default_factory=dict)

    def client(self, service: str, region: str = REGION) -> Any:
        """May do everything, and is made once: to make one takes longer than most requests."""
        if (service, region) not in self._clients:
            self._clients[service, region] = self._new_client(service, region)
        return self._clients[service, region]

    def _new_client(self, service: str, region: str = REGION) -> Any:
        import boto3

        return boto3.client(
            service,
            region_name=region,
            endpoint_url=self.url,
            aws_access_key_id="preparing",  # "testing" runs the commands
            aws_secret_access_key="testing",
        )

    def reset(self) -> None:
        """Forget everything."""
        import requests

        code = self.process.poll()
        assert code is None, f"the stand-in has ended with {code}"

        requests.post(f"{self.url}/moto-api/reset", timeout=10).raise_for_status()

    def take_bucket(self, name: str) -> None:
        """Another account makes a bucket and lets everybody write to it."""
        s3 = self._new_client("s3")
        s3.meta.events.register(
            "before-sign.s3",
            lambda request, **_: request.headers.add_header("x-moto-account-id", "210987654321"),
        )
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})

    def put_image(
        self,
        *,
        tag: str,
        architecture: str = "amd64",
        media_type: str = DOCKER_MANIFEST,
        repository: str = REPOSITORY,
    ) -> str:
        """An image in ECR that nobody could start; returns its URL."""
        ecr, s3 = self.client("ecr"), self.client("s3")
        there = [each["repositoryName"] for each in ecr.describe_repositories()["repositories"]]
        if repository not in there:
            ecr.create_repository(repositoryName=repository)
        if not there:
            s3.create_bucket(
                Bucket="ecr-layers", CreateBucketConfiguration={"LocationConstraint": REGION}
            )
        config = json.dumps({"architecture": architecture, "os": "linux"}).encode()
        digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        s3.put_object(
            Bucket="ecr-layers", Key=digest.replace(":", "-"), Body=config, ACL="public-read"
        )
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {"digest": digest, "size": len(config)},
            "layers": [],
        }
        ecr.put_image(
            repositoryName=repository,
            imageTag=tag,
            imageManifest=json.dumps(manifest),
            imageManifestMediaType=media_type,
        )
        return f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{repository}:{tag}"

    def put_role(self, name: str, service: str = "sagemaker.amazonaws.com") -> str:
        """A role that a service may take on; returns its ARN."""
        trust = {
            "Version": "2012-10-17",
            "Statement": [
                {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
            ],
        }
        arn: str = self.client("iam").create_role(
            RoleName=name, AssumeRolePolicyDocument=json.dumps(trust)
        )["Role"]["Arn"]
        return arn

    def holds(self, region: str = REGION) -> dict[str, list[str]]:
        """What a deployment makes: all of it that is there, by kind."""
        sagemaker, s3 = self.client("sagemaker", region), self.client("s3", region)
        keys = []
        for bucket in s3.list_buckets()["Buckets"]:
            if bucket["Name"] not in ("ecr-layers", "kept"):  # what was captured stays the user's
                objects = s3.list_objects_v2(Bucket=bucket["Name"]).get("Contents", [])
                keys += [entry["Key"] for entry in objects]
        return {
            "endpoints": [e["EndpointName"] for e in sagemaker.list_endpoints()["Endpoints"]],
            "configs": [
                c["EndpointConfigName"]
                for c in sagemaker.list_endpoint_configs()["EndpointConfigs"]
            ],
            "models": [m["ModelName"] for m in sagemaker.list_models()["Models"]],
            "objects": keys,
        }


@pytest.fixture(scope="session", autouse=True)
def _service_models_are_read_once() -> Iterator[None]:
    """Each session of boto3 reads them anew, up to a second for a command that asks SageMaker."""
    import botocore.session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory, calls_of_all_tests: Path) -> Iterator[Aws]:
    """The server; its resources are of all tests, see `aws`."""
    nowhere = tmp_path_factory.mktemp("no-aws-settings")
    log = (nowhere / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(HERE / "stand_in.py")],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=_without_aws()
        | {
            "MOTO_IAM_LOAD_MANAGED_POLICIES": "false",
            "STAND_IN_JOBS": str(nowhere / "jobs"),
            "STAND_IN_CALLS": str(calls_of_all_tests),
        },
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, (nowhere / "log").read_text()
        url = f"http://127.0.0.1:{port}"
        yield Aws(url, _settings(url, nowhere), nowhere / "jobs", process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        log.close()


@pytest.fixture
def aws(stand_in: Aws, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """An empty account with an image and an execution role; this process talks to nothing else."""
    stand_in.reset()
    for name in (*(name for name in os.environ if name.startswith("AWS_")), *_PROXIES):
        monkeypatch.delenv(name, raising=False)
    for name, value in stand_in.environment.items():
        monkeypatch.setenv(name, value)
    import boto3

    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    # The stand-in's endpoints are there at once, once their server runs.
    monkeypatch.setattr("visiontuner.aws.endpoint._FIRST_POLL_SECONDS", 0.05)
    return stand_in


@dataclass(frozen=True)
class DirectedJobs:
    """Jobs of one search that run nothing: a test says what becomes of them."""

    aws: Aws
    root = "jobs/visiontuner/colours-1"

    def place(self, name: str = "visiontuner-colours-20261122224611", **request: Any) -> str:
        """A job as `tune --on sagemaker` leaves it; returns its name."""
        tags = {"visiontuner.search": "colours-1", "visiontuner.price_per_hour": "2"}
        asked = {
            "AlgorithmSpecification": {
                "TrainingImage": "example/directed:1",
                "TrainingInputMode": "File",
            },
            "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/jobs",
            "OutputDataConfig": {"S3OutputPath": f"s3://{self.root}/output"},
            "CheckpointConfig": {
                "S3Uri": f"s3://{self.root}/checkpoints",
                "LocalPath": "/opt/ml/checkpoints",
            },
            "ResourceConfig": {
                "InstanceType": "ml.g5.xlarge",
                "InstanceCount": 1,
                "VolumeSizeInGB": 50,
            },
            "StoppingCondition": {"MaxRuntimeInSeconds": 7200},
            "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
        }
        self.aws.client("sagemaker").create_training_job(TrainingJobName=name, **asked | request)
        return name

    def direct(self, job: str, **told: Any) -> None:
        """See `stand_in_jobs`."""
        body = json.dumps(told).encode()
        self.aws.client("s3").put_object(Bucket="directed-jobs", Key=f"{job}.json", Body=body)

    def describe(self, job: str) -> dict[str, Any]:
        told: dict[str, Any] = self.aws.client("sagemaker").describe_training_job(
            TrainingJobName=job
        )
        return told

    def keep_checkpoints(self, search: Path) -> None:
        """What SageMaker would have synchronised of a search folder."""
        bucket, _, prefix = self.root.partition("/")
        for path in search.rglob("*"):
            if path.is_file() and "mlflow." not in path.name:
                key = f"{prefix}/checkpoints/search/{path.relative_to(search)}"
                self.aws.client("s3").put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def keep_archive(self, job: str, search: Path) -> None:
        """The model.tar.gz of a search as it is now."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.add(search, "search")
        place = self.describe(job)["ModelArtifacts"]["S3ModelArtifacts"].removeprefix("s3://")
        bucket, _, key = place.partition("/")
        self.aws.client("s3").put_object(Bucket=bucket, Key=key, Body=packed.getvalue())

    def direct_next(self, search: Path) -> None:
        """The next job, whatever its image, completes with a search."""
        self.aws.client("s3").put_object(Bucket="directed-jobs", Key="all", Body=b"true")
        sagemaker = self.aws.client("sagemaker")
        while not (jobs := sagemaker.list_training_jobs()["TrainingJobSummaries"]):
            time.sleep(0.1)
        name = jobs[0]["TrainingJobName"]
        self.keep_archive(name, search)
        self.direct(name, status="Completed", seconds=60)

    def log(self, job: str, *lines: str) -> None:
        """Lines of its first host in CloudWatch."""
        logs = self.aws.client("logs")
        stream = {
            "logGroupName": "/aws/sagemaker/TrainingJobs",
            "logStreamName": f"{job}/algo-1-1700000000",
        }
        if not logs.describe_log_groups()["logGroups"]:
            logs.create_log_group(logGroupName=stream["logGroupName"])
            logs.create_log_stream(**stream)
        now = int(time.time() * 1000)
        logs.put_log_events(**stream, logEvents=[{"timestamp": now, "message": m} for m in lines])


@pytest.fixture
def directed(aws: Aws) -> DirectedJobs:
    """An account with the buckets of jobs that a test directs."""
    place = {"LocationConstraint": REGION}
    for bucket in ("jobs", "directed-jobs"):
        aws.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration=place)
    return DirectedJobs(aws)


@pytest.fixture(scope="session")
def hosts_allowed() -> None:
    """Skips with the reason where there can be no hosts."""
    probe = subprocess.run(
        [
            sys.executable,
            "-c",
            "import namespaces; print(namespaces.reason_against() or '', end='')",
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if probe.stdout or probe.returncode:
        pytest.skip(probe.stdout or probe.stderr.strip()[-200:])


class RunningJobs:
    """The jobs of one search, one after the other; the command line submits and fetches them."""

    bucket = "searches"

    def __init__(self, aws: Aws) -> None:
        self.aws = aws
        self.s3, self.sagemaker = aws.client("s3"), aws.client("sagemaker")
        self.names: list[str] = []
        image = aws.put_image(tag="1", repository="training")
        self.flags = ["--on", "sagemaker", "--image", image, "--price", "2", "--yes", "--no-wait"]

    @property
    def name(self) -> str:
        return self.names[-1]

    def host(self, name: str = "algo-1") -> Path:
        return Path(self.aws.jobs) / self.name / name

    def submit(self, *arguments: str) -> None:
        """The first job, or with `--resume` the next."""
        done = self.run("tune", *self.flags, *arguments)
        assert done.exit_code == 0, done.output
        lines = [line for line in done.stdout.splitlines() if line.startswith("Submitted ")]
        self.names.append(lines[0].split()[-1].rstrip("."))

    def resume(self) -> None:
        self.submit("--resume", self.name)

    def stop(self) -> None:
        """To the hosts it is what a spot interruption is: SIGTERM."""
        assert self.run("stop", self.name).exit_code == 0

    def kill(self, host: str) -> None:
        os.kill(int((self.host(host) / "pid").read_text()), signal.SIGKILL)

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
        return self.run("attach", self.name, "--output", "home")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Of the journal on the head's own disk."""
        folder = self.host() / "ml/checkpoints/search"
        there = read_events(folder).events if (folder / JOURNAL_FILE).exists() else []
        return [event for event in there if event["event"] == kind]

    def kept(self) -> list[dict[str, Any]]:
        """The events of the journal that S3 has."""
        described = self.sagemaker.describe_training_job(TrainingJobName=self.name)
        prefix = described["CheckpointConfig"]["S3Uri"].removeprefix(f"s3://{self.bucket}/")
        key = f"{prefix}/search/{JOURNAL_FILE}"
        try:
            body = self.s3.get_object(Bucket=self.bucket, Key=key)["Body"]
        except self.s3.exceptions.NoSuchKey:
            return []
        return [json.loads(line) for line in body.read().split(b"\n")[:-1]]

    def log(self) -> str:
        folder = self.host().parent
        files = [folder / "runner.log", *sorted(folder.glob("algo-*/log"))]
        return "\n".join(f.read_text(errors="replace")[-4000:] for f in files if f.exists())

    def end(self) -> None:
        if self.names and self.status() == "InProgress":
            self.sagemaker.stop_training_job(TrainingJobName=self.name)
            until(lambda: self.status() not in ("InProgress", "Stopping"))

    @staticmethod
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))


def until(condition: Callable[[], Any], *, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)  # to ask more often costs more than the wait


@pytest.fixture
def running_jobs(hosts_allowed: None, aws: Aws) -> Iterator[RunningJobs]:  # noqa: ARG001
    """An account with a role and the bucket of a search, whose jobs really run."""
    aws.put_role("training")
    place = {"LocationConstraint": REGION}
    aws.client("s3").create_bucket(Bucket=RunningJobs.bucket, CreateBucketConfiguration=place)
    jobs = RunningJobs(aws)
    yield jobs
    jobs.end()


_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def _without_aws() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AWS_") and name not in _PROXIES
    }


def _settings(url: str, nowhere: Path) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(nowhere / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(nowhere / "credentials"),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def newest_search(tmp_path: Path) -> Path:
    """A search of `colours` among the searches of this folder."""
    search = journals.Search(tmp_path / "searches/colours-1", name="colours")
    search.begin()
    return Path(search.folder)


@pytest.fixture
def packaged_search(tmp_path: Path, colour_classifier: Path) -> Callable[[str], Path]:
    """Makes the folder of a finished search of this name, with a classifier of colours."""

    def make(name: str) -> Path:
        search = journals.Search(tmp_path / "packaged", name=name)
        search.begin()
        search.trial(1)
        search.finish()
        shutil.copytree(colour_classifier, search.folder / "classifier")
        path = search.folder / "classifier/classifier.json"
        made_from = {"metadata": {"trial_id": "t0001"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | made_from))
        return Path(search.folder)

    return make


@pytest.fixture(scope="session")
def registered(
    tmp_path_factory: pytest.TempPathFactory,
    new_database: Callable[[Path], str],
    colour_classifier: Path,
) -> Callable[..., str]:
    """Registers classifiers in one store: `registered(folder) -> models:/colours/N`."""
    from mlflow import MlflowClient

    from visiontuner.serving.registry import log_classifier

    folder = tmp_path_factory.mktemp("store")
    uri = new_database(folder / "mlflow.db")
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("colours", artifact_location=str(folder / "artifacts"))

    def register(classifier: Path = colour_classifier) -> str:
        search = {
            "visiontuner.kind": "search",
            "visiontuner.search_id": "s1",
            "visiontuner.data_digest": "d1",
        }
        tags = {
            "mlflow.parentRunId": client.create_run(experiment, tags=search).info.run_id,
            "visiontuner.kind": "trial",
            "visiontuner.search_id": "s1",
            "visiontuner.trial_id": "t0001",
        }
        run = client.create_run(experiment, tags=tags).info.run_id
        client.set_terminated(run)
        return log_classifier(classifier, run_id=run, tracking_uri=uri, name="colours").uri

    register.tracking_uri = uri  # type: ignore[attr-defined]
    return register


@pytest.fixture
def account(aws: Any, registered: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An account that is set up, and a store with one version of `colours`."""
    import mlflow.version

    aws.put_image(tag=mlflow.version.VERSION)
    aws.put_role("endpoints")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.tracking_uri)
    monkeypatch.chdir(tmp_path)
    return aws


@pytest.fixture(scope="session")
def model(registered: Callable[..., str]) -> str:
    """NAME/VERSION of the model that most tests deploy: its server is started once."""
    return registered().removeprefix("models:/")
