"""What several commands are told, and how a command ends when it fails."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import psutil

from visiontuner import interrupts
from visiontuner.cli.silence import ERASE_LINE
from visiontuner.errors import UserMistake, VisiontunerError
from visiontuner.experiment.reading import read_experiment
from visiontuner.experiment.schema import QUICKSTART, Experiment, search_networks
from visiontuner.text import hours_of, printable, verbatim

# How a command ends when it fails: one line, and an exit code that says whose fault it was.


class OneLineErrors(click.Command):
    """Prints an error as one line and exits with its code; `--debug` shows the traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if (empty := _named_empty(args)) and not ctx.resilient_parsing:
            raise _Failure(
                f"{empty} is empty. Name something (is a shell variable unset?) or leave it out.", 2
            )
        try:
            rest = super().parse_args(ctx, args)
        except VisiontunerError as error:
            raise _Failure(printable(str(error)), error.exit_code) from None
        for name, value in ctx.params.items():
            if isinstance(value, tuple):  # of a repeatable option or argument
                ctx.params[name] = tuple(one for one in value if one is not None)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        debug = bool(ctx.find_root().params.get("debug"))
        try:
            with interrupts.handled(_leave), _quiet_without_reader():
                return super().invoke(ctx)
        except VisiontunerError as error:
            if debug:
                raise
            raise _Failure(printable(str(error)), error.exit_code) from None
        except KeyboardInterrupt:
            raise _Failure("Stopped.", 130) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise _Failure(f"{printable(text)} (the traceback: visiontuner --debug …)", 1) from None


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


def _named_empty(args: Sequence[str]) -> str | None:
    """The flag that was given an empty text, or else the argument; None if there is none.

    Taken for "not given", an unset shell variable would mean other images or another search.
    """
    for before, word in pairwise(["", *args]):
        name, is_given, value = word.partition("=")
        if not word:
            return before if before.startswith("-") else "An argument"
        if name.startswith("--") and is_given and not value:
            return name
    return None


@contextmanager
def _quiet_without_reader() -> Iterator[None]:
    """Whoever reads our output may end before us, as `head` does: there is nobody to tell."""
    try:
        yield
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # it was another pipe
        raise click.exceptions.Exit(1) from None
    finally:
        if _reader_is_gone():  # or Python complains at exit of what it cannot write any more
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _reader_is_gone() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # nothing but what is always told: errors
    except (ValueError, OSError):  # no file
        return False
    return bool(poll.poll(0))


def _leave() -> None:
    """End at once, from another thread: the main one is in a call that no signal wakes."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.terminate()
    # A live table has hidden the cursor, and a bar or a count of seconds stands in this line.
    cleared = f"\033[?25h{ERASE_LINE}" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{cleared}Error: Stopped.\n".encode())
    os._exit(130)


# Data for programs, in a terminal too: lines are written as they are.


def echo_data(text: str, *, nl: bool = True) -> None:
    """Print a table or other data; what people read goes through `click.echo`."""
    with verbatim():
        click.echo(text, nl=nl)


def echo_json(value: object, **options: Any) -> None:
    """Print a value as JSON, with options of `json.dumps`."""
    echo_data(json.dumps(value, **options))


# What several commands are told: values that may be left out, and which experiment.


_NOT_GIVEN = ("auto", "none")
"""Words that MLproject passes for a parameter that was not given."""


class Given(click.ParamType):  # type: ignore[type-arg]
    """The value of an option or argument, or None where a word of MLproject's stands for none.

    Args:
        read: text -> the value.
        rule: what the value has to be; the error says it where `read` raises ValueError.
    """

    name = "text"

    def __init__(self, read: Callable[[str], Any] = str, rule: str = "") -> None:
        self._read, self._rule = read, rule

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value in _NOT_GIVEN:
            return None
        try:
            return self._read(value)
        except ValueError:
            named = max(param.opts, key=len) if param else "The value"
            raise UserMistake(f"{named} takes {self._rule}, got {value!r}.") from None


def number(low: float = 0, high: float = 1e6, *, whole: bool = False) -> Given:
    """A number from `low` to `high`, both included; whole numbers come as int."""

    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high or (whole and value != int(value)):
            raise ValueError(text)
        return int(value) if whole else value

    kind = "a whole number" if whole else "a number"
    return Given(read, f"{kind} from {low:g}" + ("" if high >= 1e6 else f" to {high:g}"))


def _yes_or_no(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, OFF: False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(text)
    return key, value


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", OFF))


def _since(text: str) -> timedelta:
    return timedelta(hours=hours_of(text, flag="--since"))


OFF = "off"
"""Leaves out what a job that is resumed had."""
TEXT = Given()
FOLDER = Given(Path)
SWITCH = Given(_yes_or_no, "true or off")
PAIR = Given(_pair, "KEY=VALUE")
LISTED = Given(_listed)
SINCE = Given(_since)


def experiment_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that say what the experiment is."""
    options = [
        click.option(
            "--experiment",
            metavar="FILE",
            type=TEXT,
            help="Experiment file. Default: the quickstart on built-in images.",
        ),
        click.option(
            "--data",
            metavar="SOURCE",
            type=TEXT,
            help="Folder, table, archive (path or URL), s3:// or `digits`, not the experiment's.",
        ),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            type=TEXT,
            multiple=True,
            help="Override any value of the experiment, for example training.epochs=5. Repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def as_overrides(flags: Mapping[str, object]) -> list[str]:
    """Flags that stand for a key of the experiment, as `--set` would have them."""
    return [f"{key}={value}" for key, value in flags.items() if value is not None]


def overrides_of_networks(names: str | None) -> list[str]:
    """`resnet18,offline` as what `--set` has for a search over these networks."""
    return [] if names is None else search_networks(names.split(","))


def read_raw(experiment: str | None, data: str | None) -> tuple[dict[str, Any], str]:
    """An experiment's keys and values, not yet checked, and where they are from.

    The file, or without one the quickstart; own images alone get the general defaults.
    """

    own_data = data is not None
    if experiment is not None:
        raw, where = read_experiment(Path(experiment)), experiment
    else:
        raw, where = ({} if own_data else dict(QUICKSTART)), "the command line"
    if own_data:
        raw["data"] = {**(raw.get("data") or {}), "source": data}
    return raw, where


def load_experiment(
    experiment: str | None, data: str | None, overrides: Sequence[str]
) -> Experiment:
    """What `experiment_options` say, checked."""
    raw, where = read_raw(experiment, data)
    return Experiment.parse(raw, overrides, where=where)
