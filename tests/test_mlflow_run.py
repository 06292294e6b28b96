"""The README's way in and out: `mlflow run . -e tune`, then `mlflow models predict`."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


def mlflow(*arguments: str, cwd: Path, environment: dict[str, str]) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "mlflow", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


@pytest.fixture
def environment(
    tmp_path: Path, shared_cache: Path, new_database: Callable[[Path], str]
) -> dict[str, str]:
    return {
        **os.environ,
        # `--env-manager local` takes `python` from the PATH, as an activated environment has it.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": new_database(tmp_path / "mlflow.db"),
        "VISIONTUNER_CACHE": str(shared_cache),
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',  # one worker is enough
    }


def test_mlflow_run_searches_and_the_model_answers_with_a_name(
    repository: Path,
    tmp_path: Path,
    environment: dict[str, str],
    images: Path,
    small_search: dict[str, Any],
) -> None:
    experiment = {**small_search, "data": {"source": str(images)}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    parameters = {
        "experiment": tmp_path / "experiment.yaml",
        "output": tmp_path / "search",
        "trials": 2,
        "set": "training.epochs=6",
    }
    flags = [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")]
    mlflow(
        "run",
        ".",
        "-e",
        "tune",
        "--env-manager",
        "local",
        *flags,
        cwd=repository,
        environment=environment,
    )

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    found = client.get_experiment_by_name("Default")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    # The parent is the run that `mlflow run` opened; the trials hang below it.
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.tags["mlflow.project.entryPoint"] == "tune"
    assert parent.data.tags["visiontuner.kind"] == "search"
    assert parent.info.status == "FINISHED"
    trials = [run for run in runs if run.data.tags["visiontuner.kind"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert [run.info.status for run in trials] == ["FINISHED", "FINISHED"]
    for run in trials:
        history = client.get_metric_history(run.info.run_id, "validation_accuracy")
        assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]

    image = base64.b64encode((images / "valid/green/0.png").read_bytes()).decode()
    body = {"dataframe_split": {"columns": ["image"], "data": [[image]]}}
    (tmp_path / "body.json").write_text(json.dumps(body))
    answer = mlflow(
        "models",
        "predict",
        "-m",
        "models:/colours/1",
        "--env-manager",
        "local",
        "-i",
        str(tmp_path / "body.json"),
        "-t",
        "json",
        cwd=tmp_path,
        environment=environment,
    )
    (prediction,) = json.loads(answer[answer.index("{") :])["predictions"]
    assert prediction["label"] in ("red", "green", "blue")
