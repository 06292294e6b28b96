import io
import re
import sys

import pytest
from rich.table import Table
from rich.text import Text

from visiontuner.cli import console as console_module
from visiontuner.cli.console import (
    ROWS,
    SafeConsole,
    SearchConsole,
    TrainingConsole,
    print_recommendations,
)
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.text import safe_output
from visiontuner.workflow.prepare import recommend

EXPERIMENT = Experiment.parse({"name": "x"}).model_dump(mode="json")
HOSTILE = "[bold red]boom[/] [/nothing] [link=file:///etc]x[/link]"


class Screen:
    """A SearchConsole that writes into a text, and a search to feed it with."""

    def __init__(self, *, width: int = 100, terminal: bool = False) -> None:
        self._file = io.StringIO()
        rich = SafeConsole(
            file=self._file,
            width=width,
            force_terminal=terminal,
            soft_wrap=True,
            _environ={"TERM": "xterm"},
        )
        self.record = SearchRecord()
        self.heard = True
        self.console = SearchConsole(rich)
        self._apply("search_started", search_id="s", experiment=EXPERIMENT)

    def _apply(self, event: str, **fields) -> None:
        line = {"event": event, "time": 0.0, **fields}
        self.record.apply(line)
        if self.heard:
            self.console.event(line)

    def start(self, number: int, **configuration) -> str:
        trial_id = f"t{number:04d}"
        configuration = configuration or {"learning_rate": 0.00312345, "batch_size": 128}
        self._apply("trial_started", trial_id=trial_id, attempt=1, configuration=configuration)
        return trial_id

    def epoch(self, number: int, step: int, value: float) -> None:
        metrics = {"validation_accuracy": value}
        self._apply("epoch", trial_id=f"t{number:04d}", attempt=1, step=step, metrics=metrics)

    def end(self, number: int, state: str = "completed", value: float | None = 0.9, error=None):
        ended = {"state": state, "best_epoch": 1, "best_value": value, "error": error}
        self._apply("trial_ended", trial_id=f"t{number:04d}", attempt=1, **ended)

    def trial(self, number: int, **ended) -> None:
        self.start(number)
        self.epoch(number, 20, 0.9)
        self.end(number, **ended)

    @property
    def text(self) -> str:
        """What was written, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._file.getvalue())

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.text.splitlines()]

    def last_table(self) -> list[str]:
        """The table as it stood when the trials ended."""
        starts = [n for n, line in enumerate(self.lines) if line.lstrip("\r").startswith("trial ")]
        return self.lines[starts[-1] :]


def test_elsewhere_than_in_a_terminal_every_ended_trial_is_a_line():
    screen = Screen()
    screen.console.trials_begin(screen.record, 3)
    screen.trial(1, value=0.5)
    screen.trial(2, value=0.75)
    screen.trial(3, state="failed", value=None, error="The training loss is nan in epoch 1.")
    screen.console.trials_end()
    assert screen.lines == [
        "1/3  t0001 completed  learning_rate=0.003123 batch_size=128  validation_accuracy 0.5"
        "  best 0.5 (t0001)",
        "2/3  t0002 completed  learning_rate=0.003123 batch_size=128  validation_accuracy 0.75"
        "  best 0.75 (t0002)",
        "3/3  t0003 failed  learning_rate=0.003123 batch_size=128  validation_accuracy –"
        "  The training loss is nan in epoch 1.",
    ]


def test_plain_lines_hold_no_escapes():
    screen = Screen()
    screen.console.note("Search folder: searches/x")
    screen.console.progress("Features", 10, 100, "images")
    screen.console.trials_begin(screen.record, 1)
    screen.trial(1)
    screen.console.close()
    assert "\x1b" not in screen._file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_the_trials_as_a_table(width):
    screen = Screen(width=width, terminal=True)
    screen.console.trials_begin(screen.record, 4)
    screen.trial(1, value=0.5)
    screen.trial(2, value=0.75)
    screen.trial(3, state="failed", value=None, error="no")
    screen.start(4)
    screen.epoch(4, 7, 0.625)
    screen.console.trials_end()
    table = screen.last_table()
    assert table[0].split() == [
        "trial",
        "learning_rate",
        "batch_size",
        "epoch",
        "validation_accuracy",
        "state",
    ]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:5]}
    assert rows["t0001"] == ["0.003123", "128", "20/20", "0.5", "✓", "completed"]
    assert rows["t0002"] == ["0.003123", "128", "20/20", "0.75", "✓", "completed", "←", "best"]
    assert rows["t0003"][-2:] == ["✗", "failed"]
    assert rows["t0004"] == ["0.003123", "128", "7/20", "0.625", "…", "running"]
    assert "3 of 4 trials finished, 1 running, best validation_accuracy 0.75" in table[5]
    assert all(len(line) <= width for line in table)


def test_five_hundred_trials_fit_on_a_screen_with_the_best_and_the_running_ones():
    screen = Screen(terminal=True)
    screen.console.trials_begin(screen.record, 501)
    for number in range(1, 501):
        screen.trial(number, value=0.99 if number == 3 else 0.5)
    screen.start(501)
    screen.console.trials_end()
    rows = [line for line in screen.last_table() if re.match(r"t\d{4}", line)]
    assert len(rows) == ROWS
    assert rows[0].startswith("t0003")
    assert rows[-2].startswith("t0500")
    assert rows[-1].startswith("t0501")


def test_before_the_first_trial_a_terminal_says_what_it_waits_for():
    screen = Screen(terminal=True)
    screen.console.trials_begin(screen.record, 2)
    screen.console.trials_end()
    assert "2 trials wait for Ray" in screen.text


def test_trials_of_an_earlier_process_are_shown_and_do_not_speed_up_the_estimate():
    screen = Screen(terminal=True)
    screen.heard = False
    screen.trial(1)
    screen.console.trials_begin(screen.record, 2)
    screen.console.trials_end()
    assert "t0001" in screen.text
    assert " left" not in screen.text  # nothing has ended here yet: nothing is known


@pytest.mark.parametrize("terminal", [True, False])
def test_texts_of_others_are_shown_as_they_are(terminal):
    screen = Screen(terminal=terminal, width=200)
    screen.console.note(HOSTILE)
    screen.console.trials_begin(screen.record, 1)
    screen.start(1, optimizer=HOSTILE)
    screen.epoch(1, 1, 0.5)
    screen.end(1, state="failed", value=None, error=HOSTILE)
    screen.console.close()
    shown = 2 if terminal else 3  # a table has no room for errors
    assert screen.text.count(HOSTILE) >= shown


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(console_module.time, "monotonic", lambda: self.now)


def test_short_work_elsewhere_is_no_line_and_long_work_one_every_half_minute(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen()
    for done in range(101):
        screen.console.progress("Reading", done, 100, "files")
    assert screen.text == ""
    for done in range(101):
        screen.console.progress("Features", done, 100, "images")
        clock.now += 0.625
    screen.console.note("done")
    assert screen.lines == [
        "Features: 4/100 images, 2 images/s",
        "Features: 52/100 images, 2 images/s",
        "Features: 100/100 images, 2 images/s",
        "done",
    ]


def test_slow_units_are_told_in_seconds_each_and_nothing_before_the_first(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen()
    screen.console.progress("Steps", 0, 10, "steps")
    clock.now += 3
    screen.console.progress("Steps", 0, 10, "steps")
    clock.now += 31
    screen.console.progress("Steps", 10, 10, "steps")
    assert screen.lines == ["Steps: 0/10 steps", "Steps: 10/10 steps, 3.4 s/step"]


def test_bytes_are_told_in_megabytes(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen()
    screen.console.progress("Fetching", 0, 200_000_000, "B")
    clock.now += 10
    screen.console.progress("Fetching", 50_000_000, 200_000_000, "B")
    assert screen.lines == ["Fetching: 50.0/200.0 MB, 5.0 MB/s"]


def test_a_progress_of_unknown_length_says_how_much_came(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen()
    screen.console.progress("Fetching", 0, 0, "B")
    clock.now += 2
    screen.console.progress("Fetching", 5_000_000, 0, "B")
    screen.console.close()
    assert screen.lines == ["Fetching: 5.0 MB, 2.5 MB/s"]


def test_the_bar_of_a_training_tells_no_numbers_before_the_first_step(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen(terminal=True, width=80)
    screen.console = TrainingConsole(screen.console.console)
    screen.start(1)
    screen.console.trials_begin(screen.record, 1)
    for step in (1, 2, 3):
        clock.now += 4
        screen.console.step(1, step, 3, lambda: 0.51234)
    screen.console.trials_end()
    assert "waiting for the first step" in screen.text
    assert "3/3 steps" in screen.text
    assert "4.0 s/step" in screen.text
    assert "loss 0.5123" in screen.text
    assert "None" not in screen.text
    assert "…" not in screen.text


@pytest.mark.parametrize(("train", "unit"), [("head", "features/s"), ("all", "images/s")])
def test_the_speed_of_a_head_is_that_of_features(train, unit):
    screen = Screen()
    screen.console = TrainingConsole(screen.console.console)
    experiment = Experiment.parse({"name": "x", "model": {"train": train}}).model_dump(mode="json")
    screen._apply("search_started", search_id="s", experiment=experiment)
    screen.start(1)
    screen.console.trials_begin(screen.record, 1)
    names = ("train_loss", "validation_loss", "validation_accuracy", "images_per_second")
    metrics = dict.fromkeys(names, 1234.5)
    screen._apply("epoch", trial_id="t0001", attempt=1, step=1, metrics=metrics)
    assert screen.lines[-1].endswith(f"1,234 {unit}")


@pytest.mark.parametrize(("width", "left_out"), [(80, ("optimizer",)), (140, ())])
def test_no_word_and_no_row_of_the_trials_is_cut(width, left_out):
    screen = Screen(terminal=True, width=width)
    screen.console.trials_begin(screen.record, 3)
    values = {
        "learning_rate": 0.00312345, "batch_size": 128, "weight_decay": 0.0123456,
        "dropout": 0.25, "label_smoothing": 0.1, "optimizer": "adamw",
    }  # fmt: skip
    for number in (1, 2):
        screen.start(number, **values)
        screen.epoch(number, 20, 0.91234)
    screen.end(1)
    screen.console.trials_end()
    assert not re.search(r"\w…", screen.text)
    assert max(len(line) for line in screen.lines) <= width
    (row,) = [line for line in screen.lines if line.startswith("t0001")][-1:]
    assert row.split()[:3] == ["t0001", "0.003123", "128"]
    assert row.endswith("✓ completed ← best")
    assert all(name not in screen.text for name in left_out)


@pytest.mark.parametrize("width", [80, 140])
def test_no_word_of_a_bar_is_cut(monkeypatch, width):
    clock, screen = Clock(monkeypatch), Screen(terminal=True, width=width)
    screen.console.progress("Uploading", 0, 123_456, "images")
    clock.now += 100
    screen.console.progress("Uploading", 112_345, 123_456, "images")
    screen.console.close()
    assert "112,345/123,456 images" in screen.text
    assert "1,123 images/s" in screen.text
    assert "…" not in screen.text


def test_a_terminals_bar_goes_when_the_work_is_done():
    screen = Screen(terminal=True)
    screen.console.progress("Features", 30, 100, "images")
    screen.console.note("next")
    assert "Features" in screen.text
    assert screen.lines[-1] == "next"


def test_closing_twice_gives_the_terminal_back_once():
    screen = Screen(terminal=True)
    screen.console.progress("Features", 1, 2, "images")
    screen.console.trials_begin(screen.record, 1)
    screen.console.close()
    screen.console.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_but_nothing_that_a_name_holds(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with safe_output():
        console = SafeConsole(width=30, color_system="standard")
        table = Table("name", box=None)
        table.add_row(Text("\x1b[2J:dog:[b]", style="red"))
        table.add_row("http://me:aVeryLongPasswordThatIsWrapped@host")
        console.print(table)
        print("\x1b[2J")
    text = terminal.getvalue()
    assert "\x1b[31m" in text
    assert "\x1b[2J" not in text
    assert r"\u001b[2J:dog:[b]" in text
    assert "http://***@host" in text


def test_one_note_is_one_line():
    screen = Screen()
    screen.console.note("a\nError: b\x1b[31m")
    assert screen.text == "a\\nError: b\\u001b[31m\n"


def recommended(width: int) -> list[str]:
    file = io.StringIO()
    console = SafeConsole(file=file, width=width, force_terminal=True, color_system=None)
    print_recommendations(console, recommend())
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_no_row_of_the_recommended_networks_is_broken_or_cut():
    wide, narrow = recommended(140), recommended(80)
    assert "Apache-2.0" in wide[1]
    assert narrow[-1].startswith("Too narrow for: licence")
    assert len(narrow) == len(wide) + 1
    assert all(len(line) <= 80 and "…" not in line for line in narrow)
    assert [line.split()[0] for line in narrow[:-1]] == [line.split()[0] for line in wide]


@pytest.mark.parametrize("styled", [True, False])
def test_a_note_is_broken_between_words(styled):
    file = io.StringIO()
    console = SafeConsole(
        file=file, width=40, force_terminal=True, color_system=None, soft_wrap=True
    )
    text = "There are 56 training images: the default search space has batch sizes up to that."
    console.print(Text(text, style="bold") if styled else text)
    lines = file.getvalue().splitlines()
    assert lines == [
        "There are 56 training images: the",
        "default search space has batch sizes up",
        "to that.",
    ]


def test_a_line_of_an_epoch_leaves_its_speed_to_the_bar_where_there_is_no_room():
    metrics = {
        "train_loss": 0.9868, "validation_loss": 1.1469, "validation_accuracy": 0.5714,
        "images_per_second": 4416.0,
    }  # fmt: skip
    for width, said in ((80, False), (120, True)):
        file = io.StringIO()
        rich = SafeConsole(
            file=file, width=width, force_terminal=True, color_system=None, soft_wrap=True
        )
        console, record = TrainingConsole(rich), SearchRecord()
        head = {"trial_id": "t0001", "attempt": 1, "time": 0.0}
        started = {"event": "search_started", "search_id": "s", "experiment": EXPERIMENT}
        began = {"event": "trial_started", **head, "configuration": {}}
        epoch = {"event": "epoch", **head, "step": 1, "metrics": metrics}
        for event in ({**started, "time": 0.0}, began, epoch):
            record.apply(event)
        console.trials_begin(record, 1)
        console.event(epoch)
        console.close()
        (line,) = (line for line in file.getvalue().splitlines() if "train_loss 0.9868" in line)
        assert ("features/s" in line) == said
        assert "validation_accuracy 0.5714" in line
