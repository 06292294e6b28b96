"""SageMaker's MLflow, stood in for by a real server that its plugin is pointed at."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.version
import pytest

from visiontuner.aws import managed_mlflow
from visiontuner.errors import UserMistake
from visiontuner.io.aws import Aws

APP = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-app/app-ABC123"
SERVER = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/team"
OURS = mlflow.version.VERSION


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], str]
) -> Iterator[str]:
    """A real `mlflow server`."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", new_database(folder / "mlflow.db")],
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def account(aws: Any) -> Any:
    """An account with an app and a tracking server of the given versions."""
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    aws.client("s3").create_bucket(Bucket="directed-jobs", CreateBucketConfiguration=place)

    def has(**told: Any) -> Aws:
        named = {APP: told.get("app"), "team": told.get("server")}
        body = json.dumps({name: one for name, one in named.items() if one}).encode()
        aws.client("s3").put_object(Bucket="directed-jobs", Key="mlflow.json", Body=body)
        return Aws()

    return has


@pytest.mark.slow
@pytest.mark.parametrize("arn", [APP, SERVER])
def test_an_mlflow_that_answers_as_ours_is_written_live(
    account: Any, server: str, monkeypatch: pytest.MonkeyPatch, arn: str
) -> None:
    monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", server)
    same = {"MlflowVersion": OURS, "Status": "Created"}
    usable, said = managed_mlflow.usable(account(app=same, server=same), arn)
    assert (usable, said) == (arn, f"live, into {arn}"), said
    older = {"MlflowVersion": "3.0.0"}
    words = managed_mlflow.usable(account(app=older, server=older), arn)[1]
    assert words == f"live, into {arn} (MLflow 3.0.0; visiontuner is tested with {OURS})"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"app": {"MlflowVersion": "2.16.2", "Status": "Created"}}, f"{APP} runs MLflow 2.16.2,"),
        ({"app": {"MlflowVersion": OURS, "Status": "Deleting"}}, f"{APP} is Deleting:"),
        ({}, f"{APP} is not there:"),
        # Nothing listens there.
        ({"app": {"MlflowVersion": OURS}}, f"{APP} does not answer as is needed ("),
    ],
    ids=["older", "deleted", "missing", "silent"],
)
def test_where_it_is_no_use_the_journal_travels_and_the_plan_says_why(
    account: Any, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", "http://127.0.0.1:9")
    usable, said = managed_mlflow.usable(account(**told), APP)
    assert usable is None
    assert said.startswith(words)
    assert said.endswith("the journal travels instead, and `visiontuner attach JOB` writes it")


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:sagemaker:eu-west-1:1:mlflow-app/x",
        "arn:aws:s3:::bucket",
        "arn:aws:sagemaker:eu-west-1:123456789012:endpoint/x",
    ],
)
def test_what_is_no_mlflow_of_sagemakers_is_refused(account: Any, arn: str) -> None:
    with pytest.raises(UserMistake, match="is no MLflow of SageMaker's"):
        managed_mlflow.usable(account(), arn)


def test_in_china_there_is_none(account: Any) -> None:
    arn = APP.replace("arn:aws:", "arn:aws-cn:").replace("eu-west-1", "cn-north-1")
    usable, said = managed_mlflow.usable(account(), arn)
    assert usable is None
    assert "sagemaker-mlflow knows no MLflow in aws-cn" in said
