"""Searches over the network itself, from the images to the evaluated model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from visiontuner.diagnostics.history import Recording
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import Event, SearchRecord, read_events
from visiontuner.search.plan import CHECKPOINT_FOLDER, HEAD_FILE, NETWORK_FILE
from visiontuner.workflow.diagnose import diagnose_search
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.tune import resume_search, run_search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("running_ray", "own_place"),
]

EPOCHS = 8


class PressCtrlC(Silent):
    """Presses Ctrl-C when an event came so many times."""

    def __init__(self, event: str, number: int) -> None:
        self.awaited, self.left = event, number

    def event(self, event: Event) -> None:
        self.left -= event["event"] == self.awaited
        if self.left == 0:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def staged(images_with_test: Path) -> dict[str, Any]:
    """Four heads, and the two best of them as networks."""
    return {
        "name": "colours",
        "data": {"source": str(images_with_test)},
        "model": {
            "backbone": "timm:test_efficientnet.r160_in1k",
            "weights": "none",
            "image_size": 32,
            "train": "last_stage",
        },
        "training": {"epochs": 4, "batch_size": 8, "augmentation": "none", "workers": 0},
        "search": {
            "trials": 4,
            "algorithm": "random",
            "scheduler": "none",
            "first": [],
            "space": {"learning_rate": {"low": 0.001, "high": 0.1, "scale": "log"}},
            "stages": {"best": 2, "epochs": EPOCHS, "learning_rate": 0.01},
        },
    }


def runs_by_trial(uri: str) -> tuple[list[Any], dict[str, Any]]:
    """The parent runs, and the trials' runs by trial id."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("colours")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.data.tags["visiontuner.kind"] == "search"]
    trials = [r for r in runs if r.data.tags["visiontuner.kind"] == "trial"]
    by_id = {run.data.tags["visiontuner.trial_id"]: run for run in trials}
    assert len(by_id) == len(trials)
    return parents, by_id


def kill_in_the_second_stage(search: Path, experiment: dict[str, Any]) -> None:
    """`visiontuner tune`, and kill -9 when the first network has gone through some epochs."""
    Path("experiment.yaml").write_text(yaml.safe_dump(experiment))
    arguments = ["tune", "--experiment", "experiment.yaml", "--output", str(search)]
    networks = "[e['trial_id'] for e in events if e.get('stage') == 'network']"
    epochs = f"[e for e in events if e['event'] == 'epoch' and e['trial_id'] in {networks}]"
    held, log = Path(__file__).with_name("held_command.py"), Path("output.log")
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, held, f"len({epochs}) >= 4", Path.cwd(), *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'},  # one after the other
        ) as process,
    ):
        try:
            while not Path("held").exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
        finally:
            process.kill()


def test_a_staged_search_killed_in_its_second_stage_goes_on_and_is_like_any_other(
    tmp_path, staged, uri
):
    search = tmp_path / "search"
    os.mkfifo("go")
    kill_in_the_second_stage(search, staged)
    before = SearchRecord.load(search)
    assert {t.state for t in before.trials.values() if t.stage == "head"} == {"completed"}
    checkpoints = {path.parent.name for path in search.glob(f"trials/*/{CHECKPOINT_FOLDER}")}
    assert checkpoints == {"t0005"}

    result = resume_search(search)
    record = result.record
    assert result.state == "completed"
    assert sorted(record.trials) == [f"t{number:04d}" for number in range(1, 7)]
    for trial in record.trials.values():
        if trial.stage == "head":
            assert trial == before.trials[trial.trial_id]
            continue
        assert trial.state == "completed"
        assert [epoch.step for epoch in trial.epochs] == list(range(1, EPOCHS + 1))
        attempts = [epoch.attempt for epoch in trial.epochs]
        assert attempts == sorted(attempts)
        assert attempts[0] == 1  # it went on where the kill came, and did not begin anew
        assert attempts[-1] == (2 if trial.trial_id in before.trials else 1)
    ranking = record.ranking()
    heads = [t.trial_id for t in ranking if t.stage == "head"][:2]
    assert [record.trials[f"t{n:04d}"].starts_from for n in (5, 6)] == heads
    assert record.best is ranking[0]
    ready = [e for e in read_events(search).events if e["event"] == "images_ready"]
    assert [event["computed"] > 0 for event in ready] == [True, False]
    assert not list(search.glob(f"trials/*/{CHECKPOINT_FOLDER}"))
    assert len(list(search.glob(f"trials/*/{NETWORK_FILE}"))) == 2
    assert len(list(search.glob(f"trials/*/{HEAD_FILE}"))) == 4

    parents, runs = runs_by_trial(uri)
    assert len(parents) == 1
    assert sorted(runs) == sorted(record.trials)
    for trial_id, run in runs.items():
        trial = record.trials[trial_id]
        assert run.data.tags["visiontuner.stage"] == trial.stage
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        history = MlflowClient(uri).get_metric_history(run.info.run_id, "train_loss")
        assert sorted(m.step for m in history) == list(range(1, len(trial.epochs) + 1))
    assert runs["t0005"].data.tags["visiontuner.starts_from"] == heads[0]

    chosen = evaluate_search(search).choice.chosen
    description = json.loads((search / "classifier" / "classifier.json").read_text())
    assert description["metadata"]["trial_id"] == chosen == record.best.trial_id
    expected = "head" if record.best.stage == "head" else "last_stage"
    assert description["metadata"]["train"] == expected
    assert (search / "report.html").is_file()
    diagnosis = diagnose_search(search)
    assert len(diagnosis.runs) == 6
    assert diagnosis.notes == ()


def test_a_search_over_the_network_alone_goes_on_after_ctrl_c_and_keeps_the_best_five(
    tmp_path, staged, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    del staged["search"]["stages"]
    staged["search"] |= {"trials": 6, "scheduler": "asha"}
    experiment, search = Experiment.parse(staged), tmp_path / "search"
    stopped = run_search(experiment, output=search, observer=PressCtrlC("trial_ended", 2))
    assert stopped.state == "interrupted"
    result = resume_search(search)
    record = result.record
    assert {t.state for t in record.trials.values()} <= {"completed", "stopped_early"}
    assert {t.stage for t in record.trials.values()} == {None}
    assert len(record.trials) == 6
    kept = {path.parent.name for path in search.glob(f"trials/*/{NETWORK_FILE}")}
    assert kept == {trial.trial_id for trial in record.ranking()[:5]}
    assert "features_ready" not in [e["event"] for e in read_events(search).events]
    # Of the trials that cannot be told apart only those whose networks are there are taken.
    assert evaluate_search(search, prefer="cheapest").choice.chosen in kept


def test_what_is_recorded_of_a_trial_stops_it_and_is_in_mlflow(tmp_path, staged, uri):
    del staged["search"]["stages"]
    staged["training"] |= {"epochs": 3, "record_every_steps": 1, "weight_decay": 0}
    staged["search"] |= {
        "trials": 2,
        "algorithm": "grid",
        "space": {"learning_rate": {"values": [1e-12, 0.01]}},
    }
    staged["rules"] = {"stop_on": ["unchanged_tensor"]}
    search = tmp_path / "search"
    run_search(Experiment.parse(staged), output=search)
    record = SearchRecord.load(search)
    by_rate = {t.configuration["learning_rate"]: t for t in record.trials.values()}
    frozen, healthy = by_rate[1e-12], by_rate[0.01]
    assert frozen.state == "stopped_early"
    assert frozen.reason == "rules.stop_on: unchanged_tensor in epoch 1"
    assert [f.rule for f in frozen.findings].count("unchanged_tensor") == 1
    assert healthy.state == "completed"
    assert "unchanged_tensor" not in {finding.rule for finding in healthy.findings}
    _, runs = runs_by_trial(uri)
    client = MlflowClient(uri)
    for trial in (frozen, healthy):
        recording = Recording.load(search / "trials" / trial.trial_id / "recording.npz")
        assert len(recording.tensors.steps) == len(trial.epochs) * 4  # 30 images by 8
        run_id = runs[trial.trial_id].info.run_id
        assert "recording.npz" in {file.path for file in client.list_artifacts(run_id)}
        assert client.get_metric_history(run_id, "system/process_memory_megabytes")
