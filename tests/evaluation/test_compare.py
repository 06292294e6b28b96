"""Tables of runs: order, types, names, conditions, and what spreadsheets must not run."""

import json
import math
from typing import Any

import pandas as pd
import pytest

from visiontuner.errors import UserMistake
from visiontuner.evaluation.compare import (
    RunSummary,
    best_row,
    cell,
    default_columns,
    describe_progress,
    mode_of,
    notes,
    pick_columns,
    search_progress,
    sort,
    table,
    to_csv,
    to_json,
    to_markdown,
    where,
)


def trial(name: str, value: float | None = None, **changes: Any) -> RunSummary:
    fields: dict[str, Any] = {
        "run": name,
        "state": "completed",
        "search": "a",
        "search_id": "a",
        "trial_id": name,
        "objective": "validation_accuracy",
        "best_value": value,
        "started": 100.0,
        "ended": 110.0,
        "search_started": 90.0,
    }
    return RunSummary(**{**fields, **changes})


def names(frame: pd.DataFrame) -> list[str]:
    return list(frame["run"])


# Order


def test_best_first_ties_in_the_given_order_gaps_last():
    runs = [trial("t1", 0.8), trial("t2", None), trial("t3", 0.9), trial("t4", 0.8)]
    assert names(sort(table(runs))) == ["t3", "t1", "t4", "t2"]
    assert names(sort(table(runs), reverse=True)) == ["t1", "t4", "t3", "t2"]


def test_less_loss_is_better():
    runs = [trial(n, v, objective="validation_loss") for n, v in (("t1", 0.5), ("t2", 0.2))]
    frame = sort(table(runs))
    assert names(frame) == ["t2", "t1"]
    assert runs[best_row(frame)].run == "t2"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("validation_loss", "min"),
        ("eval/loss", "min"),
        ("test_nll", "min"),
        ("rmse", "min"),
        ("epoch_seconds", "min"),
        ("accuracy", "max"),
        ("glossiness", "max"),
        ("validation_macro_f1", "max"),
    ],
)
def test_direction_follows_the_words_of_a_name(metric, mode):
    assert mode_of(metric) == mode


def test_a_running_run_is_ranked_by_its_last_value_but_never_called_best():
    going = trial("t2", None, state="running", metrics={"validation_accuracy": 0.99})
    frame = sort(table([trial("t1", 0.9), going]))
    assert names(frame) == ["t2", "t1"]
    assert frame["run"][best_row(frame)] == "t1"
    assert any("still going" in note for note in notes([going]))


def test_failed_runs_have_no_value_and_no_best():
    runs = [
        trial("t1", None, state="failed", metrics={"validation_accuracy": 0.9}, reason="NaN loss"),
        trial("t2", 0.8, state="interrupted"),
    ]
    frame = sort(table(runs))
    assert frame["best_validation_accuracy"].isna().all()
    assert best_row(frame) is None
    assert "reason" in default_columns(frame)
    assert any("No run ended in order" in note for note in notes(runs))


def test_without_an_objective_the_newest_come_first_and_a_note_says_so():
    runs = [RunSummary(run=n, state="finished", started=s) for n, s in (("a", 1.0), ("b", 2.0))]
    assert names(sort(table(runs))) == ["b", "a"]
    assert any("--sort" in note for note in notes(runs))


def test_sorting_text_beside_gaps():
    runs = [trial(n, 0.5, params={"optimizer": o}) for n, o in (("t1", "sgd"), ("t2", "adam"))]
    assert names(sort(table([trial("t0", 0.5), *runs]), "optimizer")) == ["t2", "t1", "t0"]


def test_an_unknown_column_names_the_nearest():
    with pytest.raises(UserMistake, match=r"'learning-rate'.*Nearest: learning_rate"):
        sort(table([trial("t1", 0.5, params={"learning_rate": 0.1})]), "learning-rate")


# Columns


def test_numbers_from_mlflow_and_from_a_journal_are_the_same_numbers():
    frame = table(
        [
            trial("t1", params={"learning_rate": "1e-05", "batch_size": "64"}),
            trial("t2", params={"learning_rate": 0.01, "batch_size": 128}),
            trial("t3"),
        ]
    )
    assert frame["learning_rate"].tolist()[:2] == [1e-5, 0.01]
    assert str(frame["batch_size"].dtype) == "Int64"
    assert frame["batch_size"].tolist()[:2] == [64, 128]


@pytest.mark.parametrize("odd", ["1_000", "0x10", "٣", "1e", "", "true", "9" * 400])
def test_what_only_looks_like_a_number_stays_text(odd):
    frame = table([trial("t1", params={"p": "1"}), trial("t2", params={"p": odd})])
    assert frame["p"].tolist() == ["1", odd]


def test_huge_numbers_do_not_overflow():
    frame = table([trial("t1", params={"p": "123456789012345678901234567890"})])
    assert frame["p"][0] == pytest.approx(1.2345678901234568e29)


def test_mlflows_infinity_and_nan_are_missing():
    values = [math.nan, math.inf, 1.7976931348623157e308, 0.5]
    runs = [trial(str(i), metrics={"m": value}) for i, value in enumerate(values)]
    assert table(runs)["m"].isna().tolist() == [True, True, True, False]


def test_names_that_are_taken_get_a_prefix():
    run = trial(
        "t1", 0.5, params={"state": "x", "learning_rate": 0.1}, metrics={"learning_rate": 0.0}
    )
    frame = table([run])
    assert frame["state"][0] == "completed"
    assert frame["param.state"][0] == "x"
    assert frame["learning_rate"][0] == 0.1
    assert frame["metric.learning_rate"][0] == 0.0


def test_shown_are_what_differs_and_what_came_out():
    shared = {"optimizer": "adamw", "model.backbone": "resnet18", "search.trials": "1"}
    runs = [
        trial("t1", 0.5, params={"learning_rate": 0.1, **shared}),
        trial("t2", 0.5, params={"learning_rate": 0.2, **shared, "model.backbone": "resnet50"}),
    ]
    columns = default_columns(table(runs))
    assert columns == [
        "run", "state", "learning_rate", "model.backbone", "best_validation_accuracy", "seconds",
    ]  # fmt: skip


def test_columns_by_pattern_in_the_order_asked_for():
    frame = table([trial("t1", metrics={"test_a": 1.0, "test_b": 2.0})])
    assert pick_columns(frame, ["test_*", "run", "test_a"]) == ["test_a", "test_b", "run"]
    with pytest.raises(UserMistake, match="no column 'nope\\*'"):
        pick_columns(frame, ["nope*"])


def test_no_runs_are_an_empty_table():
    frame = sort(table([]))
    assert frame.empty
    assert best_row(frame) is None
    assert to_json(frame[["run", "state"]]) == "[]\n"
    assert to_csv(frame[["run", "state"]]) == "run,state\n"


def test_different_images_and_objectives_are_said():
    told = " ".join(
        notes([trial("t1", 0.5, data_digest="x"), trial("t2", 0.5, data_digest="y",
               objective="validation_loss")])
    )  # fmt: skip
    assert "different images" in told
    assert "different things (validation_accuracy, validation_loss)" in told


# Conditions


@pytest.fixture
def frame() -> pd.DataFrame:
    return table(
        [
            trial("t1", 0.9, params={"lr": 0.01, "size": "64", "o.k": "adam"}, best_epoch=3),
            trial("t2", 0.8, params={"lr": 0.1, "size": "128", "o.k": "sgd"}),
            trial("t3", None, state="failed", params={"lr": 0.1}),
        ]
    )


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("lr < 0.05", ["t1"]),
        ("lr > 0.05 and size == 128", ["t2"]),
        ("size == 64 or state == 'failed'", ["t1", "t3"]),
        ("not size == 64", ["t2", "t3"]),
        ("size != 64", ["t2", "t3"]),
        ("0.001 < lr <= 0.01", ["t1"]),
        ("size in [64, 128]", ["t1", "t2"]),
        ("state not in ('failed', 'running')", ["t1", "t2"]),
        ("`o.k` == 'adam'", ["t1"]),
        ("best_epoch >= -1", ["t1"]),
        ("(lr == 0.1) and (not (size == 128))", ["t3"]),
        ("started > '1970-01-01'", ["t1", "t2", "t3"]),
        ("lr > 99999999999999999999999999", []),
    ],
)
def test_conditions_keep_rows(frame, condition, kept):
    assert names(where(frame, condition)) == kept


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('touch hacked') == 0",
        "@pd.io.common.os.system('touch hacked') == 0",
        "run.str.len() > 1",
        "run.__class__ == 1",
        "lr[0] > 1",
        "(lambda: 1)() == lr",
        "[x for x in (1, 2)] == lr",
        "f'{lr}' == run",
        "9**9**9 > lr",
        "lr + 1 > 2",
        "lr",
        "1 == 1",
        "'a' in run",
        "run in run",
        "run is 't1'",
        "run == None",
        "run == -'t1'",
        "lr < 'a'",
        "run < 3",
        "nosuch < 3",
        "lr = 3",
        "",
        "lr <",
        "lr < 1; import os",
        "run == 't1\n",
        "(" * 500,
        "not " * 400 + "lr < 1",
        "lr < 1 or " * 300 + "lr < 1",
        "`no such` < 1",
        "lr\0 < 1",
    ],
)
def test_anything_else_is_one_line_and_runs_nothing(frame, condition, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserMistake) as error:
        where(frame, condition)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Formats

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "＝1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_csv_text_is_no_formula(text):
    run = trial("t1", params={text: "a", "p": text}, reason=text)
    frame = table([run, trial("t2", params={"p": "text"})])
    rows = pd.read_csv(__import__("io").StringIO(to_csv(frame)), keep_default_na=False)
    safe = "'" + text.replace("\t", r"\t")
    assert rows["p"][0] == safe
    assert rows["reason"][0] == safe
    assert safe in rows.columns


def test_csv_leaves_negative_numbers_alone_and_keeps_all_digits():
    frame = table([trial("t1", -0.1234567890123456)])
    assert to_csv(frame[["best_validation_accuracy"]]).splitlines()[1] == "-0.1234567890123456"


def test_json_is_strict_and_keeps_types():
    frame = table([trial("t1", math.nan, params={"size": 64}), trial("t2", 0.5, started=None)])
    first, second = json.loads(to_json(frame), parse_constant=pytest.fail)
    assert first["best_validation_accuracy"] is None
    assert first["size"] == 64
    assert isinstance(first["size"], int)
    assert first["started"] == "1970-01-01T00:01:40Z"
    assert (second["size"], second["started"]) == (None, None)


def test_markdown_shows_text_as_text():
    hostile = "<img src=x onerror=alert(1)>|`code` [a](b)\nnew *bold* &amp;"
    text = to_markdown(table([trial("t1", reason=hostile)])[["run", "reason"]])
    assert len(text.splitlines()) == 3
    assert "<img" not in text
    assert r"\|" in text
    assert r"\[a\](b)" in text


def test_a_cell_holds_no_control_characters_and_no_novel():
    assert "\x1b" not in cell("\x1b[31mred", "reason")
    assert len(cell("x" * 5000, "reason")) == 60
    assert (cell(0.93751, "best_validation_accuracy"), cell(1e-5, "lr")) == ("0.9375", "1e-05")
    assert (cell(math.nan, "lr"), cell(pd.NA, "lr"), cell(pd.NaT, "started")) == ("–", "–", "–")


# Searches side by side


def search(name: str, ended: list[tuple[float, float | None]], **changes: Any) -> list[RunSummary]:
    return [
        trial(f"t{i}", value, search=name, search_id=name, search_started=0.0, ended=second,
              state="completed" if value is not None else "failed", **changes)
        for i, (second, value) in enumerate(ended)
    ]  # fmt: skip


def test_best_so_far_counts_failed_trials_and_never_falls():
    runs = search("a", [(30.0, 0.7), (10.0, None), (20.0, 0.9), (40.0, 0.8)])
    (progress,) = search_progress(runs)
    assert progress.seconds.tolist() == [10.0, 20.0, 30.0, 40.0]
    assert math.isnan(progress.best[0])
    assert progress.best[1:].tolist() == [0.9, 0.9, 0.9]
    assert progress.reached(0.8) == 1
    assert progress.reached(0.95) is None


def test_searches_are_told_with_what_each_needed():
    runs = search("slow", [(10.0, 0.7), (50.0, 0.9)]) + search("fast", [(5.0, 0.7), (6.0, 0.8)])
    told = describe_progress(search_progress(runs))
    assert told[0] == (
        "slow: 2 trials in 50.0 s, best validation_accuracy 0.9000 (t1) after 50.0 s and 2 trials."
    )
    assert told[2] == (
        "slow ends 0.1000 better than fast; it reached 0.8000 after 50.0 s and 2 trials, "
        "fast after 6.0 s and 2 trials."
    )
    assert "chance" in told[3]


def test_equal_searches_are_said_to_be_equal_the_sooner_first():
    runs = search("late", [(10.0, 0.9)]) + search("soon", [(5.0, 0.9)])
    assert any("soon ends as good as late" in line for line in describe_progress(
        search_progress(runs)))  # fmt: skip


def test_searches_for_different_things_are_not_ranked():
    runs = search("a", [(1.0, 0.9)]) + search("b", [(1.0, 0.3)], objective="validation_loss")
    assert describe_progress(search_progress(runs))[-1].startswith("They have different objectives")


def test_a_search_whose_trials_all_failed_says_so():
    told = describe_progress(search_progress(search("a", [(1.0, None)]) + search("b", [(1, 0.5)])))
    assert told[1] == "a: 1 trial in 1.0 s, none of them finished."
    assert len(told) == 2
