"""A search over two hosts of a training job, each with its own files, network and processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from visiontuner.io.s3 import upload_folder
from visiontuner.journal import SearchRecord, read_events

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]

EPOCHS, TRIALS = 40, 8
SPLITS = {"train": 180, "valid": 12}  # images of a class: more than one shard of features holds


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


@pytest.fixture
def jobs(
    running_jobs: Any,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Images on S3, and an experiment over them in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    draw_many(tmp_path / "many", SPLITS)
    upload_folder(tmp_path / "many", f"s3://{running_jobs.bucket}/many")
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": f"s3://{running_jobs.bucket}/many/"}
    experiment["training"]["epochs"] = EPOCHS
    experiment["search"] |= {"trials": TRIALS, "baselines": False}
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    running_jobs.flags += ["--instances", "2"]
    return running_jobs


def test_a_search_that_was_stopped_and_lost_a_host_comes_home_with_the_numbers_of_a_local_one(
    jobs: Any, shared_cache: Path, tmp_path: Path
) -> None:
    jobs.submit("--experiment", "experiment.yaml", "--bucket", jobs.bucket)
    jobs.when(lambda: len(jobs.events("trial_ended")) >= 2)
    jobs.stop()
    came = jobs.come_home()
    assert came.exit_code == 130, came.output + jobs.log()
    before = SearchRecord.load(tmp_path / "home")
    finished = {trial_id for trial_id, trial in before.trials.items() if trial.finished}
    assert 2 <= len(finished) < TRIALS
    assert before.ended is not None
    assert before.ended["state"] == "interrupted"

    jobs.resume()
    jobs.when(lambda: ran_on(jobs.events("trial_ended"), "algo-2", after=finished))
    jobs.kill("algo-2")
    came = jobs.come_home()
    assert came.exit_code == 0, came.output + jobs.log()
    assert "in 2 jobs" in came.stdout
    assert "MLflow model: models:/colours/1" in came.stdout
    far, events = SearchRecord.load(tmp_path / "home"), read_events(tmp_path / "home").events
    assert len(far.trials) == TRIALS
    assert {trial.state for trial in far.trials.values()} == {"completed"}
    ended = [event for event in events if event["event"] == "trial_ended"]
    assert {event["host"] for event in ended if "host" in event} == {"algo-1", "algo-2"}
    done = [event["trial_id"] for event in ended if event["state"] == "completed"]
    assert sorted(done) == sorted(far.trials), "a finished trial ran again"
    lost = [event["trial_id"] for event in ended if event["reason"] == "its worker died"]
    assert len(lost) == 1
    assert far.trials[lost[0]].attempt > 1
    ready = [event for event in events if event["event"] == "features_ready"]
    assert [event["computed"] for event in ready] == [3 * sum(SPLITS.values()), 0]
    assert ready[0]["engine"].startswith("2 machines or GPUs, each by ONNX Runtime")

    uri = os.environ["MLFLOW_TRACKING_URI"]
    runs = runs_by_trial(uri)
    assert runs.keys() == far.trials.keys()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert MlflowClient(uri).get_model_version("colours", "1").status == "READY"

    near = search_here(tmp_path, shared_cache)
    assert curves(far) == curves(near)
    held, here = written(uri, far), written(uri, near)
    assert held.keys() == here.keys()
    for trial_id, trial in far.trials.items():
        if trial.attempt == 1:  # of others MLflow tells that they were interrupted
            assert held[trial_id] == here[trial_id], trial_id


def search_here(folder: Path, cache: Path) -> SearchRecord:
    """The same search on this machine, where the SDK could not even be imported."""
    (folder / "poison").mkdir()
    (folder / "poison/sagemaker.py").write_text("raise SystemExit('imported the SDK')")
    paths = [str(folder / "poison"), os.environ.get("PYTHONPATH", "")]
    flags = ["--experiment", "experiment.yaml", "--data", "many", "--output", "near"]
    done = subprocess.run(
        [sys.executable, "-m", "visiontuner", "tune", *flags],
        cwd=folder,
        env={
            **os.environ,
            "VISIONTUNER_CACHE": str(cache),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SearchRecord.load(folder / "near")


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
