"""What the driver writes and keeps, without a Ray: failure lines, heads, reasons to end."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from visiontuner import interrupts
from visiontuner.experiment.schema import Experiment, Training
from visiontuner.journal import JournalWriter, SearchRecord
from visiontuner.search.live import LiveRules, Recorder, end_trial, findings_of
from visiontuner.search.plan import (
    CHECKPOINT_FOLDER,
    HEAD_FILE,
    NETWORK_FILE,
    Stores,
    WeightsOnDisk,
    settings_of,
)
from visiontuner.search.run import (
    EndInOrder,
    JournalCallback,
    RuleStopper,
    WorkerFailures,
    failure_line,
)

RAY_TRACEBACK = """
ray::ImplicitFunc.train() (pid=1, ip=127.0.0.1)
  File "trial.py", line 60, in run_trial
    for result in results:
visiontuner.errors.TrialFailed: The training loss is nan in epoch 3 at learning rate 0.1; try less.
"""


@pytest.mark.parametrize(
    ("traceback", "line"),
    [
        (RAY_TRACEBACK, "The training loss is nan in epoch 3 at learning rate 0.1; try less."),
        ("Traceback:\n  x\nValueError: no\nsuch thing", "ValueError: no"),
        ("a.b.OutOfMemoryError: 3 GB", "OutOfMemoryError: 3 GB"),
        ("the worker\n  vanished", "the worker vanished"),
        ("", ""),
    ],
)
def test_a_failure_is_one_line(traceback, line):
    assert failure_line(traceback) == line


def test_a_failure_without_an_exception_stays_short():
    assert len(failure_line("word " * 1000)) <= 300


@pytest.fixture
def recorder(tmp_path: Path):
    journal = JournalWriter(tmp_path, "s")
    recorder = Recorder(journal, SearchRecord())
    experiment = Experiment.parse({"name": "x"}).model_dump(mode="json")
    recorder.append("search_started", experiment=experiment)
    yield recorder
    journal.close()


def run_trial(
    recorder: Recorder,
    folder: Path,
    number: int,
    values: list[float],
    state: str,
    *,
    file: str = HEAD_FILE,
    **fields: Any,
) -> None:
    trial_id = f"t{number:04d}"
    fields = {"configuration": {}, **fields}
    recorder.append("trial_started", trial_id=trial_id, attempt=1, **fields)
    for step, value in enumerate(values, start=1):
        metrics = {"validation_accuracy": value}
        recorder.append("epoch", trial_id=trial_id, attempt=1, step=step, metrics=metrics)
    weights = folder / "trials" / trial_id / file
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    (weights.parent / CHECKPOINT_FOLDER).mkdir()
    (weights.parent / f".{NETWORK_FILE}.part").write_bytes(b"half")
    if state != "running":
        end_trial(recorder, trial_id, state)


def kept(folder: Path, file: str = HEAD_FILE) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"trials/*/{file}"))


def test_a_trials_value_is_its_kept_epochs(recorder, tmp_path):
    run_trial(recorder, tmp_path, 1, [0.5, 0.9, 0.9, 0.7], "completed")
    trial = SearchRecord.load(tmp_path).trials["t0001"]
    assert (trial.best_epoch, trial.best_value) == (4, 0.7)


def test_a_trial_that_ended_before_its_first_epoch_has_no_value(recorder, tmp_path):
    run_trial(recorder, tmp_path, 1, [], "failed")
    trial = SearchRecord.load(tmp_path).trials["t0001"]
    assert (trial.best_epoch, trial.best_value, trial.state) == (None, None, "failed")


def test_only_the_best_heads_and_those_still_needed_stay(recorder, tmp_path):
    for number in range(1, 8):
        run_trial(recorder, tmp_path, number, [number / 10], "completed")
    run_trial(recorder, tmp_path, 8, [0.01], "interrupted")
    run_trial(recorder, tmp_path, 9, [0.99], "failed")
    weights = WeightsOnDisk(tmp_path, Experiment.parse({"name": "x"}), recorder.record)
    weights.prune()
    weights.prune()
    assert kept(tmp_path) == ["t0003", "t0004", "t0005", "t0006", "t0007", "t0008"]
    # Only an interrupted training has something to go on with.
    assert kept(tmp_path, CHECKPOINT_FOLDER) == ["t0008"]
    assert kept(tmp_path, f".{NETWORK_FILE}.part") == ["t0008"]


def test_however_many_networks_are_trained_there_are_never_more_than_five_and_the_running(
    recorder, tmp_path
):
    weights = WeightsOnDisk(tmp_path, Experiment.parse({"name": "x"}), recorder.record)
    values = [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.4, 0.6, 0.5, 0.95, 0.05, 0.85]
    for number, value in enumerate(values, start=1):
        run_trial(recorder, tmp_path, number, [value], "completed", file=NETWORK_FILE)
        assert len(kept(tmp_path, NETWORK_FILE)) <= 5 + 1
        weights.prune()
        assert len(kept(tmp_path, NETWORK_FILE)) <= 5
    assert kept(tmp_path, NETWORK_FILE) == ["t0002", "t0004", "t0006", "t0010", "t0012"]


def test_the_heads_that_networks_begin_with_stay_while_each_stage_keeps_its_best(
    recorder, tmp_path
):
    first = [{"learning_rate": 0.5, "batch_size": 32}]
    experiment = Experiment.parse(
        {
            "name": "x",
            "model": {"train": "all"},
            "search": {
                "stages": {"best": 2},
                "first": first,
                "space": {
                    "learning_rate": {"low": 0.01, "high": 1.0},
                    "batch_size": {"values": [32, 64]},
                },
            },
        }
    )
    configuration = {"learning_rate": 0.1, "batch_size": 64}
    run_trial(recorder, tmp_path, 1, [0.1], "completed", stage="head", configuration=dict(first[0]))
    for number in range(2, 9):
        run_trial(
            recorder,
            tmp_path,
            number,
            [number / 10],
            "completed",
            stage="head",
            configuration=configuration,
        )
    for number in range(9, 12):
        run_trial(
            recorder, tmp_path, number, [0.9], "completed", file=NETWORK_FILE, stage="network"
        )
    WeightsOnDisk(tmp_path, experiment, recorder.record, keep=2).prune()
    assert kept(tmp_path) == ["t0001", "t0007", "t0008"]
    assert kept(tmp_path, NETWORK_FILE) == ["t0009", "t0010"]


def test_what_a_training_has_to_say_becomes_findings():
    memory = "out of memory at 64 images, going on with 32 at a time"
    found = findings_of([memory, "the last batch joins the one before it"], 3)
    assert [(f.rule, f.severity, f.evidence, f.step) for f in found] == [
        ("out_of_memory", "warning", memory, 3),
        ("training_note", "info", "the last batch joins the one before it", 3),
    ]
    assert "micro_batch_size" in found[0].advice


def test_listeners_hear_what_the_journal_holds(tmp_path):
    heard = []
    journal = JournalWriter(tmp_path, "s")
    Recorder(journal, SearchRecord(), [heard.append]).append("search_started", experiment={})
    journal.close()
    assert heard == [SearchRecord.load(tmp_path).started]


def test_rays_snapshot_holds_no_open_journal(recorder, tmp_path):
    experiment = Experiment.parse({"name": "x"})
    stores = Stores(features=tmp_path, images=None)
    rules = LiveRules(tmp_path, experiment, stores.read_labels, recorder)
    weights = WeightsOnDisk(tmp_path, experiment, recorder.record)
    assert JournalCallback(recorder, rules, weights, WorkerFailures()).__getstate__() == {}
    assert RuleStopper(rules, ()).__getstate__()["_rules"] is None


def test_a_rule_stops_a_training_that_went_on_where_it_stops_one_that_was_not_interrupted(
    recorder, tmp_path
):
    # Training images are learned by heart; what is learned is of no use for the others.
    learned = [1 - 0.9**step for step in range(20)]
    experiment = Experiment.parse({"name": "x", "rules": {"stop_on": ["overfit"]}})
    rules = LiveRules(tmp_path, experiment, lambda: pytest.fail("no labels"), recorder)

    def stops_at(trial_id: str, interrupted_after: int | None) -> int | None:
        who = {"trial_id": trial_id, "attempt": 1}
        recorder.append("trial_started", **who, configuration={})
        for step, share in enumerate(learned, start=1):
            metrics = {"train_loss": 1 - share, "train_accuracy": share}
            metrics |= {"validation_loss": 1 + share, "validation_accuracy": 0.1}
            if rules.stops(trial_id, step, metrics):
                return step
            recorder.append("epoch", **who, step=step, metrics=metrics)
            if step == interrupted_after:
                end_trial(recorder, trial_id, "interrupted")
                who["attempt"] = 2
                recorder.append("trial_started", **who, configuration={})
        return None

    stopped = stops_at("t0001", None)
    assert stopped is not None
    assert stops_at("t0002", stopped - 1) == stopped


@pytest.mark.parametrize("attempts_before", [0, 1])
def test_a_trial_whose_worker_died_before_it_began_begins_again(
    recorder, tmp_path, attempts_before
):
    if attempts_before:
        run_trial(recorder, tmp_path, 1, [0.5], "interrupted")
    error_file = tmp_path / "error.txt"
    error_file.write_text("The actor died unexpectedly before finishing this task.")
    trial: Any = SimpleNamespace(
        config={"trial_id": "t0001", "attempt": attempts_before + 1, "configuration": {}},
        error_file=str(error_file),
    )
    failures, unused = WorkerFailures(), cast(Any, None)
    JournalCallback(recorder, unused, unused, failures).on_trial_error(1, [trial], trial)
    again = SearchRecord.load(tmp_path).trials["t0001"]
    assert (again.state, again.attempt) == ("interrupted", attempts_before + 1)
    assert failures.take()


def test_settings_are_the_experiments_with_the_trials_own_values_in_place():
    settings = settings_of(Training(dropout=0.2), {"learning_rate": 0.5, "batch_size": 8})
    assert (settings.learning_rate, settings.batch_size, settings.dropout) == (0.5, 8, 0.2)


def test_without_a_reason_a_search_goes_on():
    stopper = EndInOrder(None)
    assert not stopper.stop_all()
    assert not stopper("ray1", {"epoch": 3})
    assert stopper.reason is None


def test_a_spent_time_budget_ends_a_search():
    stopper = EndInOrder(1e-9)
    assert stopper.stop_all()
    assert stopper.reason == "time_budget"
    assert not EndInOrder(3600).stop_all()


def test_an_interrupt_stays_the_reason_when_the_time_runs_out_as_well():
    stopper = EndInOrder(1e-9)
    with interrupts.handled():
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.stop_all()
        assert stopper.stop_all()
    assert stopper.reason == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_in_order_and_the_second_at_once(number):
    stopper = EndInOrder(None)
    with interrupts.handled():
        os.kill(os.getpid(), number)
        assert stopper.stop_all()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            stopper.stop_all()
