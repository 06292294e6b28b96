"""`visiontuner compare` as a person meets it: tables, files, figures, one-line mistakes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from visiontuner.cli.console import print_runs
from visiontuner.cli.judge import compare as command
from visiontuner.evaluation.compare import default_columns
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter
from visiontuner.workflow.compare import compare, load_runs


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def write_search(name: str, values: list[float | None], *, ended: bool = True) -> Path:
    """A search with a trial for each value; None is one that failed."""
    folder, now = Path("searches") / name, [1_700_000_000.0]
    journal = JournalWriter(folder, f"id-of-{name}", clock=lambda: now[0])
    experiment = Experiment.parse({"name": "images"}).model_dump(mode="json")
    journal.append("search_started", name=name, experiment=experiment, data={"digest": "ab"})
    for number, value in enumerate(values, 1):
        trial: dict[str, Any] = {"trial_id": f"t{number:04d}", "attempt": 1}
        configuration = {"learning_rate": 10.0**-number, "batch_size": 32 * number}
        journal.append("trial_started", configuration=configuration, **trial)
        for step in (1, 2, 3):
            now[0] += 1
            accuracy = (value or 0.1) * (1 - math.exp(-step))
            metrics = {"validation_accuracy": accuracy, "validation_loss": 1 / step}
            journal.append("epoch", step=step, metrics=metrics, **trial)
        state = "completed" if value is not None else "failed"
        journal.append(
            "trial_ended", state=state, best_epoch=3, best_value=value,
            error=None if value is not None else "=cmd|' /C calc'!A0", **trial,
        )  # fmt: skip
    if ended:
        journal.append("search_ended", state="completed")
    journal.close()
    return folder


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def one_line(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code in (1, 2), result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
)
def test_what_the_output_cannot_hold_is_spelt_out(environment):
    write_search("a", [0.8, 0.9])
    done = subprocess.run(
        [sys.executable, "-m", "visiontuner", "compare"],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u2190 best" in done.stdout


def test_the_newest_search_best_first_its_best_row_marked():
    write_search("a", [0.8, 0.9, None])
    result = call()
    assert result.exit_code == 0, result.output
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == [
        "run", "state", "learning_rate", "batch_size", "best_validation_accuracy", "best_epoch",
        "epochs", "seconds", "reason",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == ["t0002", "t0001", "t0003"]
    assert ["← best" in row for row in rows] == [True, False, False]


def test_numbers_are_aligned_at_the_right():
    write_search("a", [0.8, 0.9])
    lines = call("--columns", "run,batch_size").stdout.splitlines()
    ends = {len(line.replace("← best", "").rstrip()) for line in lines}
    assert len(ends) == 1


def test_where_top_columns_and_sort_together():
    write_search("a", [0.7, 0.8, 0.9])
    result = call(
        "--where", "batch_size >= 64", "--sort", "learning_rate", "--columns", "run,batch*",
        "--format", "csv", "--top", "1",
    )  # fmt: skip
    assert result.stdout == "run,batch_size\nt0003,96\n"
    assert "No run fulfils --where." in call("--where", "batch_size > 1000").output


def test_the_words_of_mlproject_mean_not_given():
    write_search("a", [0.7])
    result = call("auto", "--sort", "auto", "--where", "none", "--top", "auto", "--output", "none")
    assert result.exit_code == 0
    assert "t0001" in result.stdout


def test_formats_follow_the_files_name_and_hold_everything():
    write_search("a", [0.7, None])
    for name in ("runs.csv", "runs.json", "runs.md", "runs.txt"):
        result = call("--output", name)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
        assert f"2 runs in {name}." in result.stderr
    held = json.loads(Path("runs.json").read_text())
    assert held[0]["validation_loss"] == pytest.approx(1 / 3)
    table = pd.read_csv("runs.csv")
    assert list(table.columns) == list(held[0])
    assert table["reason"][1].startswith("'=cmd")
    assert Path("runs.md").read_text().startswith("| run | state |")
    assert Path("runs.txt").read_text().splitlines()[1].endswith("← best")


def test_two_searches_side_by_side_with_figures():
    a, b = write_search("a", [0.8, 0.9]), write_search("b", [0.5, 0.6])
    result = call(str(a), str(b), "--figure", "ab.png", "--curves", "curves.png")
    assert result.exit_code == 0, result.output
    assert "a ends 0.3000 better than b; it reached 0.6000 after 3.0 s and 1 trial" in result.stdout
    for name in ("ab.png", "curves.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    both = call("searches").stdout
    assert both.splitlines()[0].split()[:2] == ["run", "search"]
    assert sum(line.startswith("t000") for line in both.splitlines()) == 4


def test_a_search_named_twice_is_one_search():
    folder = write_search("a", [0.8, 0.9])
    assert len(compare([folder, str(folder), "searches"])) == 2


def test_the_notebooks_frame_has_plain_rows_best_first():
    write_search("a", [0.8, 0.9, None])
    frame = compare(where="state != 'failed'")
    assert list(frame.index) == [0, 1]
    assert frame["best_validation_accuracy"].tolist() == [0.9, 0.8]
    assert compare("searches/a", sort="batch_size")["batch_size"].tolist() == [32, 64, 96]


def test_bad_days_are_a_table_that_says_so():
    write_search("failed", [None, None])
    assert "No run ended in order, so there is no best one" in call("searches/failed").stdout
    write_search("one", [0.5])
    assert "nothing to compare it with" in call("searches/one").stdout
    write_search("empty", [])
    empty = call("searches/empty")
    assert empty.exit_code == 0
    assert empty.stdout == "searches/empty has no trial yet.\n"
    assert call("searches/empty", "--format", "json").stdout == "[]\n"


def test_a_search_that_still_runs_says_so_and_a_dead_one_is_interrupted():
    folder = Path("searches/live")
    journal = JournalWriter(folder, "live")
    experiment = Experiment.parse({"name": "images"}).model_dump(mode="json")
    journal.append("search_started", experiment=experiment, data={})
    journal.append("trial_started", trial_id="t0001", attempt=1, configuration={"x": 1})
    metrics = {"validation_accuracy": 0.5}
    journal.append("epoch", trial_id="t0001", attempt=1, step=1, metrics=metrics)
    alive = call()
    assert "running" in alive.stdout
    assert "1 run is still going" in alive.stdout
    assert "0.5000" in alive.stdout
    journal.close()
    assert "interrupted" in call().stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "There is no MLflow database"),
        (["./"], "is no search folder and holds none"),
        (["searches/a", "--where", "__import__('os')"], "holds more than comparisons"),
        (["searches/a", "--where", "size < 3"], "no column 'size'"),
        (["searches/a", "--sort", "learningrate"], "Nearest: learning_rate"),
        (["searches/a", "--columns", "run,nope"], "no column 'nope'"),
        (["searches/a", "--top", "0"], "--top takes a whole number from 1"),
        (["searches/a", "--top", "-3"], "--top"),
        (["searches/a", "--format", "xlsx"], "--format takes one of text, csv, markdown, json"),
        (["searches/a", "--output", "no/such/runs.csv"], "Cannot write no/such/runs.csv"),
        (["searches/a", "--curves", "curves.svg"], "--curves takes a PNG file"),
        (["searches/a", "--curves", "c.png", "--metric", "nope"], "has a curve of nope"),
        (["searches/empty", "--figure", "f.png"], "no search with an ended trial"),
    ],
)
def test_a_mistake_is_one_line(arguments, told):
    write_search("a", [0.8, 0.9])
    write_search("empty", [])
    result = call(*arguments)
    assert result.exit_code in (1, 2)
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert len([n for n in result.stderr.splitlines() if n.startswith("Error: ")]) == 1


def test_no_search_at_all_names_the_next_step():
    assert "`visiontuner tune` makes one" in one_line()
    assert "is no search folder" in one_line(".")


def test_a_narrow_terminal_leaves_out_columns_never_the_result():
    write_search("a", [0.8, 0.9])
    frame = load_runs().frame
    for width in (60, 200):
        console = Console(width=width, force_terminal=True, color_system=None, record=True)
        with console.capture() as shown:
            told = print_runs(console, frame, default_columns(frame))
        lines = shown.get().splitlines()
        assert all(len(line.rstrip()) <= width for line in lines)
        assert "best_validation_accuracy" in lines[0]
        assert "0.9000" in lines[2]
        assert bool(told) == (width == 60)


def test_the_search_stays_where_two_have_trials_of_the_same_names():
    write_search("a", [0.8, 0.9])
    write_search("b", [0.8])
    frame = load_runs("searches").frame
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as shown:
        print_runs(console, frame, default_columns(frame))
    assert shown.get().splitlines()[0].split()[:2] == ["run", "search"]


def test_a_terminal_shows_the_best_rows_and_says_how_many_more_there_are():
    write_search("a", [0.5 + number / 1000 for number in range(60)])
    frame = load_runs().frame
    console = Console(width=120, force_terminal=True, color_system=None)
    with console.capture() as shown:
        told = print_runs(console, frame, ["run"])
    assert len(shown.get().splitlines()) == 41
    assert told == ["20 more runs: --top, --where, or --format csv."]


def test_help_shows_examples():
    result = call("--help")
    assert "visiontuner compare" in result.stdout
    assert "Examples:" in result.stdout
