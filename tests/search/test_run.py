"""Searches on a real Ray over a small feature store that every trial learns in a moment."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from visiontuner.data.arrays import FeatureSet, array_path, samples_path, write_meta
from visiontuner.errors import DiskError
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_json
from visiontuner.journal import FINISHED, Event, JournalWriter, SearchRecord, read_events
from visiontuner.search import run
from visiontuner.search.live import Recorder
from visiontuner.search.plan import (
    HEAD_FILE,
    LOGITS_FILE,
    SCORES_FILE,
    WEIGHTS_KEPT,
    Stores,
    stages_of,
)
from visiontuner.search.run import run_trials
from visiontuner.search.space import draw_beforehand

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray")]

CLASSES, DIMENSIONS = 3, 8


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 and 60 feature vectors in three clouds."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for split, count in {"train": 120, "validation": 60}.items():
        labels = np.arange(count) % CLASSES
        rows = 2 * np.eye(CLASSES, DIMENSIONS)[labels] + rng.normal(size=(count, DIMENSIONS))
        np.save(array_path(folder, split, "features"), rows.astype(np.float32))
        np.save(array_path(folder, split, "labels"), labels)
        write_json(samples_path(folder, split), {"paths": [str(n) for n in range(count)]})
    write_meta(
        FeatureSet(
            folder=folder,
            class_names=("a", "b", "c"),
            feature_dim=DIMENSIONS,
            splits=("train", "validation"),
            findings=(),
            engine="none",
            seconds=0.0,
        )
    )
    return folder


class Search:
    """One search folder, run as often as a test wants."""

    def __init__(self, folder: Path, features: Path, **experiment: Any) -> None:
        self.folder, self.features = folder, features
        self.experiment = Experiment.parse({"name": "x", **experiment})

    def run(self, listen: Callable[[Event], None] = lambda _: None) -> str:
        begun = (self.folder / "journal.jsonl").exists()
        record = SearchRecord.load(self.folder) if begun else SearchRecord()
        journal = JournalWriter(self.folder, "s")
        try:
            recorder = Recorder(journal, record, [listen])
            described = self.experiment.model_dump(mode="json")
            recorder.append("search_resumed" if begun else "search_started", experiment=described)
            return run_trials(
                self.folder,
                stages_of(self.experiment)[0],
                recorder,
                stores=Stores(features=self.features, images=None),
                cache=self.folder,
                time_budget=self.experiment.search.time_budget,
            )
        finally:
            journal.close()

    @property
    def trials(self) -> dict[str, Any]:
        return SearchRecord.load(self.folder).trials

    def configurations(self) -> list[dict[str, Any]]:
        return [trial.configuration for _, trial in sorted(self.trials.items())]


@pytest.fixture
def search(tmp_path: Path, features: Path) -> Callable[..., Search]:
    def make(*, epochs: int = 3, objective: str = "validation_accuracy", **search: Any) -> Search:
        rules = search.pop("rules", {})
        search = {"algorithm": "random", "scheduler": "none", **search}
        return Search(
            tmp_path / "search",
            features,
            objective=objective,
            training={"epochs": epochs, "optimizer": "sgd"},
            search=search,
            rules=rules,
        )

    return make


def rates(*values: float) -> dict[str, Any]:
    return {"learning_rate": {"values": list(values)}}


def after(number: int, event: str) -> Callable[[Event], None]:
    """A listener that presses Ctrl-C once, when an event came so many times."""
    seen: list[Event] = []

    def listen(line: Event) -> None:
        if line["event"] == event:
            seen.append(line)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for the files of two trials or so."""
    folder = tmp_path / "search" / "trials"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_interrupts_a_search_and_with_room_it_goes_on(search, small_disk):
    full = search(trials=6)
    filler = small_disk / "filler"

    def fill(line: Event) -> None:
        if line["event"] == "trial_ended" and not filler.exists():
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - free % 4096))

    with pytest.raises(DiskError, match=r"Cannot write .*(No space left|requested and)"):
        full.run(fill)
    states = {trial.state for trial in full.trials.values()}
    assert states == {"completed", "interrupted"}
    filler.unlink()
    assert full.run() == "completed"
    assert [trial.state for trial in full.trials.values()] == ["completed"] * 6
    assert full.configurations() == draw_beforehand(full.experiment)


def test_a_random_search_runs_its_plan_and_leaves_what_packaging_needs(search, features):
    random = search(trials=4)
    assert random.run() == "completed"
    assert random.configurations() == draw_beforehand(random.experiment)
    labels = FeatureSet.open(features).split("validation").labels
    for trial in random.trials.values():
        assert trial.state == "completed"
        assert [epoch.step for epoch in trial.epochs] == [1, 2, 3]
        folder = random.folder / "trials" / trial.trial_id
        assert {path.name for path in folder.iterdir()} == {HEAD_FILE, LOGITS_FILE, SCORES_FILE}
        logits = np.load(folder / LOGITS_FILE, allow_pickle=False)
        # The kept logits are the best epoch's.
        assert float((logits.argmax(axis=1) == labels).mean()) == pytest.approx(trial.best_value)
    lines = len(read_events(random.folder).events)
    assert random.run() == "completed"  # nothing left: no trial event is added
    assert len(read_events(random.folder).events) == lines + 1


def test_every_trial_keeps_its_scores_and_the_best_five_their_logits(search, features):
    many = search(trials=8)
    assert many.run() == "completed"
    labels = FeatureSet.open(features).split("validation").labels
    with_logits = set()
    for trial in many.trials.values():
        folder = many.folder / "trials" / trial.trial_id
        with np.load(folder / SCORES_FILE, allow_pickle=False) as scores:
            correct, log_loss = scores["correct"], scores["log_loss"]
        assert (correct.dtype, log_loss.dtype) == (np.uint8, np.float32)
        assert correct.mean() == pytest.approx(trial.best_value)
        best = next(epoch for epoch in trial.epochs if epoch.step == trial.best_epoch)
        assert log_loss.mean() == pytest.approx(best.metrics["validation_loss"], abs=1e-5)
        if (folder / LOGITS_FILE).is_file():
            with_logits.add(trial.trial_id)
            logits = np.load(folder / LOGITS_FILE, allow_pickle=False)
            assert np.array_equal(logits.argmax(axis=1) == labels, correct)
    ranking = SearchRecord.load(many.folder).ranking()
    assert with_logits == {trial.trial_id for trial in ranking[:WEIGHTS_KEPT]}


def test_the_same_seed_gives_the_same_search(search, tmp_path):
    values = []
    for name in ("one", "two"):
        again = search(trials=2)
        again.folder = tmp_path / name
        again.run()
        values.append({t.trial_id: t.curve("validation_loss") for t in again.trials.values()})
    assert values[0] == values[1]


def test_asha_stops_who_falls_behind(search):
    asha = search(
        epochs=9,
        algorithm="grid",
        scheduler="asha",
        objective="validation_loss",
        space=rates(0.3, 0.2, 0.1, 1e-7, 1e-8, 1e-9),
    )
    assert asha.run() == "completed"
    states = {t.configuration["learning_rate"]: t.state for t in asha.trials.values()}
    stopped = [rate for rate, state in states.items() if state == "stopped_early"]
    assert set(states.values()) == {"completed", "stopped_early"}
    assert {1e-7, 1e-8, 1e-9} <= set(stopped)
    for trial in asha.trials.values():
        assert (len(trial.epochs) == 9) == (trial.state == "completed")
        assert trial.best_value is not None


def test_a_failing_trial_does_not_end_the_search(search, capfd):
    grid = search(algorithm="grid", space=rates(1e30, 0.1, 1e32, 0.2), epochs=100)
    assert grid.run() == "completed"
    by_rate = {t.configuration["learning_rate"]: t for t in grid.trials.values()}
    assert by_rate[0.1].state == by_rate[0.2].state == "completed"
    assert by_rate[1e30].state == by_rate[1e32].state == "failed"
    assert "learning rate 1e+30" in by_rate[1e30].error
    assert "\n" not in by_rate[1e30].error
    assert "not_a_number" in [finding.rule for finding in by_rate[1e30].findings]
    assert "Traceback" not in "".join(capfd.readouterr())
    assert grid.run() == "completed"  # a failed trial has ended; it does not run again
    assert {t.attempt for t in grid.trials.values()} == {1}


def test_the_time_budget_ends_a_search_and_what_ran_is_interrupted(search, monkeypatch):
    later = SimpleNamespace(**vars(time) | {"monotonic": lambda: time.monotonic() + 3600})

    def an_hour_passes(line: Event) -> None:
        if line["event"] == "epoch":
            monkeypatch.setattr(run, "time", later)

    long = search(trials=3, epochs=10**6, time_budget="1h")
    assert long.run(an_hour_passes) == "time_budget"
    assert {t.state for t in long.trials.values()} == {"interrupted"}
    assert {t.reason for t in long.trials.values()} == {"time_budget"}


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_resumed_search_equals_an_uninterrupted_one(search, algorithm):
    half = search(trials=6, epochs=20, algorithm=algorithm)
    assert half.run(after(3 * 20 + 1, "epoch")) == "interrupted"  # in the fourth trial
    before = half.trials
    finished = {name for name, t in before.items() if t.state in FINISHED}
    begun = set(before) - finished
    assert finished
    assert begun
    assert all(before[name].state == "interrupted" for name in begun)

    assert half.run() == "completed"
    assert sorted(half.trials) == [f"t{number:04d}" for number in range(1, 7)]
    for name, trial in half.trials.items():
        assert trial.state == "completed"
        assert trial.attempt == (2 if name in begun else 1)
        if name in before:
            assert trial.configuration == before[name].configuration
        if name in finished:
            assert trial.ended == before[name].ended
    if algorithm == "random":
        assert half.configurations() == draw_beforehand(half.experiment)
    else:
        assert len({str(c) for c in half.configurations()}) == 6


def test_a_resumed_search_prunes_as_a_whole_one_does(search, tmp_path):
    """Ray's one core runs one trial at a time: both meet the same scores in the same order."""
    options = {"trials": 12, "epochs": 9, "scheduler": "asha", "objective": "validation_loss"}
    whole, half = search(**options), search(**options)
    whole.folder = tmp_path / "whole"
    assert whole.run() == "completed"
    assert half.run(after(4, "trial_ended")) == "interrupted"
    assert half.run(after(4, "trial_ended")) == "interrupted"
    assert half.run() == "completed"
    states = {name: trial.state for name, trial in whole.trials.items()}
    assert set(states.values()) == {"completed", "stopped_early"}
    assert {name: trial.state for name, trial in half.trials.items()} == states
    for name, trial in half.trials.items():
        assert [e.step for e in trial.epochs] == [e.step for e in whole.trials[name].epochs]


def test_every_searched_value_reaches_the_training(search):
    space = {
        "learning_rate": {"values": [0.25]},
        "batch_size": {"values": [16]},
        "weight_decay": {"values": [0.1]},
        "dropout": {"values": [0.5]},
        "label_smoothing": {"values": [0.1]},
        "optimizer": {"values": ["adamw"]},
        "epochs": {"values": [2, 4]},
    }
    grid = search(algorithm="grid", space=space, epochs=9)
    assert grid.run() == "completed"
    assert sorted(len(t.epochs) for t in grid.trials.values()) == [2, 4]
    for trial in grid.trials.values():
        assert trial.state == "completed"
        assert trial.epochs[0].metrics["learning_rate"] == pytest.approx(0.25)


def test_a_rule_stops_its_trial_and_no_other(search):
    grid = search(
        algorithm="grid",
        epochs=8,
        space=rates(1e-9, 0.1, 1e6),
        rules={"stop_on": ["learning_rate_too_high", "loss_not_decreasing"]},
    )
    assert grid.run() == "completed"
    by_rate = {t.configuration["learning_rate"]: t for t in grid.trials.values()}
    flat, good, high = (by_rate[rate] for rate in (1e-9, 0.1, 1e6))
    assert (flat.state, len(flat.epochs)) == ("stopped_early", 4)
    assert flat.reason == "rules.stop_on: loss_not_decreasing in epoch 4"
    assert (high.state, len(high.epochs)) == ("stopped_early", 2)  # one step an epoch
    assert (good.state, len(good.epochs), good.reason) == ("completed", 8, None)
    assert "error" not in [f.severity for f in good.findings]
    # One finding for each rule and trial, all of them before the trial's end.
    events = read_events(grid.folder).events
    named = [(e["trial_id"], e["rule"]) for e in events if e["event"] == "finding"]
    assert len(named) == len(set(named))
    assert (high.trial_id, "learning_rate_too_high") in named
    ended = [e["trial_id"] for e in events if e["event"] == "trial_ended"]
    last = {e["trial_id"]: n for n, e in enumerate(events) if e["event"] == "finding"}
    ends = {e["trial_id"]: n for n, e in enumerate(events) if e["event"] == "trial_ended"}
    assert sorted(ended) == sorted(grid.trials)
    assert all(last[trial_id] < ends[trial_id] for trial_id in last)
