"""What a person sees in the terminal: a live view while a search runs, and tables."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import click
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from visiontuner.data.dataset import ListedFinding
from visiontuner.data.findings import DatasetSummary, SizeRange
from visiontuner.evaluation.choice import describe_networks
from visiontuner.journal import Event, Finding, SearchRecord, TrialRecord
from visiontuner.text import (
    DEFAULT_TRACKING_URI,
    SafeStream,
    columns_of,
    duration,
    in_lines,
    line_breaks,
    next_command,
    printable,
    shell_word,
    shown,
)
from visiontuner.tracking.view import link_of
from visiontuner.workflow.doctor import Check

if TYPE_CHECKING:
    import pandas as pd

    from visiontuner.workflow.prepare import Recommendation
    from visiontuner.workflow.run import SearchResult


# What a person sees while a search runs: a live table in a terminal, plain lines elsewhere.


ROWS = 12
_NO_WRAPPING = 1000  # columns
# In a file or in CI: long work says that it began, and now and then that it lives.
_FIRST_LINE_AFTER_SECONDS = 2.0
_SECONDS_BETWEEN_LINES = 30.0
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
    ended trial is a line, and long work says after two seconds, then twice a minute, how far it is.
    `said` holds the notes so far.
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
        elif event["event"] == "network_stopped":
            self.note(f"{event['backbone']} gets no more trials: {event['reason']}.")

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
        names = list(trials[0].configuration) if trials else []
        headings = ["trial", *names, "epoch", self._record.objective, "state"]
        rows = [
            dict(zip(headings, self._cells(trial, names), strict=True))
            for trial in _worth_showing(trials, self._record.best)
        ]
        chosen, stacked = _columns_that_fit(headings, names, rows, self.console.width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in chosen:
            text = heading.replace("_", "\n") if stacked else heading
            justify: Literal["left", "right"] = "left" if heading in ("trial", "state") else "right"
            table.add_column(text, justify=justify, vertical="bottom", no_wrap=True)
        for row in rows:
            table.add_row(*(row[heading] for heading in chosen))
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
            words.append(f"about {duration(left)} left")
        return ", ".join(words)

    def _seconds_left(self, finished: int) -> float | None:
        done_here = finished - self._known_at_start
        if done_here < 1 or finished >= self._total:
            return None
        return (time.monotonic() - self._began) / done_here * (self._total - finished)


def _columns_that_fit(
    headings: Sequence[str], names: Sequence[str], rows: Sequence[dict[str, Text]], width: int
) -> tuple[list[str], bool]:
    """The columns of a table of trials that fit into a width, and whether headings are stacked.

    Searched values go from the right; nothing else does.
    """
    cells = {h: max((len(row[h].plain) for row in rows), default=0) for h in headings}
    if sum(max(cells[h], len(h)) + 1 for h in headings) <= width:
        return list(headings), False
    widths = {h: max(cells[h], *map(len, h.split("_"))) + 1 for h in headings}
    chosen = list(headings)
    for name in reversed(names):
        if sum(widths[heading] for heading in chosen) <= width:
            break
        chosen.remove(name)
    return chosen, True


class _Bar:
    """A progress bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        self.label = label
        self._console = console
        self._unit = unit
        self._began = time.monotonic()
        self._first: int | None = None
        self._next_line = self._began + _FIRST_LINE_AFTER_SECONDS
        self._has_spoken = False
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = Progress(
                *_bar_columns(console.width),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(label, total=total, count="", rate="")
            self._progress.start()

    def update(self, done: int, total: int) -> None:
        if self._first is None:
            self._first = done  # what an earlier process did says nothing about this one's speed
        seconds = time.monotonic() - self._began
        count, speed = (
            _count(done, total, self._unit),
            _rate(done - self._first, seconds, self._unit),
        )
        if self._progress is not None:
            self._progress.update(
                self._task, completed=done, total=total or None, count=count, rate=speed
            )
        elif time.monotonic() >= self._next_line or (self._has_spoken and done == total):
            self._has_spoken = True
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            self._console.print(", ".join(filter(None, (f"{self.label}: {count}", speed))))

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
        if not isinstance(stream, SafeStream) or not stream.isatty():
            return stream
        stream.before_write()
        return stream.unsafe

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def print(self, *objects: Any, **settings: Any) -> None:
        """As rich does; in a terminal lines of text are broken between words, never within one."""
        if self.is_terminal:
            objects = tuple(self._in_lines(one) for one in objects)
        super().print(*objects, **settings)

    def _in_lines(self, one: Any) -> Any:
        if isinstance(one, str):
            return in_lines(shown(one), self.width)
        if not isinstance(one, Text):
            return one
        lines = [
            part
            for line in one.split("\n", allow_blank=True)
            for part in line.divide(line_breaks(line.plain, self.width))
        ]
        for line in lines:
            line.rstrip()
        return Text("\n").join(lines)

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


def _bar_columns(width: int) -> list[ProgressColumn]:
    """What a bar shows; 60 characters are kept for words, so that none is cut."""
    return [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=max(5, min(40, width - 60))),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    ]


def _count(done: int, total: int, unit: str) -> str:
    """`30/100 images`, or `30 images` where nobody knows how many there are."""
    many = f"{_amount(done, unit)}/{_amount(total, unit)}" if total else _amount(done, unit)
    return f"{many} {'MB' if unit == 'B' else unit}"


def _rate(done: float, seconds: float, unit: str) -> str:
    """`12 images/s`, or `3.4 s/step` where one takes longer than a second; empty before any."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    if unit == "B":
        return f"{rate / 1e6:,.1f} MB/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{unit.removesuffix('s')}"


def _amount(amount: float, unit: str) -> str:
    return f"{amount / 1e6:,.1f}" if unit == "B" else f"{amount:,.0f}"


# Tables for the terminal: what `prepare` and `doctor` found.


BAR_WIDTH = 40
_LISTED = 10  # of the files that a finding is about
_COLOURS = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}


def print_dataset(
    console: Console,
    summary: DatasetSummary,
    findings: Sequence[Finding],
    *,
    list_all: bool = False,
) -> None:
    """Classes with their counts as bars, the sizes of images, and what was found.

    Args:
        list_all: every file or name that a finding is about, not only the first ten.
    """
    console.print(_class_table(summary))
    if summary.width and summary.height:
        console.print(f"Width: {_range(summary.width)}; height: {_range(summary.height)}.")
    console.print(_balance(summary.imbalance))
    if not findings:
        console.print(*_no_problems(summary))
    for finding in findings:
        line = Text(f"{finding.severity}: ", style=_COLOURS[finding.severity])
        line.append(f"{printable(finding.evidence.rstrip('.'))}. ", style="default")
        line.append(finding.advice, style="dim")
        console.print(line)
        if isinstance(finding, ListedFinding) and len(finding.items) > 1:
            _print_items(console, finding.items, len(finding.items) if list_all else _LISTED)


def _print_items(console: Console, items: Sequence[str], number: int) -> None:
    for item in items[:number]:
        console.print(Text(f"  {printable(item)}"))
    if len(items) > number:
        console.print(Text(f"  … and {len(items) - number:,} more: --all lists them", style="dim"))


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """One line a check, with its advice below where something needs doing."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        status = Text(check.status, style=_COLOURS[check.status])
        detail = Text(check.detail)
        if check.advice:
            detail.append(f"\n{check.advice}", style="bold")
        table.add_row(status, Text(check.name), detail)
    console.print(table)


def print_recommendations(console: Console, found: Sequence[Recommendation]) -> None:
    """One line a network; what a pass takes where it was measured.

    In a narrow terminal columns go, and their names are said: no row is broken.
    """
    measured = any(one.pass_seconds is not None for one in found)
    rows = [_recommendation(one) for one in found]
    names = [name for name in rows[0] if name != "pass" or measured]
    headings = {"pass": f"pass over {found[0].images:,} images", "offline": ""}
    widths = {
        n: max(columns_of(text) for text in (headings.get(n, n), *(row[n] for row in rows))) + _GAP
        for n in names
    }
    chosen = list(names)
    for name in ("licence", "pixels", "MB", "ImageNet", "offline"):
        if not console.is_terminal or sum(widths[n] for n in chosen) - _GAP <= console.width:
            break
        chosen.remove(name)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in chosen:
        right = name not in ("network", "licence", "offline")
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(headings.get(name, name), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[name]) for name in chosen))
    console.print(table)
    if gone := [name for name in names if name not in chosen]:
        console.print(f"Too narrow for: {', '.join(gone)}.", style="dim")


def _recommendation(one: Recommendation) -> dict[str, str]:
    network = one.network
    return {
        "network": network.name,
        "MB": f"{network.megabytes:.0f}",
        "pixels": str(network.image_size),
        "ImageNet": f"{network.accuracy:.1f} %" + " linear" * (network.measure == "linear"),
        "licence": network.licence,
        "pass": "" if one.pass_seconds is None else duration(one.pass_seconds),
        "offline": "offline" if network.is_offline else "",
    }


_BALANCED = 1.5  # images of the largest class for one of the smallest, at most


def _balance(imbalance: float) -> str:
    if imbalance <= _BALANCED:
        return "Classes are balanced."
    return f"The largest class has {imbalance:.1f} times the training images of the smallest."


_ENOUGH = 10  # images of a class, for a figure of that class to mean anything


def _no_problems(summary: DatasetSummary) -> tuple[str, ...]:
    scarce = {
        name: sum(count < _ENOUGH for count in summary.counts[name])
        for name in ("validation", "test")
        if any(summary.counts.get(name, ()))
    }
    told = [f"{number} classes in {name}" for name, number in scarce.items() if number]
    if not told:
        return ("[green]No problems found.",)
    return (
        "[green]No problems found.",
        f"Fewer than {_ENOUGH} images have {' and '.join(told)}: figures of these classes alone "
        "mean little.",
    )


def _class_table(summary: DatasetSummary) -> Table:
    splits = list(summary.counts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    train = summary.counts[splits[0]]
    longest = max(train, default=0) or 1
    for label, name in enumerate(summary.class_names):
        counts = [f"{summary.counts[split][label]:,}" for split in splits]
        bar = "█" * -(-BAR_WIDTH * train[label] // longest)  # rounded up: one image shows
        table.add_row(Text(printable(name)), *counts, Text(bar, style="cyan"))
    totals = [f"{summary.totals[split]:,}" for split in splits]
    table.add_row(Text("all", style="bold"), *(Text(t, style="bold") for t in totals), "")
    return table


def _range(size: SizeRange) -> str:
    return f"{size.smallest:g} to {size.largest:g} pixels, median {size.median:g}"


# What a person sees while one training runs: a bar in the epoch, and a line for each epoch.


# Reading the loss makes a GPU wait, so it is read as often as a person can look.
_SECONDS_BETWEEN_LOOKS = 0.25


class TrainingConsole(SearchConsole):
    """A `TrainingObserver` of `workflow.train`; elsewhere than in a terminal there is no bar."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._training = SearchRecord()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._looked = time.monotonic()
        self._epoch_began = (0, 0, 0.0)  # epoch, its first step seen, and when

    def trials_begin(self, record: SearchRecord, total: int) -> None:
        """From now on `event` brings epochs."""
        self._end_bar()
        self._training = record
        self._looked = time.monotonic()
        if self.console.is_terminal:
            *columns, remaining = _bar_columns(self.console.width)
            loss = TextColumn("{task.fields[loss]}", markup=False)
            self._progress = Progress(
                *columns, loss, remaining, console=self.console, transient=True
            )
            waiting = "waiting for the first step"
            self._task = self._progress.add_task(
                "Epoch 1", total=None, count=waiting, rate="", loss=""
            )
            self._progress.start()

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
        """After each optimizer step."""
        now = time.monotonic()
        wait = _SECONDS_BETWEEN_LOOKS if self._progress else _SECONDS_BETWEEN_LINES
        if now - self._looked < wait and (step < steps or self._progress is None):
            return
        rate = self._step_rate(epoch, step, now)
        self._looked = now
        name, count = f"Epoch {epoch}/{self._epochs()}", _count(step, steps, "steps")
        if self._progress is None:
            words = (f"{name}: {count}", rate, f"loss {loss():.4g}")
            self.console.print(", ".join(filter(None, words)))
        else:
            self._progress.update(
                self._task,
                description=name,
                completed=step,
                total=steps,
                count=count,
                rate=rate,
                loss=f"loss {loss():.4g}",
            )

    def _step_rate(self, epoch: int, step: int, now: float) -> str:
        """Since the first look at this epoch: what an epoch begins with says nothing of a step."""
        if self._epoch_began[0] != epoch:
            self._epoch_began = (epoch, step, now)
        _, first, began = self._epoch_began
        return _rate(step - first, now - began, "steps")

    def event(self, event: Event) -> None:
        """One journal line, already folded into the record."""
        if event["event"] == "epoch":
            self._looked = time.monotonic()
            trial = self._training.trials[event["trial_id"]]
            words, room = self._epoch_words(trial), self.console.width
            if self.console.is_terminal and columns_of("  ".join(words)) > room:
                words.pop()  # the bar shows the speed
            gap = "  " if columns_of("  ".join(words)) <= room else " "
            self.console.print(gap.join(words))

    def trials_end(self) -> None:
        """The bar goes."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _epochs(self) -> int:
        trials = list(self._training.trials.values())
        return self._training.epochs_of(trials[0]) if trials else 0

    def _epoch_words(self, trial: TrialRecord) -> list[str]:
        newest, objective = trial.epochs[-1], self._training.objective
        wanted = ["train_loss", "validation_loss", objective]
        if self._training.is_unvalidated:
            wanted = ["train_loss", "train_accuracy"]
        words = [f"epoch {newest.step}/{self._epochs()}"]
        words += [f"{name} {newest.metrics[name]:.4f}" for name in dict.fromkeys(wanted)]
        kept = self._training.kept_epoch(trial)
        if kept is not None and kept is not newest:
            words.append(f"lowest validation_loss in epoch {kept.step}")
        words.append(f"{newest.metrics['images_per_second']:,.0f} {self._unit()}/s")
        return words

    def _unit(self) -> str:
        """What a step takes: a head learns from features that were computed before."""
        model = self._training.started.get("experiment", {}).get("model", {})
        return "features" if model.get("train") == "head" else "images"


# A table of runs in the terminal: fitted to its width, the best row marked.


_MOST_ROWS = 40  # of a terminal: what is best must not scroll away
_GAP = 2
# Without these a row says nothing; the others go from the right until the rest fits.
_KEPT = ("run", "state")
_FIRST_TO_GO = ("reason", "epochs", "best_epoch")
_LAST_TO_GO = "search"  # trials of two searches have the same names
_MARK = "← best"


def print_runs(console: Console, frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Print the frame's rows in order.

    Returns:
        Sentences about what is not shown; only a terminal leaves anything out.
    """

    from visiontuner.evaluation.compare import best_row, cell

    shown = frame.head(_MOST_ROWS) if console.is_terminal else frame
    cells = {name: [cell(value, name) for value in shown[name]] for name in columns}
    names = {name: cell(name, "") for name in columns}
    if console.is_terminal:
        widths = {n: max(map(len, [names[n], *cells[n]])) + _GAP for n in columns}
        score = frame.attrs.get("score")
        columns = _fitting(columns, widths, console.width - len(_MARK), (*_KEPT, score))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for name in columns:
        right = not _is_words(frame[name])
        table.add_column(
            Text(names[name]),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    table.add_column("", no_wrap=True)
    best = best_row(frame)
    for position, label in enumerate(shown.index):
        style = "bold green" if label == best else ""
        row = [Text(cells[name][position], style=style) for name in columns]
        table.add_row(*row, Text(_MARK if label == best else "", style=style))
    console.print(table)
    return _left_out(frame, shown, [n for n in cells if n not in columns])


def _fitting(
    columns: Sequence[str], widths: dict[str, int], room: int, kept: Sequence[str | None]
) -> list[str]:
    """The columns that fit into `room` characters, in their order."""
    chosen = list(columns)
    can_go = [n for n in _FIRST_TO_GO if n in chosen]
    can_go += [n for n in reversed(chosen) if n not in (*kept, *can_go, _LAST_TO_GO)]
    can_go += [_LAST_TO_GO] if _LAST_TO_GO in chosen else []
    for name in can_go:
        if sum(widths[n] for n in chosen) <= room:
            break
        chosen.remove(name)
    return chosen


def _left_out(frame: pd.DataFrame, shown: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    told = []
    if len(frame) > len(shown):
        told.append(f"{len(frame) - len(shown):,} more runs: --top, --where, or --format csv.")
    if columns:
        told.append(f"Too narrow for: {', '.join(columns)}. See them with --columns.")
    return told


def _is_words(column: pd.Series) -> bool:
    return column.dtype == object


# How a search ended, for a person.


def print_result(result: SearchResult, *, said: set[str]) -> None:
    """The best trial, what was made of it, and the next command; exits 130 if it was interrupted.

    Args:
        said: what the user was told already.
    """
    record, folder = result.record, result.folder
    best, kept = record.best, record.kept
    if best is not None and kept is not None:
        objective = record.objective
        click.echo(f"\nBest trial: {best.trial_id} with {_values(best)}")
        click.echo(f"  {objective} {best.best_value:.4f} in epoch {best.best_epoch}")
        if kept is not best:
            value = f"{objective} {kept.best_value:.4f}"
            click.echo(f"Kept: {kept.trial_id} with {_values(kept)} ({value})")
        if networks := describe_networks(record):
            click.echo(f"  {networks}")
        _print_choice(record.choice or {})
    print_artifacts(result, said=said)
    if result.state == "completed" and not result.tracking_problem:
        _print_view(result)
    if result.state != "completed":
        word = "Stopped" if result.state == "interrupted" else "The time budget is spent"
        click.echo(f"\n{word}. Go on with: {next_command('tune', '--resume', folder)}")
    if result.state == "interrupted":
        raise click.exceptions.Exit(130)


def _print_choice(choice: Event) -> None:
    """What the search gave beside what is there without it, and what to expect of the model."""
    if choice.get("gain"):
        click.echo(f"  {choice['gain']}")
    if choice.get("estimate"):
        estimate = choice["estimate"]
        low, high = 100 * estimate["low"], 100 * estimate["high"]
        click.echo(
            f"  expected on new images: {100 * estimate['value']:.1f} % right "
            f"({low:.1f} to {high:.1f}), from {choice['images']:,} images, corrected for the choice"
        )


def _values(trial: TrialRecord) -> str:
    return ", ".join(f"{k} {_short(v)}" for k, v in trial.configuration.items())


def print_artifacts(result: SearchResult, *, said: set[str]) -> None:
    """The classifier, the MLflow model, and what MLflow does not hold yet."""
    if result.classifier:
        click.echo(f"  classifier: {result.classifier}")
    if result.model:
        click.echo(f"  MLflow model: {result.model} (in {result.tracking_uri})")
    if result.model_int8:
        click.echo(f"  its int8 form: {result.model_int8}")
    if result.tracking_problem:
        known = result.tracking_problem in said
        reason = "." if known else f": {result.tracking_problem}"
        click.echo(f"\nNot everything is in MLflow{reason}")
        click.echo(f"Nothing is lost. Write it later: {next_command('sync', result.folder)}")


def _print_view(result: SearchResult) -> None:
    uri, link = result.tracking_uri, link_of(result.folder, result.tracking_uri)
    steps = [] if uri.startswith("http") else [f"run `{_ui_command(uri)}`"]
    steps += [f"open\n  {link}"] if link else []
    click.echo()
    if result.classifier:
        click.echo(f"Next, look at the test images: {next_command('evaluate', result.folder)}")
    if steps:
        click.echo(f"Compare the trials: {' and '.join(steps)}")


def _ui_command(uri: str) -> str:
    beside = Path(sys.executable).with_name("mlflow")
    mlflow = "mlflow" if shutil.which("mlflow") else os.path.relpath(beside)
    if uri == DEFAULT_TRACKING_URI:
        return f"{mlflow} ui"
    return f"{mlflow} ui --backend-store-uri {shell_word(uri, 'MLFLOW_TRACKING_URI')}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
