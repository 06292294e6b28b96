"""What a person sees while a search runs: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from visiontuner.journal import Event, SearchRecord, TrialRecord
from visiontuner.text import SafeStream, printable, shown

ROWS = 12
_NO_WRAPPING = 1000  # columns
_MARKS = {
    "running": ("…", "cyan"),
    "completed": ("✓", "green"),
    "stopped_early": ("■", "yellow"),
    "failed": ("✗", "red"),
    "interrupted": ("‖", "magenta"),
}


class SearchConsole:
    """Prints stages, progress bars and trials; an `Observer` of `workflow`.

    In a terminal the trials are one table that refreshes in place; elsewhere (a file, CI) every
    ended trial and every tenth of a progress is a line. `said` holds the notes so far.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _own_console()
        self.said: set[str] = set()
        self._record = SearchRecord()
        self._total = 0
        self._known_at_start = 0
        self._began = time.monotonic()
        self._live: Live | None = None
        self._bar: _Bar | None = None

    def note(self, text: str) -> None:
        """One line about what was found or is about to happen."""
        self.said.add(text)
        self._end_bar()
        self.console.print(printable(text))

    def progress(self, label: str, done: int, total: int, unit: str) -> None:
        """Long work: `done` of `total` units."""
        if self._bar is None or self._bar.label != label:
            self._end_bar()
            self._bar = _Bar(self.console, label, total, unit)
        self._bar.update(done, total)

    def trials_begin(self, record: SearchRecord, total: int) -> None:
        """From now on `event` brings trials; `record` holds those of an earlier process."""
        self._end_bar()
        self._record, self._total = record, total
        self._known_at_start = sum(t.finished for t in record.trials.values())
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=self.console, refresh_per_second=4
            )
            self._live.start()

    def event(self, event: Event) -> None:
        """One journal line, already folded into the record."""
        if event["event"] == "trial_ended" and self._live is None:
            trial = self._record.trials[event["trial_id"]]
            self.console.print(printable(self._line(trial)))

    def trials_end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        self._end_bar()
        self.trials_end()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, trial: TrialRecord) -> str:
        finished = sum(t.finished for t in self._record.trials.values())
        best = self._record.best
        words = [
            f"{finished}/{self._total}",
            f"{trial.trial_id} {trial.state}",
            _configuration(trial),
            f"{self._record.objective} {_number(trial.best_value)}",
        ]
        if trial.error:
            words.append(trial.error)
        elif best is not None:
            words.append(f"best {_number(best.best_value)} ({best.trial_id})")
        return "  ".join(words)

    def _table(self) -> RenderableType:
        trials = list(self._record.trials.values())
        table = Table(box=None, pad_edge=False, header_style="bold")
        names = list(trials[0].configuration) if trials else []
        for heading in ("trial", *names, "epoch", self._record.objective, "state"):
            right = heading in (*names, "epoch", self._record.objective)
            table.add_column(heading, justify="right" if right else "left")
        for trial in _worth_showing(trials, self._record.best):
            table.add_row(*self._cells(trial, names))
        return Group(table, Text(self._summary(), style="bold"))

    def _cells(self, trial: TrialRecord, names: Iterable[str]) -> list[Text]:
        mark, colour = _MARKS[trial.state]
        best = self._record.best is trial
        values = [_number(trial.configuration.get(name)) for name in names]
        last = trial.epochs[-1].step if trial.epochs else 0
        shown = trial.best_value
        if shown is None and trial.epochs:
            shown = trial.epochs[-1].metrics.get(self._record.objective)
        cells = [trial.trial_id, *values, f"{last}/{self._record.epochs_of(trial)}", _number(shown)]
        style = "bold" if best else ""
        state = f"{mark} {trial.state}" + (" ← best" if best else "")
        return [*(Text(cell, style=style) for cell in cells), Text(state, style=colour)]

    def _summary(self) -> str:
        trials = self._record.trials.values()
        finished = sum(t.finished for t in trials)
        running = sum(t.state == "running" for t in trials)
        best = self._record.best
        words = [f"{finished} of {self._total} trials finished", f"{running} running"]
        if not running and not finished:
            words = [f"{self._total} trials wait for Ray's workers"]
        if best is not None:
            words.append(f"best {self._record.objective} {_number(best.best_value)}")
        left = self._seconds_left(finished)
        if left is not None:
            words.append(f"about {_duration(left)} left")
        return ", ".join(words)

    def _seconds_left(self, finished: int) -> float | None:
        done_here = finished - self._known_at_start
        if done_here < 1 or finished >= self._total:
            return None
        return (time.monotonic() - self._began) / done_here * (self._total - finished)


class _Bar:
    """A progress bar in a terminal, a line for every tenth elsewhere."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        self.label = label
        self._console = console
        self._unit = unit
        self._began = time.monotonic()
        self._first: int | None = None
        self._tenth = 0
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(label, total=total, count="", rate="")
            self._progress.start()

    def update(self, done: int, total: int) -> None:
        if self._first is None:
            self._first = done  # what an earlier process did says nothing about this one's speed
        seconds = time.monotonic() - self._began
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        count = f"{_amount(done, self._unit)}/{_size(total, self._unit)}"
        speed = f"{_size(rate, self._unit)}/s"
        if self._progress is not None:
            self._progress.update(
                self._task, completed=done, total=total or None, count=count, rate=speed
            )
        elif total and done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            self._console.print(f"{self.label}: {count}, {speed}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class SafeConsole(Console):
    """rich's console, in which nothing that is printed acts: no markup, emoji or control character.

    Secrets go before a cell is wrapped, where half of one would be no URL any more.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    @property
    def file(self) -> IO[str]:
        """Where it writes: rich's own colours would not pass `text.safe_output`."""
        stream = super().file
        return stream.unsafe if isinstance(stream, SafeStream) and stream.isatty() else stream

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich does, texts as they may be shown."""
        if isinstance(renderable, str):
            renderable = shown(renderable)
        elif isinstance(renderable, Text) and (safe := shown(renderable.plain)) != renderable.plain:
            renderable = renderable.blank_copy(safe)
        return super().render(renderable, options)


def make_console() -> SafeConsole:
    """As wide as the terminal; in a file or a pipe lines are as long as they have to be."""
    console = SafeConsole(soft_wrap=True)
    if not console.is_terminal:
        console.width = _NO_WRAPPING
    return console


def _own_console() -> Console:
    """In a notebook plain lines: a cell's output is read again later, and elsewhere."""
    console = SafeConsole(soft_wrap=True)
    if not console.is_jupyter:
        return console
    return SafeConsole(soft_wrap=True, force_jupyter=False, force_terminal=False)


def _worth_showing(trials: list[TrialRecord], best: TrialRecord | None) -> list[TrialRecord]:
    """The running ones, the best, and the latest ended, in order; a screen holds no more."""
    running = [t for t in trials if t.state == "running"]
    ended = [t for t in trials if t.state != "running" and t is not best]
    room = max(0, ROWS - len(running) - 1)
    chosen = {t.trial_id for t in (*running, *(ended[-room:] if room else []))}
    if best is not None:
        chosen.add(best.trial_id)
    return [t for t in trials if t.trial_id in chosen]


def _configuration(trial: TrialRecord) -> str:
    return " ".join(f"{name}={_number(value)}" for name, value in trial.configuration.items())


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(amount: float, unit: str) -> str:
    return f"{_amount(amount, unit)} {'MB' if unit == 'B' else unit}"


def _amount(amount: float, unit: str) -> str:
    return f"{amount / 1e6:,.1f}" if unit == "B" else f"{amount:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
