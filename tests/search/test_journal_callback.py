"""What the driver writes and keeps, without a Ray: failure lines, heads, reasons to end."""

import os
import signal
from pathlib import Path

import pytest

from visiontuner.experiment import Experiment, Training
from visiontuner.journal import JournalWriter, SearchRecord
from visiontuner.search.interrupt import EndInOrder, signals_end
from visiontuner.search.live_rules import LiveRules, RuleStopper
from visiontuner.search.run import JournalCallback, Recorder, end_trial, failure_line, prune_heads
from visiontuner.search.trial import HEAD_FILE, settings_of

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


def run_trial(recorder: Recorder, folder: Path, number: int, values: list[float], state: str):
    trial_id = f"t{number:04d}"
    recorder.append("trial_started", trial_id=trial_id, attempt=1, configuration={})
    for step, value in enumerate(values, start=1):
        metrics = {"validation_accuracy": value}
        recorder.append("epoch", trial_id=trial_id, attempt=1, step=step, metrics=metrics)
    head = folder / "trials" / trial_id / HEAD_FILE
    head.parent.mkdir(parents=True)
    head.write_bytes(b"head")
    end_trial(recorder, trial_id, state)


def test_a_trials_value_is_its_best_epochs(recorder, tmp_path):
    run_trial(recorder, tmp_path, 1, [0.5, 0.9, 0.9, 0.7], "completed")
    trial = SearchRecord.load(tmp_path).trials["t0001"]
    assert (trial.best_epoch, trial.best_value) == (2, 0.9)


def test_a_trial_that_ended_before_its_first_epoch_has_no_value(recorder, tmp_path):
    run_trial(recorder, tmp_path, 1, [], "failed")
    trial = SearchRecord.load(tmp_path).trials["t0001"]
    assert (trial.best_epoch, trial.best_value, trial.state) == (None, None, "failed")


def test_only_the_best_heads_and_those_still_needed_stay(recorder, tmp_path):
    for number in range(1, 8):
        run_trial(recorder, tmp_path, number, [number / 10], "completed")
    run_trial(recorder, tmp_path, 8, [0.01], "interrupted")
    prune_heads(tmp_path, recorder.record)
    prune_heads(tmp_path, recorder.record)
    kept = sorted(path.parent.name for path in tmp_path.glob(f"trials/*/{HEAD_FILE}"))
    assert kept == ["t0003", "t0004", "t0005", "t0006", "t0007", "t0008"]


def test_listeners_hear_what_the_journal_holds(tmp_path):
    heard = []
    journal = JournalWriter(tmp_path, "s")
    Recorder(journal, SearchRecord(), [heard.append]).append("search_started", experiment={})
    journal.close()
    assert heard == [SearchRecord.load(tmp_path).started]


def test_rays_snapshot_holds_no_open_journal(recorder, tmp_path):
    rules = LiveRules(tmp_path, Experiment.parse({"name": "x"}), tmp_path, recorder)
    assert JournalCallback(recorder, tmp_path, rules).__getstate__() == {}
    assert RuleStopper(rules, ()).__getstate__()["_rules"] is None


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
    stopper.interrupt()
    assert stopper.stop_all()
    assert stopper.reason == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_in_order_and_the_second_at_once(number):
    before = signal.getsignal(number)
    stopper = EndInOrder(None)
    with signals_end(stopper):
        os.kill(os.getpid(), number)
        assert stopper.stop_all()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
