"""A job that goes on with another one's search: the same options, and never two at a time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.cli.main import main
from visiontuner.errors import UserMistake
from visiontuner.journal import JournalWriter
from visiontuner.paths import JOURNAL_FILE
from visiontuner.text import next_command
from visiontuner.workflow.submit import JobOptions, plan_job, submit_job

# The SageMaker SDK's own, from its own imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]
REGION = "eu-west-1"
EXPERIMENT = {
    "name": "colours",
    "data": {"source": "s3://photos/colours/"},
    "search": {"trials": 2, "space": {"learning_rate": {"values": [0.1, 0.2]}}},
}
ROOT = "visiontuner/colours-1"
MACHINES = {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}


@pytest.fixture
def account(
    aws: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_database: Callable[[Path], str],
) -> Any:
    """An account with two roles, of which a command has to name one, and a search's folder."""
    aws.put_role("jobs")
    aws.put_role("others")
    s3 = aws.client("s3")
    for bucket in ("photos", "directed-jobs"):
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket="photos", Key="colours/train/red/1.png", Body=b"x" * 100)
    s3.put_object(Bucket="photos", Key=f"{ROOT}/experiment.yaml", Body=json.dumps(EXPERIMENT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    monkeypatch.chdir(tmp_path)
    return aws


@pytest.fixture
def image(account: Any) -> str:
    """Jobs that run it are directed by the test."""
    url: str = account.put_image(tag="1", repository="directed")
    return url


def place(account: Any, image: str, number: int, status: str, **changes: Any) -> str:
    """A job of the search `colours-1` as it was submitted; returns its name."""
    name = f"visiontuner-colours-2026112222461{number}"
    request = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {"TrainingImage": image, "TrainingInputMode": "File"},
        "RoleArn": "arn:aws:iam::123456789012:role/jobs",
        "OutputDataConfig": {"S3OutputPath": f"s3://photos/{ROOT}/output", "KmsKeyId": "key-1"},
        "CheckpointConfig": {
            "S3Uri": f"s3://photos/{ROOT}/checkpoints",
            "LocalPath": "/opt/ml/checkpoints",
        },
        "ResourceConfig": {
            "InstanceType": "ml.m5.xlarge",
            "InstanceCount": 3,
            "VolumeSizeInGB": 80,
            "VolumeKmsKeyId": "key-1",
        },
        "VpcConfig": {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]},
        "StoppingCondition": {"MaxRuntimeInSeconds": 10800, "MaxWaitTimeInSeconds": 25200},
        "EnableManagedSpotTraining": True,
        "EnableInterContainerTrafficEncryption": True,
        "Environment": {"PIP_INDEX_URL": "https://packages.internal/simple", "PIP_NO_DEPS": "0"},
        **changes,
    }
    tags = {
        "visiontuner.search": "colours-1",
        "visiontuner.price_per_hour": "2.5",
        "team": "vision",
        "cost center": "42",
    }
    request["Tags"] = [{"Key": key, "Value": value} for key, value in tags.items()]
    account.client("sagemaker").create_training_job(**request)
    direct(account, name, status)
    return name


def direct(account: Any, job: str, status: str) -> None:
    body = json.dumps({"status": status, "seconds": 60}).encode()
    account.client("s3").put_object(Bucket="directed-jobs", Key=f"{job}.json", Body=body)
    account.client("sagemaker").describe_training_job(TrainingJobName=job)


def keep_journal(account: Any, folder: Path, *, finished: int) -> None:
    """What SageMaker synchronised of a search with so many finished trials."""
    journal = JournalWriter(folder, "s1")
    journal.append("search_started", experiment=EXPERIMENT)
    for number in range(1, finished + 1):
        trial = {"trial_id": f"t000{number}", "attempt": 1}
        journal.append("trial_started", **trial, configuration={"learning_rate": number / 10})
        journal.append("epoch", **trial, step=1, metrics={"validation_accuracy": 0.5})
        journal.append("trial_ended", **trial, state="completed", best_epoch=1, best_value=0.5)
    journal.close()
    key, content = f"{ROOT}/checkpoints/search/{JOURNAL_FILE}", (folder / JOURNAL_FILE).read_bytes()
    account.client("s3").put_object(Bucket="photos", Key=key, Body=content)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def resume(job: str, *flags: str) -> dict[str, Any]:
    """The request that would be sent."""
    done = run("tune", "--on", "sagemaker", "--resume", job, "--dry-run", *flags)
    assert done.exit_code == 0, done.output
    request: dict[str, Any] = json.loads(done.stdout)
    return request


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def tags_of(request: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in request["Tags"]}


def test_a_resumed_job_is_what_the_earlier_one_was(account: Any, image: str) -> None:
    job = place(account, image, 1, "Stopped")
    before = account.client("sagemaker").describe_training_job(TrainingJobName=job)
    request = resume(job)
    for same in (
        "ResourceConfig",
        "VpcConfig",
        "CheckpointConfig",
        "RoleArn",
        "StoppingCondition",
        "EnableManagedSpotTraining",
    ):
        assert request[same] == before[same], same
    assert request["EnableInterContainerTrafficEncryption"]
    assert request["Environment"]["PIP_INDEX_URL"] == "https://packages.internal/simple"
    assert request["Environment"]["PIP_NO_DEPS"] == "1"  # ours
    assert request["OutputDataConfig"]["KmsKeyId"] == "key-1"
    assert request["AlgorithmSpecification"]["TrainingImage"] == image
    assert tags_of(request) == {
        "visiontuner.search": "colours-1",
        "visiontuner.price_per_hour": "2.5",
        "team": "vision",
        "cost center": "42",
    }


def test_every_option_of_the_earlier_job_can_be_changed(account: Any, image: str) -> None:
    job = place(account, image, 1, "Failed")
    flags = {
        "--instances": "1",
        "--instance-type": "ml.m5.2xlarge",
        "--volume": "100",
        "--max-run": "1h",
        "--role": "others",
        "--price": "3",
        "--spot": "off",
        "--warm-pool": "30m",
        "--subnets": "off",
        "--kms-key": "off",
        "--tag": "team=sound",
        "--encrypt-traffic": "off",
        "--env": "PIP_INDEX_URL=https://other.internal/simple",
    }
    request = resume(job, *(word for flag in flags.items() for word in flag))
    assert request["ResourceConfig"] == {
        "InstanceCount": 1,
        "InstanceType": "ml.m5.2xlarge",
        "VolumeSizeInGB": 100,
        "KeepAlivePeriodInSeconds": 1800,
    }
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    assert request["RoleArn"].endswith(":role/others")
    assert not request["EnableManagedSpotTraining"]
    assert "VpcConfig" not in request
    assert not request.get("EnableInterContainerTrafficEncryption")
    assert request["Environment"]["PIP_INDEX_URL"] == "https://other.internal/simple"
    assert "KmsKeyId" not in request["OutputDataConfig"]
    assert tags_of(request) == {
        "visiontuner.search": "colours-1",
        "visiontuner.price_per_hour": "3",
        "team": "sound",
        "cost center": "42",
    }


def test_a_disk_of_another_kind_of_machine_is_not_taken_over(account: Any, image: str) -> None:
    attached, own = place(account, image, 1, "Stopped"), {"InstanceType": "ml.g5.xlarge"}
    assert (
        "VolumeKmsKeyId"
        not in resume(attached, "--instance-type", "ml.g6.xlarge")["ResourceConfig"]
    )
    machines = {"ResourceConfig": {**own, "InstanceCount": 1, "VolumeSizeInGB": 30}}
    on_g5 = place(account, image, 2, "Stopped", **machines)
    assert resume(on_g5)["ResourceConfig"] == machines["ResourceConfig"]
    on_m5 = resume(on_g5, "--instance-type", "ml.m5.xlarge")["ResourceConfig"]
    assert on_m5["VolumeSizeInGB"] == 50
    assert on_m5["VolumeKmsKeyId"] == "key-1"


@pytest.mark.usefixtures("image")
def test_awss_own_image_follows_the_kind_of_machine(account: Any) -> None:
    registry = f"763104351884.dkr.ecr.{REGION}.amazonaws.com/pytorch-training"
    job = place(account, f"{registry}:2.8.0-cpu-directed", 1, "Stopped")
    options = JobOptions(resume=job, instance_type="ml.g5.xlarge", price=1, spot=False)
    assert plan_job(None, options)[1].container_image == f"{registry}:2.8.0-gpu-py312"
    newer = replace(options, image_version="2.9")
    assert plan_job(None, newer)[1].container_image.startswith(f"{registry}:2.9.0-gpu-")


@pytest.mark.usefixtures("image")
def test_awss_newer_images_follow_the_kind_of_machine_too(account: Any) -> None:
    registry = f"763104351884.dkr.ecr.{REGION}.amazonaws.com/pytorch"
    on_gpu = f"{registry}:2.14-cu133-amzn2023-sagemaker-directed"
    job = place(account, on_gpu, 1, "Stopped", ResourceConfig=MACHINES)
    options = JobOptions(resume=job, instance_type="ml.m5.xlarge", price=1, spot=False)
    plan = plan_job(None, options)[1]
    assert plan.container_image == f"{registry}:2.14-cpu-amzn2023-sagemaker"
    assert "tested with" not in "\n".join(plan.lines())
    older = plan_job(None, replace(options, image_version="2.9"))[1]
    assert "(PyTorch 2.9.0; visiontuner is tested with <2.15,>=2.14)" in "\n".join(older.lines())


def test_spot_or_a_warm_pool_asked_for_now_takes_the_place_of_the_other(
    account: Any, image: str
) -> None:
    job = place(account, image, 1, "Stopped")
    warm = resume(job, "--warm-pool", "10m")
    assert not warm["EnableManagedSpotTraining"]
    assert warm["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600


@pytest.mark.parametrize("status", ["InProgress", "Stopping"])
def test_two_jobs_never_run_one_search(account: Any, image: str, status: str) -> None:
    first = place(account, image, 1, "Stopped")
    second = place(account, image, 2, status)
    flags = ("tune", "--on", "sagemaker", "--resume", first, "--yes", "--no-wait")
    assert f"{second} is still running this search" in said(run(*flags))
    direct(account, second, "Stopped")
    done = run(*flags)
    assert done.exit_code == 0, done.output


def test_a_job_that_another_one_submitted_meanwhile_is_met_before_anything_is_sent(
    account: Any, image: str
) -> None:
    first = place(account, image, 1, "Stopped")
    aws, plan = plan_job(None, JobOptions(resume=first))
    second = place(account, image, 2, "InProgress")
    with pytest.raises(UserMistake, match=f"{second} is still running"):
        submit_job(aws, plan, note=lambda _: None)


def test_a_search_that_is_done_is_brought_home_and_not_run_again(
    account: Any, image: str, tmp_path: Path
) -> None:
    first = place(account, image, 1, "Stopped")
    second = place(account, image, 2, "Completed")
    keep_journal(account, tmp_path / "one", finished=1)
    assert resume(first)["ResourceConfig"]["InstanceCount"] == 3
    keep_journal(account, tmp_path / "two", finished=2)
    for job in (first, second):
        flags = ("--yes", "--output", "elsewhere")
        told = said(run("tune", "--on", "sagemaker", "--resume", job, *flags))
        assert "All 2 trials of colours-1 are done" in told
        command = next_command("attach", second, flags=" --region eu-west-1")
        assert f"`{command}` brings it home" in told


def test_a_completed_job_without_its_checkpoints_is_not_run_from_the_beginning(
    account: Any, image: str
) -> None:
    job = place(account, image, 1, "Completed")
    told = said(run("tune", "--on", "sagemaker", "--resume", job, "--yes"))
    assert "its checkpoints are no longer on S3" in told
    command = next_command("attach", job, flags=" --region eu-west-1")
    assert f"`{command}` brings home what it did" in told


def test_a_search_that_only_lacks_its_classifier_goes_on(
    account: Any, image: str, tmp_path: Path
) -> None:
    job = place(account, image, 1, "Failed")
    keep_journal(account, tmp_path / "two", finished=2)
    assert resume(job)["CheckpointConfig"]["S3Uri"] == f"s3://photos/{ROOT}/checkpoints"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bucket", "directed-jobs"), "are in the bucket 'photos': leave --bucket out"),
        (("--upload", "s3://photos/x"), "leave --upload out"),
        (("--image", "x", "--image-version", "2.8"), "leave it or --image out"),
        (("--spot", "perhaps"), "--spot takes true or off, got 'perhaps'"),
    ],
)
def test_what_a_resumed_job_cannot_have_is_refused(
    account: Any, image: str, flags: tuple[str, ...], message: str
) -> None:
    job = place(account, image, 1, "Stopped")
    assert message in said(run("tune", "--on", "sagemaker", "--resume", job, "--yes", *flags))
