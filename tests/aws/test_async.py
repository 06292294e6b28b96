"""Asynchronous endpoints of the stand-in: requests and answers lie on S3."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from click.testing import CliRunner, Result

from visiontuner.cli.main import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def keys(account: Any, bucket: str) -> list[str]:
    found = account.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])
    return [entry["Key"] for entry in found]


@pytest.fixture
def answers(account: Any) -> str:
    """A bucket for answers."""
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    account.client("s3").create_bucket(Bucket="answers", CreateBucketConfiguration=place)
    return "answers"


def test_an_asynchronous_endpoint_is_checked_asked_updated_and_taken_away(
    account: Any, model: str, answers: str, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    wanted = ["--async", f"s3://{answers}/colours", "--autoscale", "1:4"]
    made = run("deploy", model, "--no-preflight", "--name", "c", *wanted)
    assert made.exit_code == 0, made.output
    assert "answers    asynchronously, in s3://answers/colours" in made.stderr
    assert "1 to 4 instances, 5 waiting requests an instance" in made.stderr
    with pytest.raises(ClientError, match="InvokeEndpointAsync"):
        account.client("sagemaker-runtime").invoke_endpoint(EndpointName="c", Body=b"{}")
    scaled = account.client("application-autoscaling").describe_scaling_policies(
        ServiceNamespace="sagemaker"
    )["ScalingPolicies"][0]["TargetTrackingScalingPolicyConfiguration"]
    assert scaled["CustomizedMetricSpecification"]["MetricName"] == (
        "ApproximateBacklogSizePerInstance"
    )

    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(make_image("red"))
    # A PNG with something behind its end: more than an endpoint that answers at once takes.
    (images / "b.png").write_bytes(make_image("blue") + os.urandom(7_000_000))
    (images / "c.png").write_bytes(b"no image")
    asked = run("query", "c", str(images), "--format", "json")
    assert asked.exit_code == 1
    rows = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [(row["label"], row["reduced"]) for row in rows] == [
        ("red", False),
        ("blue", False),
        (None, False),
    ]
    assert "Cannot read an image of 8 bytes" in rows[2]["error"]
    assert keys(account, answers) == []

    updated = run("update", "c", model, "--no-preflight")
    assert updated.exit_code == 0, updated.output
    assert run("query", "c", str(images / "a.png")).exit_code == 0
    assert run("undeploy", "c", "--artifacts").exit_code == 0
    assert not any(account.holds().values())


def test_a_request_that_the_model_refuses_says_why(
    account: Any, model: str, answers: str, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    from visiontuner.serving.answers import Options
    from visiontuner.serving.async_client import open_endpoint
    from visiontuner.serving.client import Refused

    wanted = ["--async", f"s3://{answers}/"]
    assert run("deploy", model, "--no-preflight", "--name", "c", *wanted).exit_code == 0
    with pytest.raises(Refused, match=r"^Row 1: Cannot read an image of 8 bytes"):
        open_endpoint("c").ask([make_image("red"), b"no image"], Options())
    assert keys(account, answers) == []
    account.client("s3").delete_bucket(Bucket=answers)
    (tmp_path / "a.png").write_bytes(make_image("red"))
    gone = run("query", "c", str(tmp_path / "a.png"))
    assert gone.exit_code == 1
    assert "NoSuchBucket" in said(gone)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--async", "answers"], "--async takes s3://BUCKET/FOLDER"),
        (["--async", "s3://nowhere/x"], "There is no bucket 'nowhere', where s3://nowhere/x would"),
        (["--async", "s3://answers", "--serverless", "2048"], "A serverless endpoint answers at"),
    ],
)
def test_what_cannot_answer_asynchronously_is_refused(
    account: Any, model: str, arguments: list[str], message: str
) -> None:
    done = run("deploy", model, *arguments)
    assert done.exit_code == 2
    assert message in said(done)
    assert not any(account.holds().values())
