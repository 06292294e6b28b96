"""What a person meets at the command line: help, mistakes, exit codes."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from visiontuner.cli import search as commands
from visiontuner.cli.main import COMMANDS as LISTED
from visiontuner.cli.main import main
from visiontuner.errors import TrackingError, UserMistake
from visiontuner.experiment.schema import OFFLINE_BACKBONES, Experiment
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.workflow import sync

COMMANDS = ("tune", "prepare", "sync", "backbones", "doctor")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def one_line(result: Result) -> str:
    """The error's only line; no traceback."""
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


# Help


def test_help_lists_the_commands_under_headings_in_the_order_of_need():
    result = call("--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    start = lines.index("Search:")
    rows = [line.split()[0] for line in lines[start + 1 :] if line.startswith("  ")]
    assert [word for word in rows if word in COMMANDS] == list(COMMANDS)


def test_the_help_lists_every_command_there_is():
    assert isinstance(main, click.Group)
    context = click.Context(main)
    for entries in LISTED.values():
        for name, entry in entries.items():
            command = main.get_command(context, name)
            assert command is not None
            assert command.name == name
            assert entry.summary == command.get_short_help_str(200)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_commands_help_shows_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"visiontuner {command}" in result.stdout


def test_tunes_help_lists_a_jobs_flags_apart_from_a_searchs():
    search, *jobs = call("tune", "--help").stdout.split("\nWith --on sagemaker: ")
    assert len(jobs) == 3
    options = search.partition("Options:")[2]
    for flag in ("--data", "--set", "--trials", "--resume FOLDER|JOB", "--on"):
        assert flag in options
    for flag in ("--instances", "--spot", "--kms-key", "--region", "--dry-run", "--yes"):
        assert flag not in options
        assert sum(f"  {flag} " in job for job in jobs) == 1
    assert "PAID" in jobs[0]
    assert "checkpoints are encrypted by the" in jobs[1]


SLOW = {
    "torch",
    "torchvision",
    "timm",
    "ray",
    "mlflow",
    "matplotlib",
    "sagemaker",
    "sklearn",
}
HEAVY = SLOW | {"scipy", "pandas", "onnxruntime", "optuna", "numpy", "boto3"}


def modules_after(arguments: list[str]) -> set[str]:
    """Packages that a new process has imported after a command."""
    code = (
        "import json, sys\n"
        "from visiontuner.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('\\n' + json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_nothing_heavy(option):
    assert HEAVY & modules_after([option]) == set()


@pytest.mark.parametrize("command", ["tune", "evaluate", "query", "deploy", "jobs"])
def test_a_commands_help_imports_nothing_slow(command):
    assert SLOW & modules_after([command, "--help"]) == set()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tune", "--data", ""], "--data"),
        (["tune", "--data="], "--data"),
        (["tune", "--trials", "2", "--set", ""], "--set"),
        (["prepare", "--data", ""], "--data"),
        (["evaluate", ""], "An argument"),
        (["sync", ""], "An argument"),
    ],
)
def test_an_unset_shell_variable_is_not_taken_for_the_default(searches, arguments, named):
    result = call(*arguments)
    assert result.exit_code == 2
    assert one_line(result).startswith(f"Error: {named} is empty")
    assert searches == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tune", "--set", "training.epoch=5"], "training.epoch; did you mean epochs?"),
        (["tune", "--set", "training.epochs=0"], "training.epochs must be"),
        (["tune", "--set", "training.epochs"], "section.key=value"),
        (["tune", "--set", "training.epochs=[1"], "not YAML"),
        (["tune", "--trials", "many"], "search.trials"),
        (["tune", "--trials", "0"], "search.trials must be >= 1"),
        (["tune", "--algorithm", "magic"], "search.algorithm"),
        (["tune", "--experiment", "nowhere.yaml"], "nowhere.yaml"),
        (["tune", "--data", "nowhere"], "nowhere"),
        (["tune", "--resume", "nowhere"], "no search folder"),
        (["tune", "--on", "moon"], "moon"),
        (["prepare", "--data", "nowhere"], "nowhere"),
        (["sync"], "no search in searches"),
        (["sync", "nowhere"], "nowhere"),
        (["backbones", "zzz"], "zzz"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(arguments, told):
    result = call(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.output
    if "moon" not in arguments:  # click shows its usage as well
        one_line(result)


def test_debug_shows_the_traceback_of_a_mistake():
    result = call("--debug", "tune", "--data", "nowhere")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "DataError: There is no data at nowhere" in result.stderr


@pytest.mark.parametrize(
    "other",
    [
        ["--trials", "3"],
        ["--backbone", "resnet18"],
        ["--algorithm", "grid"],
        ["--data", "photos"],
        ["--experiment", "x.yaml"],
        ["--output", "there"],
        ["--set", "seed=1"],
    ],
)
def test_resume_with_another_flag_is_refused(other, tmp_path):
    result = call("tune", "--resume", str(tmp_path), *other)
    assert result.exit_code == 2
    assert "--resume goes on with the search as it was" in one_line(result)


@pytest.mark.slow
def test_weights_that_cannot_be_fetched_name_the_choice_that_needs_none(tmp_path, images):
    # A closed port stands for a machine without internet.
    env = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        result = call("tune", "--data", str(images), "--backbone", "resnet18", "--output", "s")
    assert result.exit_code in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "efficientnet_lite0" in line
    assert "Traceback" not in result.output
    assert not (tmp_path / "s").exists()


def test_recommended_networks_have_licence_size_and_accuracy():
    lines = call("backbones", "--recommend").stdout.splitlines()
    (small,) = [line for line in lines if line.startswith("efficientnet_lite0")]
    assert small.split()[1:] == ["19", "224", "74.8", "%", "Apache-2.0", "offline"]
    offline = [line.split()[0] for line in lines if line.endswith("offline")]
    assert offline == list(OFFLINE_BACKBONES)


def test_data_of_backbones_is_for_the_recommended_ones():
    result = call("backbones", "--data", "photos")
    assert result.exit_code == 2
    assert "--data is for --recommend" in one_line(result)


# What reaches the workflow


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the workflow: remembers what was asked, answers with a finished search."""
    asked: list[dict[str, Any]] = []

    def remember(first: Any, **options: Any) -> Any:
        asked.append({"first": first, **options})
        return finished_search()

    monkeypatch.setattr(commands, "run_search", remember)
    monkeypatch.setattr(commands, "resume_search", remember)
    monkeypatch.setattr(sync, "sync_search", remember)
    return asked


def finished_search(**changes: Any) -> SimpleNamespace:
    best = TrialRecord(
        trial_id="t0002",
        configuration={"learning_rate": 0.00312345, "batch_size": 64},
        attempt=1,
        state="completed",
        started=0.0,
        best_epoch=3,
        best_value=0.9375,
    )
    result = {
        "folder": Path("searches/x"),
        "record": SearchRecord(trials={"t0002": best}),
        "best": best,
        "state": "completed",
        "classifier": Path("searches/x/classifier"),
        "model": "models:/x/1",
        "model_int8": None,
        "tracking_problem": None,
        "tracking_uri": "sqlite:///mlflow.db",
    }
    return SimpleNamespace(**(result | changes))


def test_without_a_flag_the_quickstart_is_searched(searches, repository):
    assert call("tune").exit_code == 0
    (asked,) = searches
    file = Experiment.load(repository / "experiments" / "quickstart.yaml")
    assert asked["first"].first_trials() == file.first_trials()
    first = {"search": {"first"}}  # written out in the file, the default without it
    assert asked["first"].model_dump(exclude=first) == file.model_dump(exclude=first)
    assert asked["output"] is None


def test_the_words_that_mlproject_passes_mean_not_given(searches):
    names = ("experiment", "data", "backbone", "trials", "algorithm", "output")
    words = [word for name in names for word in (f"--{name}", "auto")]
    assert call("tune", *words, "--resume", "none", "--set", "none").exit_code == 0
    assert call("tune").exit_code == 0
    assert searches[0] == {**searches[1], "observer": searches[0]["observer"]}


def test_own_images_get_the_general_defaults_and_their_folders_name(searches):
    assert call("tune", "--data", "my/photos").exit_code == 0
    experiment = searches[0]["first"]
    assert experiment == Experiment.parse({"data": {"source": "my/photos"}})
    assert experiment.name == "photos"


def test_flags_override_the_file_and_set_overrides_both(searches, tmp_path):
    (tmp_path / "x.yaml").write_text("name: mine\nsearch: {trials: 5}\ntraining: {epochs: 3}\n")
    result = call(
        "tune",
        "--experiment",
        "x.yaml",
        "--data",
        "photos",
        "--backbone",
        "resnet50",
        "--trials",
        "9",
        "--algorithm",
        "random",
        "--set",
        "training.epochs=4",
        "--set",
        "search.trials=10",
        "--output",
        "there",
    )
    assert result.exit_code == 0
    experiment = searches[0]["first"]
    assert (experiment.name, experiment.data.source) == ("mine", "photos")
    assert (experiment.model.backbone, experiment.search.algorithm) == ("resnet50", "random")
    assert (experiment.search.trials, experiment.training.epochs) == (10, 4)
    assert searches[0]["output"] == Path("there")


def test_resume_goes_on_in_the_folder(searches):
    assert call("tune", "--resume", "searches/x", "--on", "auto").exit_code == 0
    assert searches[0]["first"] == Path("searches/x")
    assert searches[0]["on"] == "auto"


def test_resume_takes_another_time_budget(searches):
    changed = ["--set", "search.time_budget=2h"]
    assert call("tune", "--resume", "searches/x", *changed).exit_code == 0
    assert list(searches[0]["overrides"]) == ["search.time_budget=2h"]
    assert call("tune", "--resume", "job", "--on", "sagemaker", *changed).exit_code == 2


# How a search ends


def ends(monkeypatch: pytest.MonkeyPatch, result: Any) -> Result:
    monkeypatch.setattr(commands, "run_search", lambda *_, **__: result)
    return call("tune")


def test_the_best_trial_and_the_next_step_are_told(monkeypatch):
    result = ends(monkeypatch, finished_search())
    assert result.exit_code == 0
    assert "Best trial: t0002 with learning_rate 0.003123, batch_size 64" in result.stdout
    assert "validation_accuracy 0.9375 in epoch 3" in result.stdout
    assert "models:/x/1" in result.stdout
    assert "mlflow ui" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("uri", "step", "server"),
    [
        ("sqlite:///mlflow.db", "mlflow ui` and open", "http://127.0.0.1:5000"),
        ("https://me:secret@example.org", "trials: open", "https://example.org"),
    ],
)
def test_the_link_to_the_trials_in_mlflow_is_told_last(monkeypatch, tmp_path, uri, step, server):
    (tmp_path / "mlflow.json").write_text('{"experiment_id": "3"}')
    result = ends(monkeypatch, finished_search(folder=tmp_path, tracking_uri=uri))
    before, last = result.stdout.splitlines()[-2:]
    assert step in before
    assert last.strip().startswith(f"{server}/#/experiments/3/runs?viewStateShareKey=visiontuner&")


def test_an_interrupted_search_exits_with_130_and_says_last_how_to_resume(monkeypatch):
    result = ends(monkeypatch, finished_search(state="interrupted", classifier=None, model=None))
    assert result.exit_code == 130
    last = result.stdout.splitlines()[-1]
    assert last.endswith("visiontuner tune --resume searches/x")


def test_a_spent_time_budget_is_no_failure_and_can_go_on(monkeypatch):
    result = ends(monkeypatch, finished_search(state="time_budget"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].endswith("visiontuner tune --resume searches/x")


def test_what_mlflow_misses_is_told_and_no_failure(monkeypatch):
    result = ends(monkeypatch, finished_search(tracking_problem="It is away.", model=None))
    assert result.exit_code == 0
    assert "Not everything is in MLflow: It is away." in result.output
    assert "visiontuner sync searches/x" in result.stdout.splitlines()[-1]


def test_what_was_said_during_the_search_is_not_said_again(monkeypatch):
    def search(*_: Any, observer: Any, **__: Any) -> Any:
        observer.note("It is away.")
        return finished_search(tracking_problem="It is away.", model=None)

    monkeypatch.setattr(commands, "run_search", search)
    output = call("tune").output
    assert output.count("It is away.") == 1
    assert "Not everything is in MLflow.\n" in output


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (TrackingError("MLflow is away."), 1, "MLflow is away."),
        (UserMistake("No."), 2, "No."),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines (the traceback: visiontuner --d"),
        (KeyboardInterrupt(), 130, "Stopped."),
    ],
)
def test_each_error_has_its_exit_code(monkeypatch, error, code, told):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(commands, "run_search", fail)
    result = call("tune")
    assert result.exit_code == code
    assert told in one_line(result)


def test_sync_takes_the_newest_search(searches, tmp_path):
    for number, name in enumerate(["old", "new"]):
        folder = tmp_path / "searches" / name
        folder.mkdir(parents=True)
        journal = folder / "journal.jsonl"
        journal.touch()
        os.utime(journal, (number, number))
    result = call("sync")
    assert result.exit_code == 0
    assert searches[0]["first"] == Path("searches/new")
    assert "models:/x/1" in result.stdout


def test_backbones_are_listed_with_their_sizes():
    result = call("backbones", "resnet50")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert "resnet50" in names
    assert all("resnet50" in name for name in names)


def test_prepare_lists_ten_unreadable_files_and_all_on_request(images, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(images, root)
    names = [f"train/red/broken{number:02}.png" for number in range(12)]
    for number, name in enumerate(names):
        (root / name).write_text(f"nothing {number}")
    some = call("prepare", "--data", str(root)).stdout
    assert [name in some for name in names] == [True] * 10 + [False] * 2
    assert "… and 2 more: --all lists them" in some
    every = call("prepare", "--data", str(root), "--all").stdout
    assert all(f"  {name}: " in every for name in names)
    assert "more: --all" not in every


def test_prepare_prints_counts_and_bars(images):
    result = call("prepare", "--data", str(images))
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if line.startswith("green"))
    assert row.split()[1:3] == ["10", "4"]
    assert "█" in row


def test_a_command_leaves_a_process_that_goes_on_its_garbage_collection() -> None:
    kept = gc.get_freeze_count()
    call("--help")
    call("compare", "no-such-folder")
    assert gc.isenabled()
    assert gc.get_freeze_count() == kept


def test_every_command_prints_data_so_that_a_terminal_breaks_no_line_of_it(
    repository: Path,
) -> None:
    """A command that prints JSON or CSV by `click.echo` would have it broken between words."""
    sources = (repository / "src/visiontuner/cli").glob("*.py")
    printing = re.compile(r"click\.echo\(\s*(json\.dumps|csv_row)")
    assert [p.name for p in sources if printing.search(p.read_text("utf-8"))] == []
