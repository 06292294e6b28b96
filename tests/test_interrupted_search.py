"""Searches that are stopped or killed at the command line and go on: nothing lost or doubled."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import FINISHED, Event, SearchRecord, is_running, read_events
from visiontuner.search.space import draw_beforehand

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

TRIALS, EPOCHS = 6, 20
HELD = Path(__file__).with_name("held_command.py")
# Three trials have ended, and one is in the middle of its epochs.
IN_A_TRIAL = (
    f"event and event['event'] == 'epoch' and event['step'] < {EPOCHS} "
    "and sum(e['event'] == 'trial_ended' for e in events) >= 3"
)


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

    def start(self, *arguments: str, moment: str | None = None, **options: Any) -> None:
        """Begin, to be held at a moment of `held_command.py`."""
        program = ["-m", "visiontuner"] if moment is None else [HELD, moment, self.home]
        new = ("--experiment", "experiment.yaml", "--output", "search")
        self.process = subprocess.Popen(
            [sys.executable, *program, "tune", *(arguments or new)],
            cwd=self.home,
            env=self.environment,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options},
        )

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """It has not ended before, or the test fails."""
        assert self.process is not None
        while not condition():
            assert self.process.poll() is None, f"it ended too early:\n{self.end()}"
            time.sleep(0.01)

    def hold(self) -> None:
        """Return when it waits at its moment."""
        self.wait_until((self.home / "held").exists)

    def let_go(self) -> None:
        (self.home / "go").write_bytes(b"")

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
    images: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
) -> Iterator[Command]:
    experiment = json.loads(json.dumps(small_search))
    experiment["data"] = {"source": str(images)}
    experiment["training"]["epochs"] = EPOCHS
    experiment["search"]["trials"] = TRIALS
    os.mkfifo(tmp_path / "go")
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
        assert sorted({m.step for m in history}) == list(range(1, EPOCHS + 1))
    starts = [e["trial_id"] for e in command.events("trial_started") if e["attempt"] == 1]
    assert len(starts) == len(set(starts)) == TRIALS
    ends = [e["trial_id"] for e in command.events("trial_ended") if e["state"] in FINISHED]
    assert len(ends) == len(set(ends)) == TRIALS


def assert_ends_in_order(command: Command, number: int) -> None:
    """Finished trials stay, running ones are interrupted, the last line says how to go on."""
    command.process.send_signal(number)
    command.let_go()
    code, lines = command.end()
    assert code == 130
    assert "Traceback" not in "\n".join(lines)
    resume = re.search(r"visiontuner (tune --resume \S*search)$", lines[-1])
    assert resume, lines[-5:]
    assert_interrupted(command)


def assert_interrupted(command: Command) -> None:
    """In the journal, and in MLflow."""
    before, runs = command.record, command.runs()
    states = {trial.state for trial in before.trials.values()}
    assert states == {"completed", "interrupted"}
    assert before.ended["state"] == "interrupted"
    for trial_id, trial in before.trials.items():
        expected = "FINISHED" if trial.state == "completed" else "KILLED"
        assert runs[trial_id].info.status == expected


def test_sigterm_ends_a_search_in_order(command):
    command.environment["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 1}'  # one worker is enough
    command.start(moment=IN_A_TRIAL)
    command.hold()
    assert_ends_in_order(command, signal.SIGTERM)


def test_a_search_outlives_its_terminal_and_ends_in_order(command):
    """What a closed terminal sends is SIGHUP, and what is printed to it fails."""
    terminal, its_end = pty.openpty()
    command.environment["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 1}'  # one worker is enough
    command.start(
        moment=IN_A_TRIAL,
        **dict.fromkeys(("stdin", "stdout", "stderr"), its_end),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its_end)
    command.hold()
    os.close(terminal)
    command.let_go()
    assert command.process.wait() == 130
    assert_interrupted(command)


@pytest.fixture
def untracked(command: Command) -> Command:
    """Without MLflow, whose process takes seconds, and Ray waits an hour for its first one."""
    command.environment["MLFLOW_TRACKING_URI"] = "none"
    command.environment["RAY_gcs_server_port_wait_time_s"] = "3600"
    return command


def test_nohup_keeps_a_search_running(untracked):
    command = untracked
    command.environment["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 1}'  # one worker is enough
    command.start(
        moment=IN_A_TRIAL, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    command.hold()
    command.process.send_signal(signal.SIGHUP)
    command.let_go()
    code, lines = command.end()
    assert code == 0, lines


@contextmanager
def ray_that_does_not_start(command: Command) -> Iterator[psutil.Process]:
    """Ray's first process is stopped until the end, and so is Ray's start."""
    assert command.process is not None
    found: list[psutil.Process] = []
    command.wait_until(lambda: found.extend(gcs_servers(command.process.pid)) or found)
    found[0].suspend()
    try:
        yield found[0]
    finally:
        with suppress(psutil.NoSuchProcess):
            found[0].resume()


def gcs_servers(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if child.name() == "gcs_server" else []
    return found


def test_sigterm_while_ray_starts_ends_a_search_in_order(untracked):
    command = untracked
    command.start()
    with ray_that_does_not_start(command):
        command.process.send_signal(signal.SIGTERM)
        code, lines = command.end()
    assert code == 130, lines
    # Ray may complain, on the standard error, of the process that was stopped.
    assert any(re.search(r"visiontuner tune --resume \S*search$", line) for line in lines), (
        "\n".join(lines[-12:])
    )
    assert command.record.ended["state"] == "interrupted"


def test_a_second_ctrl_c_ends_at_once_whatever_the_search_waits_for(untracked):
    command = untracked
    command.start()
    with ray_that_does_not_start(command) as gcs_server:
        command.process.send_signal(signal.SIGINT)
        command.wait_until(lambda: command.events("search_ended"))
        command.process.send_signal(signal.SIGINT)
        code, lines = command.end()
        assert code == 130, lines
        gcs_server.wait(30)


def test_a_search_goes_on_after_ctrl_c(command):
    command.start(moment=IN_A_TRIAL)
    command.hold()
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


# When the driver is killed, one after the other.
MOMENTS = (
    "any(cache.glob('features/*/shards/*.npy'))",
    f"sum(e['event'] == 'trial_ended' for e in events) >= {TRIALS // 2}",
    "event and event['event'] == 'search_ended'",
)


def test_a_search_killed_three_times_ends_as_if_nothing_had_happened(
    command, tmp_path, shared_cache
):
    """While it computes features, in its trials, and before it packages the best."""
    (tmp_path / "cache").mkdir()
    (shared_cache / "exports").mkdir(exist_ok=True)
    (tmp_path / "cache/exports").symlink_to(shared_cache / "exports")
    command.environment["VISIONTUNER_CACHE"] = str(tmp_path / "cache")
    arguments, records, runs = (), [], {}
    for moment in MOMENTS:
        command.start(*arguments, moment=moment)
        command.hold()
        command.process.kill()
        code, _ = command.end()
        assert code == -signal.SIGKILL
        assert not is_running(command.search)
        records.append(command.record)
        runs |= command.runs()
        (tmp_path / "held").unlink()
        arguments = ("--resume", "search")
    _, in_its_trials, before_packaging = records
    assert {trial.state for trial in in_its_trials.trials.values()} > {"completed"}

    command.start(*arguments)
    code, lines = command.end()
    assert code == 0, "\n".join(lines)
    assert_whole(command, in_its_trials)
    assert command.record.trials == before_packaging.trials
    for trial_id, run in runs.items():
        assert command.runs()[trial_id].info.run_id == run.info.run_id
        if run.info.status == "FINISHED":
            assert command.runs()[trial_id].info.end_time == run.info.end_time
    client = MlflowClient(command.uri)
    assert len(client.search_model_versions("name='colours'")) == 1
    assert (command.search / "classifier" / "model.onnx").is_file()
