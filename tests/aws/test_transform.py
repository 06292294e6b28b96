"""Batch transform of a folder on S3, end to end in the stand-in: nothing but answers stays."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.cli.main import main

COLOURS = ("red", "green", "blue")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def transform(model: str, *arguments: str) -> Result:
    fixed = ["transform", "s3://photos/in", "s3://photos/out", "--model", model, "--no-preflight"]
    return run(*fixed, *arguments)


@pytest.fixture
def photos(account: Any, make_image: Callable[..., bytes]) -> Any:
    """A bucket of 40 images of three colours, one that is none, and a text."""
    s3 = account.client("s3")
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    s3.create_bucket(Bucket="photos", CreateBucketConfiguration=place)
    for number in range(40):
        body = make_image(COLOURS[number % 3])
        s3.put_object(Bucket="photos", Key=f"in/{number % 2}/{number:02}.png", Body=body)
    # A PNG with something behind its end: more than a request holds.
    large = make_image("green") + os.urandom(7_000_000)
    s3.put_object(Bucket="photos", Key="in/large ümläut.png", Body=large)
    s3.put_object(Bucket="photos", Key="in/none.jpg", Body=b"no image")
    s3.put_object(Bucket="photos", Key="in/empty.jpg", Body=b"")
    s3.put_object(Bucket="photos", Key="in/notes.txt", Body=b"not one of them")
    s3.put_object(Bucket="photos", Key="inside.png", Body=make_image("red"))
    return s3


def left(account: Any) -> dict[str, list[str]]:
    """All that there is but the images."""
    held: dict[str, list[str]] = account.holds()
    held["objects"] = [key for key in held["objects"] if not key.startswith("in")]
    return held


NOTHING: dict[str, list[str]] = {"endpoints": [], "configs": [], "models": [], "objects": []}


def test_every_image_has_one_line_with_its_key_and_nothing_else_stays(
    account: Any, model: str, photos: Any
) -> None:
    planned = transform(model, "--dry-run", "--price", "0.6", "--instances", "2")
    assert planned.exit_code == 0, planned.output
    assert "43 in s3://photos/in/ (7 MB); 1 other objects are left out" in planned.stderr
    assert "2 x ml.m5.large; $1.2 an hour, paid while it runs" in planned.stderr
    assert left(account) == NOTHING

    done = transform(model, "--price", "3600", "--top-k", "2", "--tag", "team=vision")
    assert done.exit_code == 1, done.output  # two images could not be read
    assert "41 of 43 images: s3://photos/out/colours-" in done.stdout
    assert "2 not answered; their lines say why." in done.stderr
    (key,) = left(account)["objects"]
    assert left(account) == NOTHING | {"objects": [key]}
    body = photos.get_object(Bucket="photos", Key=key)["Body"].read().decode()
    rows = {row["image"]: row for row in map(json.loads, body.splitlines())}
    assert len(rows) == 43
    for number in range(40):
        row = rows[f"s3://photos/in/{number % 2}/{number:02}.png"]
        assert (row["label"], len(row["top_k"])) == (COLOURS[number % 3], 2)
    large = rows["s3://photos/in/large ümläut.png"]
    assert (large["label"], large["reduced"]) == ("green", True)
    assert "Cannot read an image of 8 bytes" in rows["s3://photos/in/none.jpg"]["error"]
    assert rows["s3://photos/in/empty.jpg"]["error"] == "It is empty."

    (job,) = account.client("sagemaker").list_transform_jobs()["TransformJobSummaries"]
    told = account.client("sagemaker").describe_transform_job(
        TransformJobName=job["TransformJobName"]
    )
    assert told["TransformJobStatus"] == "Completed"
    assert told["Environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    # $3,600 an hour: a dollar a second.
    seconds = (told["TransformEndTime"] - told["TransformStartTime"]).total_seconds()
    assert f"about ${seconds:,.2f}" in done.stderr
    tags = account.client("sagemaker").list_tags(ResourceArn=told["TransformJobArn"])["Tags"]
    assert {"Key": "team", "Value": "vision"} in tags
    assert {"Key": "visiontuner.model", "Value": model} in tags


@pytest.mark.usefixtures("photos")
def test_a_network_and_a_key_reach_the_job(account: Any, model: str) -> None:
    inside = ["--subnets", "subnet-1", "--security-groups", "sg-1"]
    seen: list[dict[str, Any]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            for name in account.holds()["models"]:
                seen.append(account.client("sagemaker").describe_model(ModelName=name))
                return

    watching = threading.Thread(target=look)
    watching.start()
    try:
        done = transform(model, *inside, "--kms-key", "key-1", "--env", "A=1")
    finally:
        ended.set()
        watching.join()
    assert "41 of 43" in done.stdout, done.output
    assert seen[0]["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    (job,) = account.client("sagemaker").list_transform_jobs()["TransformJobSummaries"]
    told = account.client("sagemaker").describe_transform_job(
        TransformJobName=job["TransformJobName"]
    )
    assert told["TransformResources"]["VolumeKmsKeyId"] == "key-1"
    assert told["TransformOutput"]["KmsKeyId"] == "key-1"
    assert told["Environment"]["A"] == "1"


@contextmanager
def pressing_ctrl_c(account: Any) -> Iterator[None]:
    """Once there is a job."""

    def press() -> None:
        sagemaker = account.client("sagemaker")
        while not sagemaker.list_transform_jobs()["TransformJobSummaries"]:
            if ended.wait(0.05):
                return
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    person = threading.Thread(target=press)
    person.start()
    try:
        yield
    finally:
        ended.set()
        person.join()


def test_ctrl_c_stops_the_job_and_takes_everything_away(
    account: Any, model: str, photos: Any
) -> None:
    with pressing_ctrl_c(account):
        done = transform(model, "--instance-type", "ml.m5.24xlarge")  # never begins
    assert done.exit_code == 130, done.output
    assert said(done) == "Error: Stopped."
    (job,) = account.client("sagemaker").list_transform_jobs()["TransformJobSummaries"]
    assert job["TransformJobStatus"] == "Stopped"
    assert left(account) == NOTHING
    assert photos.list_objects_v2(Bucket="photos", Prefix="in/")["KeyCount"] == 44


@pytest.mark.usefixtures("photos")
def test_a_job_that_fails_says_why_and_leaves_nothing(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Requests that are larger than SageMaker sends at a time.
    monkeypatch.setattr("visiontuner.aws.transform_job.REQUEST_BYTES", 20_000_000)
    done = transform(model)
    assert done.exit_code == 1
    assert "is Failed: ClientError: Too much data for max payload size" in said(done)
    assert left(account) == NOTHING


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "s3://photos/out"], "`transform` takes s3://BUCKET/FOLDER twice, got 'photos'"),
        (["s3://photos/in", "s3://photos/in/out"], "name a folder beside it for the answers"),
        (["s3://photos/none", "s3://photos/out"], "There are no images at s3://photos/none/"),
        (["s3://nowhere/in", "s3://photos/out"], "There is no bucket 'nowhere'"),
        (["s3://photos/in", "s3://nowhere/out"], "There is no bucket 'nowhere'"),
        (
            ["s3://photos/in", "s3://photos/out", "--instance-type", "ml.m5.lrge"],
            "Nearest: ml.m5.large",
        ),
        (["s3://photos/in", "s3://photos/out", "--top-k", "0"], "top_k must be a whole number"),
        (["s3://photos/in", "s3://photos/out", "--subnets", "subnet-1"], "A VPC needs both"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    account: Any, model: str, arguments: list[str], message: str
) -> None:
    done = run("transform", *arguments, "--model", model)
    assert done.exit_code in (1, 2)
    assert message in said(done)
    assert left(account) == NOTHING


def test_images_that_all_cannot_be_read_start_no_job(account: Any, model: str, photos: Any) -> None:
    photos.put_object(Bucket="photos", Key="empties/a.png", Body=b"")
    done = run("transform", "s3://photos/empties", "s3://photos/out", "--model", model,
               "--no-preflight")  # fmt: skip
    assert done.exit_code == 1
    assert "None of the 1 images can be read: s3://photos/empties/a.png: It is empty." in said(done)
    assert not account.client("sagemaker").list_transform_jobs()["TransformJobSummaries"]
