"""Training jobs against the stand-in: submitted by the SDK, followed and brought home.

What a job's hosts do is tested in test_two_hosts.py; here a finished search is put where a job
would have left it.
"""

import io
import json
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from visiontuner import interrupts
from visiontuner.cli.main import main
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.io.s3 import upload_folder
from visiontuner.journal import SearchRecord
from visiontuner.paths import JOURNAL_FILE
from visiontuner.text import next_command
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.jobs import attach, training_seconds
from visiontuner.workflow.submit import JobOptions, plan_job, submit_job
from visiontuner.workflow.tune import run_search

# The SageMaker SDK's own, from its own imports; and what Ray's leave behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]
FOLLOWING = sys.modules["visiontuner.workflow.jobs"]
REGION = "eu-west-1"
IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/directed:1"
FLAGS = ("--on", "sagemaker", "--image", IMAGE, "--price", "2", "--yes")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    running_ray: None,  # noqa: ARG001
    images: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    new_database: Callable[[Path], str],
) -> Iterator[Path]:
    """A search that was made here, and what it wrote into MLflow."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", new_database(root / "mlflow.db"))
        patch.chdir(root)
        raw = small_search | {"data": {"source": str(images)}}
        run_search(Experiment.parse(raw), output=root / "search")
        yield root / "search"


@pytest.fixture
def account(
    aws: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_database: Callable[[Path], str],
) -> Any:
    """An account with a role and images on S3; MLflow is a database of this test's own."""
    aws.put_role("jobs")
    aws.put_image(tag="1", repository="directed")
    s3 = aws.client("s3")
    for bucket in ("photos", "directed-jobs"):
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket="photos", Key="colours/train/red/1.png", Body=b"x" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    monkeypatch.chdir(tmp_path)
    return aws


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


def submit(*more: str) -> str:
    """Submit a search that a test directs; returns the job's name."""
    done = run("tune", *FLAGS, "--data", "s3://photos/colours", "--no-wait", *more)
    assert done.exit_code == 0, done.output
    return next(
        line.split()[-1].rstrip(".")
        for line in done.stdout.splitlines()
        if line.startswith("Submitted ")
    )


def place(
    account: Any, name: str = "visiontuner-colours-20261122224611", *, instances: int = 1
) -> str:
    """A job as `submit` leaves it, without the SDK's seconds; returns its name."""
    root = "photos/visiontuner/colours-1"
    tags = {"visiontuner.search": "colours-1", "visiontuner.price_per_hour": "2"}
    account.client("sagemaker").create_training_job(
        TrainingJobName=name,
        AlgorithmSpecification={"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        RoleArn="arn:aws:iam::123456789012:role/jobs",
        OutputDataConfig={"S3OutputPath": f"s3://{root}/output"},
        CheckpointConfig={"S3Uri": f"s3://{root}/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
        ResourceConfig={
            "InstanceType": "ml.g5.xlarge",
            "InstanceCount": instances,
            "VolumeSizeInGB": 50,
        },
        StoppingCondition={"MaxRuntimeInSeconds": 3600},
        Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
    )
    return name


def direct(account: Any, job: str, **told: Any) -> None:
    body = json.dumps(told).encode()
    account.client("s3").put_object(Bucket="directed-jobs", Key=f"{job}.json", Body=body)


def described(account: Any, job: str) -> dict[str, Any]:
    told: dict[str, Any] = account.client("sagemaker").describe_training_job(TrainingJobName=job)
    return told


def keep_checkpoints(account: Any, job: str, search: Path, *, upto: int | None = None) -> None:
    """What SageMaker would have synchronised of a search that has not packaged its best trial.

    Args:
        upto: of the journal only so many lines.
    """
    bucket, _, prefix = described(account, job)["CheckpointConfig"]["S3Uri"][5:].partition("/")
    s3 = account.client("s3")
    for path in search.rglob("*"):
        if path.is_file() and path.parent.name != "classifier" and "mlflow." not in path.name:
            content = path.read_bytes()
            if path.name == JOURNAL_FILE and upto is not None:
                content = b"".join(content.splitlines(keepends=True)[:upto])
            key = f"{prefix}/search/{path.relative_to(search)}"
            s3.put_object(Bucket=bucket, Key=key, Body=content)


def keep_archive(account: Any, job: str, search: Path) -> None:
    """model.tar.gz, as SageMaker packs /opt/ml/model."""
    packed = search.with_suffix(".tar.gz")
    if not packed.exists():
        with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
            tar.add(search, "search", filter=lambda e: None if "mlflow." in e.name else e)
    uri = described(account, job)["ModelArtifacts"]["S3ModelArtifacts"]
    bucket, _, key = uri[5:].partition("/")
    account.client("s3").put_object(Bucket=bucket, Key=key, Body=packed.read_bytes())


# Submitting


def test_a_bucket_of_our_name_that_another_account_holds_gets_no_source(account: Any) -> None:
    bucket = f"sagemaker-{REGION}-123456789012"
    s3 = account.client("s3")
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    options = JobOptions(instance_type="ml.m5.xlarge", image=IMAGE, price=2)
    experiment = Experiment.parse({"name": "colours", "data": {"source": "s3://photos/colours/"}})
    aws, plan = plan_job(experiment, options)
    assert plan.bucket == bucket
    s3.delete_bucket(Bucket=bucket)
    account.take_bucket(bucket)
    with pytest.raises(UserMistake, match="may not write to"):
        submit_job(aws, plan, note=lambda _: None)
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)
    planned = run("tune", *FLAGS, "--data", "s3://photos/colours", "--dry-run")
    assert f"The bucket '{bucket}' cannot be used (403)" in said(planned)


def test_a_submitted_job_is_what_the_dry_run_showed(account: Any) -> None:
    flags = ("--instances", "2", "--spot", "--max-run", "1h", "--tag", "team=vision")
    planned = run("tune", *FLAGS, "--data", "s3://photos/colours", "--dry-run", *flags)
    assert planned.exit_code == 0, planned.output
    assert account.holds()["objects"] == ["colours/train/red/1.png"]
    assert not account.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
    job = submit(*flags)
    told, request = described(account, job), json.loads(planned.stdout)
    for key in ("ResourceConfig", "StoppingCondition", "EnableManagedSpotTraining", "Environment"):
        assert told[key] == request[key]
    assert told["ResourceConfig"]["InstanceCount"] == 2
    assert told["StoppingCondition"]["MaxRuntimeInSeconds"] == 3600
    assert [c["ChannelName"] for c in told["InputDataConfig"]] == ["images", "code", "sm_drivers"]
    assert told["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] == (
        "s3://photos/colours/"
    )
    assert "'" not in json.dumps(request)
    tags = account.client("sagemaker").list_tags(ResourceArn=told["TrainingJobArn"])["Tags"]
    assert {"Key": "team", "Value": "vision"} in tags
    listed = json.loads(run("jobs", "--format", "json").stdout)
    assert [(one["name"], one["status"], one["instances"]) for one in listed] == [
        (job, "InProgress", 2)
    ]


def test_the_source_runs_without_the_images_own_packages_being_touched(account: Any) -> None:
    told = described(account, submit())
    uri = told["InputDataConfig"][1]["DataSource"]["S3DataSource"]["S3Uri"]
    bucket, _, key = uri[5:].partition("/")
    content = account.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        names = tar.getnames()
        texts = {n: tar.extractfile(n).read().decode() for n in names if "/" not in n}  # type: ignore[union-attr]
    assert {"requirements.txt", "experiment.yaml", "job.json"} == set(texts)
    assert "visiontuner/aws/container.py" in names
    pinned = dict(line.split("==") for line in texts["requirements.txt"].split())
    assert {"ray", "mlflow", "timm", "boto3", "safetensors"} <= set(pinned)
    assert not {"torch", "torchvision", "triton", "sagemaker"} & set(pinned)
    assert not [name for name in pinned if name.startswith(("nvidia-", "cuda-"))]
    job = json.loads(texts["job.json"])
    assert job["checkpoints"] == "/opt/ml/checkpoints"
    assert job["tracking_uri"] is None
    assert len(job["token"]) == 64
    assert "source: s3://photos/colours/" in texts["experiment.yaml"]
    assert job["token"] not in json.dumps(told, default=str)


@pytest.mark.usefixtures("account")
def test_money_bounds_the_running_time() -> None:
    # $3 at 2 machines of $2 an hour last 45 minutes, of which the job's end takes 5.
    flags = ("--instances", "2", "--max-cost", "3")
    done = run("tune", *FLAGS, "--data", "s3://photos/colours", "--dry-run", *flags)
    assert json.loads(done.stdout)["StoppingCondition"] == {"MaxRuntimeInSeconds": 2400}
    assert "at most 40 min" in done.stderr
    assert "at most about $3.00" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--max-cost", "0.2"),
            "--max-cost 0.2 lasts 1 min at $2.00 an hour, beside the job's end;",
        ),
        (("--data", "photos"), "There is no data at photos"),
        (("--data", "s3://photos/none"), "There are no images at s3://photos/none/"),
        (("--data", "s3://nowhere/x"), "There is no bucket 'nowhere'"),
        (("--data", "s3://photos/it's"), "has an apostrophe"),
        (("--tag", "team"), "--tag takes KEY=VALUE"),
        (("--env", "A-B=1"), "--env 'A-B': a name has letters, digits and _ only"),
        (("--env", f"A={'x' * 513}"), "--env A: SageMaker takes 512 characters at most, got 513"),
        (
            ("--subnets", "10.0.0.0/24", "--security-groups", "sg-1"),
            "--subnets takes up to 16 names such as subnet-0123abcd, got '10.0.0.0/24'",
        ),
        (("--instances", "0"), "--instances takes a whole number from 1"),
        (("--instances", "1.5"), "--instances takes a whole number"),
        (("--instance-type", "ml.m5.large", "--volume", "20000"), "--volume takes 1 to 16384 GB"),
        (("--volume", "80"), "ml.g5.xlarge has a disk of its own, of a fixed size"),
        (("--instance-type", "g5.xlarge"), "--instance-type takes a name such as ml.g5.xlarge"),
        (("--spot", "--warm-pool", "30m"), "keeps no spot machines warm"),
        (("--subnets", "subnet-1"), "name --subnets and --security-groups"),
        (("--max-run", "soon"), "--max-run takes a time such as 30m"),
        (("--bucket", "nowhere"), "There is no bucket 'nowhere'"),
        (("--bucket", "far-away"), "is in us-west-2, and SageMaker in eu-west-1 takes buckets of"),
        (("--data", "s3://far-away/x"), "'far-away' is in us-west-2, and SageMaker in"),
        (("--image", "python:3.11"), "is no container image in ECR"),
        (
            ("--image", IMAGE.replace("eu-west-1", "us-west-2")),
            "The container image is in us-west-2 and the",
        ),
        (("--image", IMAGE.replace("directed", "other")), "Push it there, or leave --image out"),
        (("--role", "nobody"), "The account has no role 'nobody'"),
        (("--set", "model.weights=w.pt"), "a file of this machine"),
        (("--resume", "other", "--data", "auto"), "There is no training job 'other'"),
        (("--instance-type", "ml.g5.2xlarge"), "may use 0 of ml.g5.2xlarge for training job"),
        (
            ("--instance-type", "ml.g6.xlarge", "--warm-pool", "30m"),
            "may use 0 of ml.g6.xlarge for training warm pool usage in eu-west-1, and 1 is asked",
        ),
        (
            ("--instance-type", "ml.g6.xlarge", "--spot", "--instances", "2"),
            "may use 1 of ml.g6.xlarge for spot training job usage",
        ),
        (("--instance-type", "ml.p3.16xlarge"), "service limit 'ml.p3.16xlarge for training"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    account: Any, flags: tuple[str, ...], message: str
) -> None:
    far = {"CreateBucketConfiguration": {"LocationConstraint": "us-west-2"}}
    account.client("s3", "us-west-2").create_bucket(Bucket="far-away", **far)
    named = {
        "ml.g5.2xlarge for training job usage": 0,
        "ml.g6.xlarge for training job usage": 2,
        "ml.g6.xlarge for training warm pool usage": 0,
        "ml.g6.xlarge for spot training job usage": 1,
    }
    quotas = json.dumps(named).encode()
    account.client("s3").put_object(Bucket="directed-jobs", Key="quotas.json", Body=quotas)
    data = () if "--data" in flags else ("--data", "s3://photos/colours")
    done = run("tune", *FLAGS, *data, *flags)
    assert message in said(done)
    assert not account.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]


@pytest.mark.usefixtures("account")
def test_variables_reach_the_job_and_their_secrets_are_not_shown() -> None:
    index = "PIP_INDEX_URL=https://aws:aSecretToken@team-1.d.codeartifact.amazonaws.com/pypi/simple"
    flags = ("--env", index, "--env", "MY_API_KEY=aSecretKey", "--env", "A=plain")
    done = run("tune", *FLAGS, "--data", "s3://photos/colours", "--dry-run", *flags)
    assert done.exit_code == 0, done.output
    assert "aSecret" not in done.output
    shown = json.loads(done.stdout)["Environment"]
    hidden = "https://***@team-1.d.codeartifact.amazonaws.com/pypi/simple"
    assert {"PIP_INDEX_URL": hidden, "MY_API_KEY": "***", "A": "plain"}.items() <= shown.items()
    assert f"variables  PIP_INDEX_URL={hidden}, MY_API_KEY=***, A=plain" in done.stderr


@pytest.mark.usefixtures("account")
def test_a_private_mlflow_is_written_live_from_its_vpc_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.3.7:5000")
    flags = ("tune", *FLAGS, "--data", "s3://photos/colours", "--dry-run")
    assert "tracking   http://10.0.3.7:5000 is in a private network" in run(*flags).stderr
    inside = run(*flags, "--subnets", "subnet-1", "--security-groups", "sg-1").stderr
    assert "tracking   live, into http://10.0.3.7:5000" in inside


def test_an_image_for_another_processor_is_refused(account: Any) -> None:
    image = account.put_image(tag="mac", repository="directed", architecture="arm64")
    done = run("tune", "--on", "sagemaker", "--data", "s3://photos/colours", "--image", image)
    assert "The container image is for linux/arm64, and ml.g5.xlarge is linux/amd64" in said(done)


@pytest.mark.usefixtures("account")
def test_images_of_this_machine_are_not_sent_unasked(images: Path) -> None:
    refused = said(run("tune", *FLAGS, "--data", str(images)))
    assert f"Add --upload s3://BUCKET/{images.name}" in refused


@pytest.mark.usefixtures("account")
def test_without_credentials_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "No usable AWS credentials" in said(run("tune", *FLAGS, "--data", "s3://photos/colours"))


def test_nobody_to_ask_means_no_job(account: Any) -> None:
    flags = [flag for flag in FLAGS if flag != "--yes"]
    done = run("tune", *flags, "--data", "s3://photos/colours")
    assert "add --yes" in said(done)
    assert not account.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]


@pytest.mark.usefixtures("account")
def test_a_jobs_flags_are_refused_where_there_is_no_job() -> None:
    assert said(run("tune", "--spot", "--instances", "2")) == (
        "Error: --instances, --spot are for --on sagemaker; add it, or leave them out."
    )


def test_images_are_uploaded_once_if_that_is_asked_for(account: Any, images: Path) -> None:
    flags = ("--data", str(images), "--upload", "s3://photos/mine", "--no-wait")
    asked = run("tune", *(flag for flag in FLAGS if flag != "--yes"), *flags)
    assert f"s3://photos/mine/ (0 MB), uploaded from {images}" in asked.stderr
    assert not [key for key in account.holds()["objects"] if key.startswith("mine/")]
    done = run("tune", *FLAGS, *flags)
    assert done.exit_code == 0, done.output
    files = {f"mine/{p.relative_to(images)}" for p in images.rglob("*") if p.is_file()}
    assert files == {key for key in account.holds()["objects"] if key.startswith("mine/")}
    assert f"Uploaded {len(files)} images" in done.output
    assert upload_folder(images, "s3://photos/mine/").files == 0


def test_a_table_is_uploaded_with_its_folder_and_is_the_jobs_source(
    account: Any, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(images, folder)
    rows = [
        f"{path.relative_to(folder).as_posix()},{path.parent.name}"
        for path in folder.rglob("*.png")
    ]
    (folder / "labels.csv").write_text("\n".join(["path,label", *rows]), "utf-8")
    job = submit("--data", str(folder / "labels.csv"), "--upload", "s3://photos/mine")
    told = described(account, job)
    assert told["Environment"]["VISIONTUNER_CHANNEL"].startswith("s3://photos/mine/=")
    there = {key for key in account.holds()["objects"] if key.startswith("mine/")}
    assert len(there) == len(rows) + 1
    bucket, _, root = told["CheckpointConfig"]["S3Uri"][5:].partition("/")
    key = f"{root.removesuffix('/checkpoints')}/experiment.yaml"
    body = account.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    assert Experiment.parse(yaml.safe_load(body)).data.source == "s3://photos/mine/labels.csv"


def test_what_lies_where_images_are_brought_is_said(account: Any, images: Path) -> None:
    account.client("s3").put_object(Bucket="photos", Key="mine/train/red/old.png", Body=b"x")
    flags = ("--data", str(images), "--upload", "s3://photos/mine")
    done = run("tune", *FLAGS, *flags, "--dry-run")
    assert "; 1 other file lies there already, for the job as well" in done.stderr
    upload_folder(images, "s3://photos/mine")
    again = run("tune", *FLAGS, *flags, "--dry-run")
    assert "; 1 other file lies there already" in again.stderr


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize(
    ("data", "upload", "message"),
    [
        ("digits", "s3://photos/mine", "and the data source is digits: leave --upload out"),
        ("s3://photos/colours", "s3://photos/mine", "leave --upload out, or name a folder"),
        (None, "s3://nowhere/mine", "There is no bucket 'nowhere', where s3://nowhere/mine/ would"),
        (None, "photos/mine", "'photos/mine' is no place on S3"),
    ],
)
def test_an_upload_that_cannot_be_is_refused(
    images: Path, data: str | None, upload: str, message: str
) -> None:
    assert message in said(run("tune", *FLAGS, "--data", data or str(images), "--upload", upload))


# Coming back


def test_an_attached_search_is_in_mlflow_what_a_local_one_is(
    account: Any, finished: Path, tmp_path: Path
) -> None:
    job = place(account, instances=2)
    keep_archive(account, job, finished)
    direct(account, job, status="Completed", seconds=1800)
    done = run("attach", job)
    assert done.exit_code == 0, done.output
    folder = next((tmp_path / "searches").iterdir())
    assert (folder / JOURNAL_FILE).read_bytes() == (finished / JOURNAL_FILE).read_bytes()
    assert "2 x ml.g5.xlarge ran 30 min, cost $2.00" in done.stdout
    assert "MLflow model: models:/colours/1" in done.stdout
    here = _runs(f"sqlite:///{tmp_path / 'mlflow.db'}")
    there = _runs(f"sqlite:///{finished.parent / 'mlflow.db'}")
    assert here.keys() == there.keys()
    for name, held in there.items():
        assert here[name]["params"] == held["params"]
        assert here[name]["points"].items() >= held["points"].items()
        elsewhere = {"mlflow.note.content"}  # names the next command with its store
        tags = {key: value for key, value in held["tags"].items() if key not in elsewhere}
        assert tags.items() <= here[name]["tags"].items()
        assert here[name]["status"] == held["status"]
    # $2 an hour for each of 2 machines and half an hour; the trials share it by their seconds.
    costs = {name: held["points"] for name, held in here.items()}
    parent = folder.name if folder.name in costs else "search"
    assert _value(costs[parent], "cost_usd") == pytest.approx(2.0)
    assert _value(costs[parent], "machine_seconds") == 3600
    trials = [name for name in costs if name.startswith("t0")]
    assert sum(_value(costs[name], "cost_usd") for name in trials) == pytest.approx(2.0)
    again = run("attach", job)
    assert again.exit_code == 0, again.output
    assert _runs(f"sqlite:///{tmp_path / 'mlflow.db'}") == here


def test_the_run_that_mlflow_run_opened_becomes_the_searchs(
    account: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    mine = client.create_experiment("mine")
    opened = client.create_run(mine, tags={"mlflow.source.type": "PROJECT"}).info
    left = client.create_run(mine, tags={"mlflow.source.type": "PROJECT"}).info
    client.set_terminated(left.run_id)
    job = place(account)
    keep_archive(account, job, finished)
    direct(account, job, status="Completed", seconds=60)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mine)
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.run_id)
    done = run("attach", job)
    assert done.exit_code == 0, done.output
    assert opened.run_id not in done.output
    children = client.search_runs(
        [opened.experiment_id], f"tags.`mlflow.parentRunId` = '{opened.run_id}'"
    )
    trials = [run for run in children if run.data.tags["visiontuner.kind"] == "trial"]
    assert {trial.info.run_name for trial in trials} == {"t0001", "t0002", "t0003"}
    # A run that has ended is nobody's to write in.
    monkeypatch.setenv("MLFLOW_RUN_ID", left.run_id)
    again = run("attach", job)
    assert again.exit_code == 0, again.output
    assert f"{left.run_id}, is left as it is: it is FINISHED" in again.output
    assert not client.get_run(left.run_id).data.params


def test_a_running_job_is_followed_until_it_ends(account: Any, finished: Path) -> None:
    job = place(account)
    logs = account.client("logs")
    logs.create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")
    stream = {
        "logGroupName": "/aws/sagemaker/TrainingJobs",
        "logStreamName": f"{job}/algo-1-1700000000",
    }
    logs.create_log_stream(**stream)
    lines = ["+ cat noise", "All 1 hosts are there."]
    events = [{"timestamp": int(time.time() * 1000), "message": line} for line in lines]
    logs.put_log_events(**stream, logEvents=events)
    keep_checkpoints(account, job, finished, upto=10)
    watching = _Watching(lambda: direct(account, job, status="Completed", seconds=60))
    keep_archive(account, job, finished)
    came = attach(job, observer=watching, poll_seconds=0.2)
    assert watching.notes[0].startswith(f"{job}: Training (0 min, $0.")
    assert "algo-1  All 1 hosts are there." in watching.notes
    assert not [note for note in watching.notes if "noise" in note]
    assert watching.total == 3
    assert {event["event"] for event in watching.events} >= {"search_started", "trial_started"}
    assert came.result is not None
    assert len(came.result.record.trials) == 3
    assert came.result.model == "models:/colours/1"


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(
    account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = place(account)

    def press(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupts, "sleep", press)
    done = run("attach", job)
    assert done.exit_code == 130
    assert f"{job} runs on. Follow it again: {next_command('attach', job)}" in done.stderr
    assert described(account, job)["TrainingJobStatus"] == "InProgress"


def test_a_stopped_job_comes_home_and_its_search_goes_on_in_another(
    account: Any, finished: Path, tmp_path: Path
) -> None:
    job = submit()
    keep_checkpoints(account, job, finished, upto=12)
    stopped = run("stop", job)
    assert stopped.exit_code == 0, stopped.output
    assert f"--resume {job}" in stopped.stdout
    assert "is stopped already" in said(run("stop", job))
    shutil.rmtree(tmp_path / "searches", ignore_errors=True)
    came = run("attach", job)
    assert came.exit_code == 130, came.output  # interrupted, as a local search would be
    folder = next((tmp_path / "searches").iterdir())
    assert not SearchRecord.load(folder).ended
    assert f"visiontuner tune --on sagemaker --resume {job}" in came.stdout
    time.sleep(1.1)  # the SDK names jobs by the second
    done = run("tune", *FLAGS, "--resume", job, "--no-wait")
    assert done.exit_code == 0, done.output
    (second,) = [
        one["TrainingJobName"]
        for one in account.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
        if one["TrainingJobName"] != job
    ]
    assert (
        described(account, second)["CheckpointConfig"]
        == described(account, job)["CheckpointConfig"]
    )
    keep_archive(account, second, finished)
    direct(account, second, status="Completed", seconds=600)
    direct(account, job, status="Stopped", seconds=300)
    whole = run("attach", second)
    assert whole.exit_code == 0, whole.output
    assert "in 2 jobs, cost $0.50" in whole.stdout  # 15 minutes of one machine
    assert SearchRecord.load(folder).ended


def test_a_job_that_fails_before_its_search_says_why(account: Any) -> None:
    job = place(account)
    reason = "AlgorithmError: ray==2.60.0 could not be installed, exit code: 1"
    direct(account, job, status="Failed", reason=reason, seconds=60)
    told = said(run("attach", job))
    assert "failed before its search began: AlgorithmError: ray==2.60.0 could not" in told
    assert f"visiontuner attach {job} --logs all" in told


def test_a_job_that_gets_no_machines_is_tried_again_with_the_same_or_with_others(
    account: Any,
) -> None:
    job = submit("--instances", "3", "--instance-type", "ml.m5.xlarge", "--volume", "80")
    reason = "CapacityError: Unable to provision requested ML compute capacity."
    direct(account, job, status="Failed", reason=reason, seconds=0)
    told = said(run("attach", job))
    assert "choose another --instance-type or --region, or try later" in told
    assert f"--resume {job} --region eu-west-1` tries again" in told
    same = run("tune", "--on", "sagemaker", "--price", "2", "--resume", job, "--dry-run")
    request, before = json.loads(same.stdout), described(account, job)
    assert request["ResourceConfig"] == before["ResourceConfig"]
    assert request["ResourceConfig"]["VolumeSizeInGB"] == 80
    assert request["CheckpointConfig"] == before["CheckpointConfig"]
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    other = run("tune", *FLAGS, "--resume", job, "--dry-run", "--instance-type", "ml.g5.xlarge")
    assert "runs on    3 x ml.g5.xlarge" in other.stderr


def test_a_folder_of_something_else_is_left_alone(
    account: Any, finished: Path, tmp_path: Path
) -> None:
    job = place(account)
    keep_archive(account, job, finished)
    direct(account, job, status="Completed", seconds=60)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    assert "mine already exists" in said(run("attach", job, "--output", "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_damaged_archive_and_a_key_that_climbs_out_are_refused(
    account: Any, finished: Path, tmp_path: Path
) -> None:
    job = place(account)
    told = described(account, job)
    bucket, _, key = told["ModelArtifacts"]["S3ModelArtifacts"][5:].partition("/")
    account.client("s3").put_object(Bucket=bucket, Key=key, Body=b"no archive")
    direct(account, job, status="Completed", seconds=60)
    assert "model.tar.gz cannot be unpacked" in said(run("attach", job))
    account.client("s3").delete_object(Bucket=bucket, Key=key)
    keep_checkpoints(account, job, finished)
    prefix = told["CheckpointConfig"]["S3Uri"][5:].partition("/")[2]
    account.client("s3").put_object(
        Bucket=bucket, Key=f"{prefix}/search/a/../../../escaped", Body=b"x"
    )
    assert "would leave the folder" in said(run("attach", job))
    assert not (tmp_path / "escaped").exists()


def test_another_programs_job_is_no_search(account: Any) -> None:
    _train(account, "theirs", {})
    assert "was not submitted by visiontuner" in said(run("attach", "theirs"))
    assert run("jobs").stdout == "None. `visiontuner tune --on sagemaker` submits one.\n"


def test_a_classic_tuning_job_becomes_runs(account: Any, tmp_path: Path) -> None:
    """As in older SageMaker projects: HyperparameterTuner over a script."""
    objectives = {
        "birds-001": {"objective": 0.81, "tuned": {"lr": "0.01"}, "metrics": {"loss": 0.6}},
        "birds-002": {"objective": 0.93, "tuned": {"lr": "0.003"}, "metrics": {"loss": 0.2}},
        "birds-003": {"status": "Failed", "reason": "AlgorithmError: x", "tuned": {"lr": "1.0"}},
    }
    for told in objectives.values():
        told.setdefault("status", "Completed")
        told["seconds"] = 300
    sagemaker = account.client("sagemaker")
    sagemaker.create_hyper_parameter_tuning_job(
        HyperParameterTuningJobName="birds",
        HyperParameterTuningJobConfig={
            "Strategy": "Bayesian",
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "accuracy"},
            "ResourceLimits": {"MaxParallelTrainingJobs": 1},
        },
    )
    for name in objectives:
        _train(account, name, {"batch-size": "64", "optimizer": '"adam"'})
    account.client("s3").put_object(
        Bucket="directed-jobs", Key="birds.json", Body=json.dumps(objectives).encode()
    )
    done = run("attach", "birds")
    assert done.exit_code == 0, done.output
    assert "Best: birds-002 with accuracy 0.9300." in done.stdout
    held = _runs(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert set(held) == {"birds", *objectives}
    best = held["birds-002"]
    assert best["params"] == {"lr": "0.003", "batch-size": "64", "optimizer": "adam"}
    assert _value(best["points"], "accuracy") == 0.93
    assert _value(best["points"], "loss") == 0.2
    assert _value(best["points"], "seconds") == 300
    assert held["birds-003"]["tags"]["visiontuner.error"] == "AlgorithmError: x"
    table = run("compare", "birds", "--format", "json")
    assert table.exit_code == 0, table.output
    assert json.loads(table.stdout)[0]["run"] == "birds-002"
    run("attach", "birds")
    assert _runs(f"sqlite:///{tmp_path / 'mlflow.db'}") == held


def test_trial_seconds_leave_interruptions_out(finished: Path) -> None:
    for trial in SearchRecord.load(finished).trials.values():
        told = sum(epoch.metrics["epoch_seconds"] for epoch in trial.epochs)
        assert training_seconds(trial) == pytest.approx(told)


class _Watching(Silent):
    """Remembers what it was shown, and acts when trials begin."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.notes: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.total = 0
        self._then = then

    def note(self, text: str) -> None:
        self.notes.append(text)

    def trials_begin(self, record: SearchRecord, total: int) -> None:
        self.total = total
        threading.Timer(0.5, self._then).start()

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def _train(account: Any, name: str, parameters: dict[str, str]) -> None:
    account.client("sagemaker").create_training_job(
        TrainingJobName=name,
        HyperParameters=parameters,
        AlgorithmSpecification={"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        RoleArn=f"arn:aws:iam::123456789012:role/{name}",
        OutputDataConfig={"S3OutputPath": "s3://photos/out"},
        ResourceConfig={"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 5},
        StoppingCondition={"MaxRuntimeInSeconds": 600},
    )


def _runs(uri: str) -> dict[str, dict[str, Any]]:
    """What MLflow holds, by run name: parameters, points and tags, names for ids of runs."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    all_runs = client.search_runs(experiments, max_results=100)
    names = {found.info.run_id: found.info.run_name for found in all_runs}
    held = {}
    for found in all_runs:
        points = {
            key: [
                (p.step, p.timestamp, p.value)
                for p in client.get_metric_history(found.info.run_id, key)
            ]
            for key in found.data.metrics
        }
        tags = {key: names.get(value, value) for key, value in found.data.tags.items()}
        held[found.info.run_name] = {
            "params": found.data.params,
            "points": points,
            "tags": tags,
            "status": found.info.status,
        }
    return held


def _value(points: dict[str, list[tuple[int, int, float]]], key: str) -> float:
    return points[key][-1][2]
