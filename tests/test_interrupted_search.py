"""Searches that are stopped or killed at the command line and go on: nothing lost or doubled."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from visiontuner.experiment import Experiment
from visiontuner.journal import FINISHED, Event, SearchRecord, is_running, read_events
from visiontuner.search.space import draw_beforehand

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

TRIALS = 8


class Command:
    """`visiontuner tune` in a folder of its own, with its own MLflow database."""

    def __init__(
        self, home: Path, cache: Path, experiment: dict[str, Any], tracking_uri: str
    ) -> None:
        self.home, self.search = home, home / "search"
        (home / "experiment.yaml").write_text(yaml.safe_dump(experiment))
        self.uri = tracking_uri
        self.environment = {
            **os.environ,
            "VISIONTUNER_CACHE": str(cache),
            "MLFLOW_TRACKING_URI": self.uri,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> None:
        new = ("--experiment", "experiment.yaml", "--output", "search")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "visiontuner", "tune", *(arguments or new)],
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop(self, number: int, condition: Callable[[], Any]) -> None:
        """Send a signal to the driver alone as soon as the condition holds."""
        assert self.process is not None
        end = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, f"it ended too early:\n{self.process.stdout.read()}"
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.01)
        self.process.send_signal(number)

    def end(self) -> tuple[int, list[str]]:
        """Exit code and lines."""
        assert self.process is not None
        output, _ = self.process.communicate(timeout=300)
        return self.process.returncode, output.splitlines()

    def events(self, name: str) -> list[Event]:
        if not (self.search / "journal.jsonl").exists():
            return []
        return [event for event in read_events(self.search).events if event["event"] == name]

    @property
    def record(self) -> SearchRecord:
        return SearchRecord.load(self.search)

    def runs(self) -> dict[str, Run]:
        """The trials' runs by trial id; none is doubled, and there is one parent."""
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("colours")
        if experiment is None:
            return {}
        runs = client.search_runs([experiment.experiment_id])
        trials = [run for run in runs if run.data.tags.get("visiontuner.kind") == "trial"]
        parents = [run for run in runs if run.data.tags.get("visiontuner.kind") == "search"]
        assert len(parents) == 1
        assert {t.data.tags["mlflow.parentRunId"] for t in trials} <= {parents[0].info.run_id}
        by_id = {run.data.tags["visiontuner.trial_id"]: run for run in trials}
        assert len(by_id) == len(trials), "a trial is there twice"
        return by_id


@pytest.fixture
def command(
    tmp_path: Path,
    shared_cache: Path,
    pictures: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
) -> Iterator[Command]:
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": str(pictures)}
    experiment["training"]["epochs"] = 60
    experiment["search"]["trials"] = TRIALS
    command = Command(tmp_path, shared_cache, experiment, new_database(tmp_path / "mlflow.db"))
    yield command
    if command.process is not None and command.process.poll() is None:
        command.process.kill()
        command.process.wait()


def assert_whole(command: Command, before: SearchRecord) -> None:
    """The search ended with the trials of an uninterrupted one, finished ones as they were."""
    record, runs = command.record, command.runs()
    drawn = draw_beforehand(Experiment.load(command.search / "experiment.yaml"))
    assert [t.configuration for _, t in sorted(record.trials.items())] == drawn
    assert {t.state for t in record.trials.values()} == {"completed"}
    assert sorted(runs) == sorted(record.trials)
    for trial_id, trial in record.trials.items():
        earlier = before.trials.get(trial_id)
        assert trial.attempt == (1 if earlier is None or earlier.state in FINISHED else 2)
        if earlier is not None and earlier.state in FINISHED:
            assert trial == earlier
        run = runs[trial_id]
        assert run.info.status == "FINISHED"
        assert run.info.end_time == round(trial.ended * 1000)
        history = MlflowClient(command.uri).get_metric_history(run.info.run_id, "train_loss")
        assert sorted({m.step for m in history}) == list(range(1, 61))
    starts = [e["trial_id"] for e in command.events("trial_started") if e["attempt"] == 1]
    assert len(starts) == len(set(starts)) == TRIALS
    ends = [e["trial_id"] for e in command.events("trial_ended") if e["state"] in FINISHED]
    assert len(ends) == len(set(ends)) == TRIALS


def assert_ends_in_order(command: Command, number: int) -> None:
    """Finished trials stay, running ones are interrupted, the last line says how to go on."""
    command.start()
    command.stop(number, lambda: len(command.events("trial_ended")) >= 3)
    code, lines = command.end()
    assert code == 130
    assert "Traceback" not in "\n".join(lines)
    resume = re.search(r"visiontuner (tune --resume \S*search)$", lines[-1])
    assert resume, lines[-5:]
    before, runs = command.record, command.runs()
    states = {trial.state for trial in before.trials.values()}
    assert states == {"completed", "interrupted"}
    assert before.ended["state"] == "interrupted"
    for trial_id, trial in before.trials.items():
        expected = "FINISHED" if trial.state == "completed" else "KILLED"
        assert runs[trial_id].info.status == expected


def test_sigterm_ends_a_search_in_order(command):
    assert_ends_in_order(command, signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_starts_ends_a_search_in_order(command, number):
    command.start()
    command.stop(number, lambda: "gcs_server" in names_of_children(command.process.pid))
    code, lines = command.end()
    assert code == 130, lines
    assert re.search(r"visiontuner (tune --resume \S*search)$", lines[-1]), lines[-5:]
    assert command.record.ended["state"] == "interrupted"


def names_of_children(pid: int) -> set[str]:
    names = set()
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            names.add(child.name())
    return names


def test_a_search_goes_on_after_ctrl_c(command):
    assert_ends_in_order(command, signal.SIGINT)
    before, runs = command.record, command.runs()
    command.start("--resume", "search")
    code, lines = command.end()
    assert code == 0, "\n".join(lines)
    assert_whole(command, before)
    after = command.runs()
    for trial_id, run in runs.items():
        assert after[trial_id].info.run_id == run.info.run_id
        if run.info.status == "FINISHED":
            assert after[trial_id].info.end_time == run.info.end_time


# When the driver is killed, from what it has written.
MOMENTS: dict[str, Callable[[Command, Path], bool]] = {
    "features": lambda _, cache: any(cache.glob("features/*/shards/*.npy")),
    "trials": lambda command, _: len(command.events("trial_ended")) >= TRIALS // 2,
    "packaging": lambda command, _: bool(command.events("search_ended")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_happened(
    command, moment, tmp_path, shared_cache
):
    cache = shared_cache
    if moment == "features":
        cache = tmp_path / "cache"
        if (shared_cache / "exports").exists():
            shutil.copytree(shared_cache, cache, ignore=lambda *_: ["features"])
        command.environment["VISIONTUNER_CACHE"] = str(cache)
    command.start()
    command.stop(signal.SIGKILL, lambda: MOMENTS[moment](command, cache))
    code, _ = command.end()
    assert code == -signal.SIGKILL
    assert not is_running(command.search)
    before, runs = command.record, command.runs()

    command.start("--resume", "search")
    code, lines = command.end()
    assert code == 0, "\n".join(lines)
    assert_whole(command, before)
    for trial_id, run in runs.items():
        assert command.runs()[trial_id].info.run_id == run.info.run_id
        if run.info.status == "FINISHED":
            assert command.runs()[trial_id].info.end_time == run.info.end_time
    client = MlflowClient(command.uri)
    assert len(client.search_model_versions("name='colours'")) == 1
    assert (command.search / "classifier" / "model.onnx").is_file()
