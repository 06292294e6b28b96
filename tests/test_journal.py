from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontuner.errors import JournalError, SearchFailed
from visiontuner.journal import (
    Finding,
    JournalWriter,
    SearchRecord,
    read_events,
)
from visiontuner.paths import JOURNAL_FILE

FIRST = {"learning_rate": 0.003, "batch_size": 128}


@pytest.fixture
def writer(tmp_path):
    """A writer whose clock counts 1, 2, 3, …"""
    seconds = count(1)
    writer = JournalWriter(tmp_path / "search", "s1", clock=lambda: float(next(seconds)))
    yield writer
    writer.close()


@pytest.fixture
def folder(writer):
    return writer.path.parent


def start_search(writer, objective="validation_accuracy"):
    writer.append("search_started", experiment={"objective": objective})


def start(writer, trial_id, attempt=1, configuration=FIRST):
    writer.append("trial_started", trial_id=trial_id, attempt=attempt, configuration=configuration)


def epoch(writer, trial_id, step, attempt=1, **metrics):
    writer.append("epoch", trial_id=trial_id, attempt=attempt, step=step, metrics=metrics)


def end(writer, trial_id, state="completed", best_value=None, **fields):
    writer.append(
        "trial_ended", trial_id=trial_id, attempt=1, state=state, best_value=best_value, **fields
    )


def write_small_journal(writer):
    start_search(writer)
    start(writer, "t0001")
    epoch(writer, "t0001", 1, validation_accuracy=0.5, note_é=1.0)
    end(writer, "t0001", best_epoch=1, best_value=0.5)


# Writing and reading.


def test_append_returns_what_a_reader_sees(writer, folder):
    written = [
        writer.append("search_started", experiment={"name": "Größe ✓", "seed": 7}),
        writer.append("epoch", trial_id="t0001", attempt=1, step=1, metrics={"a": 0.1}),
    ]
    assert read_events(folder).events == written
    assert written[0]["schema_version"] == 1
    assert (written[0]["search_id"], written[0]["time"]) == ("s1", 1.0)


def test_nonfinite_numbers_come_back_and_the_file_is_plain_json(writer, folder):
    start(writer, "t0001")
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    writer.append(
        "epoch", trial_id="t0001", attempt=1, step=1, metrics=metrics, step_losses=[0.5, math.nan]
    )
    event = read_events(folder).events[-1]
    assert math.isnan(event["metrics"].pop("a"))
    assert event["metrics"] == {"b": math.inf, "c": -math.inf, "d": 1.5}
    assert math.isnan(event["step_losses"][1])

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    for line in writer.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_text_that_looks_like_a_number_stays_text(writer, folder):
    writer.append("finding", rule="NaN", severity="info", evidence="Infinity", advice="none")
    assert read_events(folder).events[0]["evidence"] == "Infinity"


def test_file_name_that_is_not_utf8_is_kept(writer, folder):
    name = os.fsdecode(b"caf\xe9.jpg")
    writer.append("finding", rule="bad_image", severity="info", evidence=name, advice="look")
    assert read_events(folder).events[0]["evidence"] == name


def test_reading_goes_on_where_it_stopped(writer, folder):
    start_search(writer)
    first = read_events(folder)
    assert read_events(folder, first.offset).events == []
    start(writer, "t0001")
    second = read_events(folder, first.offset)
    assert [event["event"] for event in second.events] == ["trial_started"]
    assert read_events(folder).events == first.events + second.events
    assert second.offset == writer.path.stat().st_size


def test_lines_that_cannot_be_json_are_refused_before_anything_is_written(writer, folder):
    start_search(writer)
    with pytest.raises(TypeError):
        writer.append("finding", evidence=object())
    assert len(read_events(folder).events) == 1


def test_folder_without_a_journal(tmp_path):
    with pytest.raises(JournalError, match=r"is no search folder.*No such file"):
        read_events(tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchFailed, match=r"Cannot write .*Name another --output"):
        JournalWriter(tmp_path / "file" / "search", "s1")


# A torn tail.


def test_journal_torn_at_every_byte_reads_as_its_whole_lines(writer, folder, tmp_path):
    write_small_journal(writer)
    content = writer.path.read_bytes()
    events = read_events(folder).events
    torn = tmp_path / "torn"
    torn.mkdir()
    for length in range(len(content) + 1):
        (torn / JOURNAL_FILE).write_bytes(content[:length])
        read = read_events(torn)
        whole = content[:length].count(b"\n")
        assert read.events == events[:whole]
        assert read.offset == content.rfind(b"\n", 0, length) + 1


def test_appending_after_a_tear_at_every_byte_leaves_whole_lines(writer, folder, tmp_path):
    write_small_journal(writer)
    content = writer.path.read_bytes()
    events = read_events(folder).events
    torn = tmp_path / "torn"
    torn.mkdir()
    for length in range(len(content) + 1):
        (torn / JOURNAL_FILE).write_bytes(content[:length])
        again = JournalWriter(torn, "s1", clock=lambda: 99.0)
        resumed = again.append("search_resumed")
        again.close()
        whole = content[:length].count(b"\n")
        assert read_events(torn).events == [*events[:whole], resumed]


@pytest.mark.parametrize("size", [65535, 65536, 65537, 300_000])
def test_tail_of_any_size_is_cut_off(writer, folder, size):
    start_search(writer)
    writer.close()
    whole = writer.path.read_bytes()
    with writer.path.open("ab") as file:
        file.write(b"x" * size)
    again = JournalWriter(folder, "s1")
    assert writer.path.read_bytes() == whole
    again.close()
    writer.path.write_bytes(b"x" * size)
    JournalWriter(folder, "s1").close()
    assert writer.path.read_bytes() == b""


names = st.text(min_size=1, max_size=8)
numbers = st.floats(width=64) | st.integers(-(2**40), 2**40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
lines = st.one_of(
    st.fixed_dictionaries(
        {
            "event": st.just("epoch"),
            "trial_id": names,
            "attempt": st.integers(1, 9),
            "step": st.integers(1, 99),
            "metrics": st.dictionaries(names, numbers, max_size=4),
        }
    ),
    st.fixed_dictionaries({"event": st.just("search_resumed"), "code": json_values}),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(lines, max_size=5), st.data())
def test_journal_cut_at_any_byte_reads_as_a_prefix_of_its_events(tmp_path_factory, events, data):
    folder = tmp_path_factory.mktemp("journal")
    writer = JournalWriter(folder, "s1", clock=lambda: 5.0)
    written = [writer.append(**event) for event in events]
    writer.close()
    content = (folder / JOURNAL_FILE).read_bytes()
    assert repr(read_events(folder).events) == repr(written)  # repr: NaN is not equal to itself
    length = data.draw(st.integers(0, len(content)))
    (folder / JOURNAL_FILE).write_bytes(content[:length])
    read = read_events(folder).events
    assert repr(read) == repr(written[: len(read)])
    assert len(read) == content[:length].count(b"\n")


# Damage, and what is newer.


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\x00\x00\x00",
        b"\xff\xfe",
        b"7",
        b"null",
        b"[]",
        b'"text"',
        b'{"event": "epoch"}',
        b'{"schema_version": 1, "event": "epoch", "search_id": "s1", "time": 1}',
        b'{"schema_version": 1, "event": "trial_ended", "search_id": "s1", "time": 1}',
        b'{"schema_version": null, "event": "x", "search_id": "s1", "time": 1}',
        b'{"schema_version": 1, "event": ["x"], "search_id": "s1", "time": 1}',
        b"[" * 100_000,
    ],
)
def test_damaged_middle_is_named(writer, folder, line):
    start_search(writer)
    with writer.path.open("ab") as file:
        file.write(line + b"\n")
    start(writer, "t0001")
    with pytest.raises(JournalError, match="damaged line") as caught:
        SearchRecord.load(folder)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_newer_schema_asks_for_an_update(writer, folder):
    start_search(writer)
    with writer.path.open("ab") as file:
        file.write(b'{"schema_version": 2, "kind": "something else"}\n')
    with pytest.raises(JournalError, match=r"newer visiontuner \(schema 2\)"):
        read_events(folder)


def test_unknown_events_and_blank_lines_are_passed_over(writer, folder):
    start_search(writer)
    with writer.path.open("ab") as file:
        file.write(b"\n\r\n")
    writer.append("something_new", trial_id="t0001", colour="blue")
    record = SearchRecord.load(folder)
    assert record.search_id == "s1"
    assert record.trials == {}


# One writer.


def test_second_writer_is_refused_until_the_first_closes(writer, folder):
    with pytest.raises(JournalError, match="still running"):
        JournalWriter(folder, "s1")
    writer.close()
    JournalWriter(folder, "s1").close()


def test_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from visiontuner.journal import JournalWriter;"
        "JournalWriter(Path(sys.argv[1]), 's1').append('search_started'); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert ended.returncode == -9
    again = JournalWriter(tmp_path, "s1")
    assert len(read_events(tmp_path).events) == 1
    again.close()


def test_full_disk_leaves_whole_lines(writer, folder):
    start_search(writer)
    before = writer.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit lies inside the next line: some of it is written, then the system refuses.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, hard))
    try:
        with pytest.raises(SearchFailed, match=r"Cannot write .*--resume"):
            start(writer, "t0001")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.path.read_bytes() == before
    start(writer, "t0001")
    assert len(read_events(folder).events) == 2


# Folding.


def test_record_of_a_search(writer, folder):
    start_search(writer)
    start(writer, "t0001")
    epoch(writer, "t0001", 1, validation_accuracy=0.5, train_loss=2.0)
    epoch(writer, "t0001", 2, validation_accuracy=0.7)
    writer.append(
        "finding",
        trial_id="t0001",
        attempt=1,
        rule="overfitting",
        severity="warning",
        step=2,
        evidence="e",
        advice="a",
    )
    end(writer, "t0001", best_epoch=2, best_value=0.7)
    record = SearchRecord.load(folder)
    trial = record.trials["t0001"]
    assert (trial.state, trial.finished, trial.attempt) == ("completed", True, 1)
    assert (trial.started, trial.ended) == (2.0, 6.0)
    assert (trial.best_epoch, trial.best_value) == (2, 0.7)
    assert trial.configuration == FIRST
    assert trial.curve("validation_accuracy") == ([1, 2], [0.5, 0.7])
    assert trial.curve("train_loss") == ([1], [2.0])
    assert trial.findings == [
        Finding(rule="overfitting", severity="warning", step=2, evidence="e", advice="a")
    ]
    assert record.best is trial
    assert record.ended is None


def test_resume_interrupts_what_was_running_and_leaves_the_rest(writer, folder):
    start_search(writer)
    for trial_id in ("t0001", "t0002", "t0003"):
        start(writer, trial_id)
    epoch(writer, "t0002", 1, validation_accuracy=0.4)
    end(writer, "t0001", best_value=0.9)
    end(writer, "t0003", state="failed", error="loss is nan")
    assert SearchRecord.load(folder).trials["t0002"].state == "running"
    writer.append("search_ended", state="interrupted")
    writer.append("search_resumed")
    record = SearchRecord.load(folder)
    states = {trial_id: trial.state for trial_id, trial in record.trials.items()}
    assert states == {"t0001": "completed", "t0002": "interrupted", "t0003": "failed"}
    assert not record.trials["t0002"].finished
    assert record.ended is None
    assert record.trials["t0003"].error == "loss is nan"


def test_second_attempt_begins_again_but_keeps_its_first_start(writer, folder):
    start_search(writer)
    start(writer, "t0001")
    epoch(writer, "t0001", 1, validation_accuracy=0.99)
    writer.append("search_resumed")
    start(writer, "t0001", attempt=2)
    epoch(writer, "t0001", 1, attempt=2, validation_accuracy=0.3)
    trial = SearchRecord.load(folder).trials["t0001"]
    assert (trial.attempt, trial.state, trial.started) == (2, "running", 2.0)
    assert trial.curve("validation_accuracy") == ([1], [0.3])


def test_folding_in_pieces_equals_folding_at_once(writer, folder):
    write_small_journal(writer)
    events = read_events(folder).events
    for cut in range(len(events) + 1):
        record = SearchRecord.of(events[:cut])
        for event in events[cut:]:
            record.apply(event)
        assert record == SearchRecord.of(events)


def test_events_of_a_trial_that_never_started_are_passed_over(writer, folder):
    epoch(writer, "t0009", 1, validation_accuracy=0.5)
    end(writer, "t0009", best_value=0.5)
    assert SearchRecord.load(folder).trials == {}


# Ranking.


def ended_search(writer, objective, trials):
    start_search(writer, objective)
    for trial_id, state, value in trials:
        start(writer, trial_id)
        end(writer, trial_id, state=state, best_value=value)
    return SearchRecord.load(writer.path.parent)


def test_ranking_breaks_ties_by_trial_id(writer):
    record = ended_search(
        writer,
        "validation_accuracy",
        [
            ("t0003", "completed", 0.9),
            ("t0001", "completed", 0.9),
            ("t0002", "completed", 0.95),
        ],
    )
    assert [trial.trial_id for trial in record.ranking()] == ["t0002", "t0001", "t0003"]


def test_smallest_loss_is_best(writer):
    record = ended_search(
        writer,
        "validation_loss",
        [("t0001", "completed", 0.3), ("t0002", "completed", 0.0), ("t0003", "completed", 0.2)],
    )
    assert record.mode == "min"
    assert [trial.trial_id for trial in record.ranking()] == ["t0002", "t0003", "t0001"]


def test_only_usable_trials_are_ranked(writer):
    record = ended_search(
        writer,
        "validation_accuracy",
        [
            ("t0001", "failed", 0.99),
            ("t0002", "interrupted", 0.98),
            ("t0003", "completed", None),
            ("t0004", "completed", math.nan),
            ("t0005", "completed", math.inf),
            ("t0006", "stopped_early", 0.1),
        ],
    )
    assert [trial.trial_id for trial in record.ranking()] == ["t0006"]


def test_search_without_a_usable_trial_has_no_best():
    assert SearchRecord().best is None


def test_a_trial_that_was_stopped_ranks_behind_those_that_ran_to_their_end(writer):
    start_search(writer)
    for trial_id, state, epochs, value in (
        ("t0001", "stopped_early", 2, 0.99),
        ("t0002", "completed", 4, 0.80),
        ("t0003", "stopped_early", 3, 0.70),
    ):
        start(writer, trial_id)
        for step in range(1, epochs + 1):
            epoch(writer, trial_id, step, validation_accuracy=value, validation_loss=0.5)
        end(writer, trial_id, state, best_epoch=epochs, best_value=value)
    ranking = SearchRecord.load(writer.path.parent).ranking()
    assert [trial.trial_id for trial in ranking] == ["t0002", "t0003", "t0001"]


def test_equal_objectives_rank_by_the_loss_of_the_kept_epoch(writer):
    start_search(writer)
    for trial_id, loss in (("t0001", 0.4), ("t0002", 0.3), ("t0003", 0.3)):
        start(writer, trial_id)
        epoch(writer, trial_id, 1, validation_accuracy=0.9, validation_loss=loss, epoch_seconds=1.0)
        end(writer, trial_id, best_epoch=1, best_value=0.9)
    ranking = SearchRecord.load(writer.path.parent).ranking()
    assert [trial.trial_id for trial in ranking] == ["t0002", "t0003", "t0001"]


@pytest.mark.parametrize(
    ("training", "losses", "kept"),
    [
        ({}, (0.3, 0.1, 0.2), 3),  # a cosine: the last one
        ({"early_stop": 2}, (0.3, 0.1, 0.2), 2),
        ({"schedule": "constant"}, (0.3, 0.1, 0.1), 2),
        ({"schedule": "constant"}, (math.nan, 0.3, math.inf), 2),
        ({"schedule": "constant"}, (math.nan, math.inf), None),
        ({}, (), None),
    ],
)
def test_the_kept_epoch_is_the_last_or_the_one_with_the_lowest_loss(writer, training, losses, kept):
    writer.append("search_started", experiment={"training": training})
    start(writer, "t0001")
    for step, loss in enumerate(losses, start=1):
        epoch(writer, "t0001", step, validation_loss=loss, validation_accuracy=1 / step)
    record = SearchRecord.load(writer.path.parent)
    found = record.kept_epoch(record.trials["t0001"])
    assert (found and found.step) == kept


def test_a_baseline_is_kept_like_a_trial_and_is_none(writer):
    start_search(writer)
    start(writer, "t0001")
    epoch(writer, "t0001", 1, validation_accuracy=0.8)
    end(writer, "t0001", best_epoch=1, best_value=0.8)
    writer.append(
        "baseline_ended", name="logistic_regression", configuration={"C": 1.0},
        metrics={"validation_accuracy": 0.9}, seconds=2.0,
    )  # fmt: skip
    record = SearchRecord.load(writer.path.parent)
    assert (list(record.trials), record.kept.trial_id) == (["t0001"], "t0001")
    writer.append("choice_made", chosen="logistic_regression")
    record = SearchRecord.load(writer.path.parent)
    assert (record.kept.best_value, record.kept.configuration) == (0.9, {"C": 1.0})
    assert record.best.trial_id == "t0001"
