"""Asking an endpoint of the stand-in: SageMaker's errors and limits, and a real scoring server."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from click.testing import CliRunner, Result

from visiontuner.cli.main import main
from visiontuner.errors import ServingError
from visiontuner.serving.answers import Options
from visiontuner.serving.client import Refused, SageMakerTransport


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def serverless(
    aws: Any, registered: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> SageMakerTransport:
    """A serverless endpoint that names colours."""
    import mlflow.version

    aws.put_image(tag=mlflow.version.VERSION)
    aws.put_role("endpoints")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.tracking_uri)
    monkeypatch.chdir(tmp_path)
    model = registered().removeprefix("models:/")
    made = run("deploy", model, "--no-preflight", "--name", "colours", "--serverless", "2048")
    assert made.exit_code == 0, made.output
    return SageMakerTransport("colours")


@pytest.mark.slow
def test_an_endpoint_is_asked_within_its_limits_and_its_errors_are_understood(
    aws: Any, serverless: SageMakerTransport, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    runtime = aws.client("sagemaker-runtime")

    def ask(body: bytes) -> None:
        runtime.invoke_endpoint(EndpointName="colours", ContentType="application/json", Body=body)

    with pytest.raises(ClientError, match="oversize body") as refused:
        ask(b"x" * (4 * 2**20 + 1))
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    table = {"columns": ["image"], "data": [[base64.b64encode(b"no image").decode()]]}
    with pytest.raises(ClientError) as failed:
        ask(json.dumps({"dataframe_split": table}).encode())
    told = failed.value.response
    assert (told["Error"]["Code"], told["OriginalStatusCode"]) == ("ModelError", 400)

    with pytest.raises(Refused, match=r"^Row 0: Cannot read an image of 8 bytes"):
        serverless.ask([b"no image"], Options())
    with pytest.raises(ServingError, match=r"Endpoint .* of account \d+ not found"):
        SageMakerTransport("nowhere").ask([make_image("red")], Options())

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        # A PNG with something behind its end: 2 MB that cost nothing to decode.
        (folder / f"{number}.png").write_bytes(make_image("red") + os.urandom(2_000_000))
    asked = run("query", "colours", str(folder), "--format", "json")
    assert asked.exit_code == 0, asked.output
    rows = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [(row["label"], row["reduced"]) for row in rows] == [("red", False)] * 4


def test_a_folder_of_images_does_not_hide_the_model_that_is_named_after_it(
    registered: Any,
    make_image: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    registered()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.tracking_uri)
    monkeypatch.chdir(tmp_path)
    Path("colours").mkdir()
    Path("colours/a.png").write_bytes(make_image("blue"))
    asked = run("query", "--model", "colours", "colours", "--format", "json")
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["label"] == "blue"
