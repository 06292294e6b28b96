"""What leaves the process: hidden secrets, printable text, CSV cells, commands to copy."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from visiontuner.errors import UserMistake

# Text that leaves the process: secrets hidden, control characters escaped, CSV rows.
#
# `without_secrets` is the only redaction and `printable` the only escaping. Whatever a command
# writes to its standard output and error passes both (`safe_output`), journals and MLflow the
# first one.


_USUAL_WIDTH = 80  # columns
HIDDEN = "***"
"""Stands for a secret."""

# Beyond the web a password may hold a slash: SQLAlchemy reads everything up to the @, and AWS keys,
# which do not belong into an S3 address, have some.
_QUOTE = r"\"(?![,:}\]\s])"  # one that does not end a text in JSON
_USER_OF_STORE = re.compile(
    rf"(?<![\w+.-])((?!https?:)[a-z][\w+.-]*://)[^:/@\s\"]*:(?:[^@\s\"]|{_QUOTE})*@",
    re.IGNORECASE,
)
_USER = re.compile(rf"(?<=://)(?:[^/\s\"]|{_QUOTE})*@")  # a name alone may be a token: it goes too
_ADDRESS = re.compile(r"/[^\s\"<>]*[?#][^\s\"<>]*")  # from a slash on, with a query or a fragment
_NAME = r"[\w.%\[\]-]{0,80}"
_SECRET_VALUE = re.compile(
    # The link to our view in MLflow has a key that is none.
    rf"([?&#](?!viewStateShareKey=visiontuner(?:&|$))(?:amp;)?{_NAME}(?:sig|token|credential|passw|pwd|secret|key|auth|jwt|session|policy|"
    # The value ends with the next one, or where the address does: a quote may follow.
    rf"odbc_connect){_NAME}=)[^&#]*?(?='?[&#]|'?[)\],.]*$)",
    re.IGNORECASE,
)
_LONG_VALUE = re.compile(rf"([?&#](?:amp;)?{_NAME}=)[\w+/=.%~-]{{40,}}")  # a UUID has 36
_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|pwd|credential|(?:^|_)(?:api_?)?key(?:$|_)|(?:^|_)auth(?:$|_)",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"\b(authorization\W{1,4}(?:basic|bearer)\s+)[^\s'\",]+", re.IGNORECASE)
_AWS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")

# C0, DEL and C1; the line separators of Unicode; overrides and isolates of the writing direction;
# halves of surrogate pairs, which file names that are not UTF-8 are read as. Joiners stay: words
# and emoji need them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

# What spreadsheets take for the start of a formula, their wide forms included.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def without_secrets(text: str) -> str:
    """Hide the user and password, and secret values in the query, of every URL in a text.

    `https://me:pass@host/a?id=3&X-Amz-Signature=12ab` -> `https://***@host/a?id=3&X-Amz-Signature=***`

    A value is secret if its name says so (token, key, sig, …) or if it is as long as a signature.
    AWS access key ids and `Authorization` headers go too.
    """
    if "/" in text:
        text = _USER_OF_STORE.sub(rf"\1{HIDDEN}@", text)
        text = _USER.sub(f"{HIDDEN}@", text)
        text = _ADDRESS.sub(_without_secret_values, text)
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    return _AWS_KEY_ID.sub(HIDDEN, text)


def _without_secret_values(address: re.Match[str]) -> str:
    text = _SECRET_VALUE.sub(rf"\1{HIDDEN}", address[0])
    return _LONG_VALUE.sub(rf"\1{HIDDEN}", text)


def hide_secrets(value: Any) -> Any:
    """JSON values with every text `without_secrets`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    return value


def hide_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a person: values whose name or content says that they are secret
    are hidden."""
    return {
        name: HIDDEN if _SECRET_NAME.search(name) else without_secrets(value)
        for name, value in variables.items()
    }


def has_secrets(value: Any) -> bool:
    """Whether JSON values hold anything that `hide_secrets` would hide."""
    return bool(hide_secrets(value) != value)


def printable(text: str, *, keep: str = "") -> str:
    r"""Escape what would act on a terminal or reorder a line: `\u001b[31m`, `\n`, `\u202e`.

    The escapes are JSON's, so that JSON read back is as it was. Joiners (U+200C, U+200D), wide
    spaces and marks stay as they are.

    Args:
        keep: control characters to leave alone, "\n" for a text of several lines.
    """

    def escape(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        return _SHORT.get(character, f"\\u{ord(character):04x}")

    return _CONTROL.sub(escape, text)


def shown(text: str, *, keep: str = "\n") -> str:
    """A text as it may be shown: without secrets, printable."""
    return printable(without_secrets(text), keep=keep)


def one_line(text: object, length: int) -> str:
    """The first characters of a message, an exception's perhaps, on one line as it may be shown."""
    return shown(" ".join(str(text).split()))[:length]


_SPAN = re.compile(r"(\d+(?:\.\d+)?)([mhd])")
_HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}


def hours_of(text: str, *, flag: str = "--ttl") -> float:
    """`45m`, `8h` or `2d` in hours.

    Raises:
        UserMistake: it is none of these.
    """
    match = _SPAN.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise UserMistake(f"{flag} takes a time such as 45m, 8h or 2d, got {text!r}.")
    return float(match[1]) * _HOURS[match[2]]


def duration(seconds: float) -> str:
    """For people: `41 s`, `2 min 5 s`, `1 h 3 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shell_word(uri: str, variable: str) -> str:
    """A URI for a command to copy; if it holds a secret, `"$VARIABLE"`, which holds it as well."""
    return f'"${variable}"' if has_secrets(uri) else shlex.quote(uri)


def csv_row(values: Iterable[object]) -> str:
    """One line of CSV with its end; None and NaN are empty.

    Text is shown in one line, and begins with `'` where a spreadsheet would run it as a formula.

    Source: https://owasp.org/www-community/attacks/CSV_Injection
    """
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([_csv_cell(value) for value in values])
    return line.getvalue()


def _csv_cell(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        return value
    text = shown(value, keep="")
    return f"'{text}" if _is_formula(value) else text


def csv_text(cell: str) -> str:
    """A cell without the `'` that `csv_row` puts before what looks like a formula."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _is_formula(text: str) -> bool:
    beginning = text.strip()
    return beginning.startswith(_FORMULA) and len(beginning) > 1


# Lines for a terminal: broken between words, where the terminal itself would break a word.


# What stands between backticks or quotes stays in one piece, and so does a command to copy, or
# flags of one, at the end of a line.
_PIECE = re.compile(r"`[^`]*`\S*|(?<!\w)'[^']*'\S*|\S+")
_COMMAND = re.compile(r"(?:^ *|: +)((?:\w+=\S+ )?(?:visiontuner |--set ).*)$")


def line_breaks(line: str, width: int) -> list[int]:
    """Where a line has to be broken to fit into `width` columns of a terminal.

    Returns:
        The offsets of the words that begin a new line; a longer word stays whole.
    """
    command = _COMMAND.search(line)
    prose = len(line) if command is None else command.start(1)
    pieces = [piece.span() for piece in _PIECE.finditer(line[:prose])]
    pieces += [] if command is None else [command.span(1)]
    breaks: list[int] = []
    begins = 0
    for start, end in pieces:
        is_first = not line[begins:start].strip()
        if not is_first and columns_of(line[begins:end]) > width:
            breaks.append(start)
            begins = start
    return breaks


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: letters of East Asia two, marks none."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def in_lines(text: str, width: int) -> str:
    """A text of several lines, those too long for a terminal broken between words.

    What follows a break is indented as the line is; lines that are indented by more than two
    spaces, as code is, stay as they are.
    """
    return "\n".join(_in_lines(line, width) for line in text.split("\n"))


def _in_lines(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip(" ")))
    if len(indent) > 2 or columns_of(line) <= width:
        return line
    ends = [0, *line_breaks(line, width - len(indent)), len(line)]
    parts = [line[start:end].rstrip() for start, end in itertools.pairwise(ends)]
    return f"\n{indent}".join(parts)


class SafeStream:
    """A text stream whose every write is `shown`: whoever writes, log and traceback included.

    A carriage return, with which progress bars of other packages begin, becomes the end of a line.
    In a terminal words are not broken, unless `wraps` is false, as for data.

    Args:
        before_write: called before anything is written.

    Attributes:
        in_line: what was written last did not end its line, as a question does not.
    """

    def __init__(self, stream: TextIO, before_write: Callable[[], None] = lambda: None) -> None:
        self.unsafe = stream
        self.before_write = before_write
        self.wraps = True
        self.in_line = False

    def write(self, text: str) -> int:
        """Write a text; returns how many characters were asked for."""
        lines = shown(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t")
        if self.wraps and not self.in_line and self.unsafe.isatty():
            lines = in_lines(lines, _terminal_width(self.unsafe))
        if lines:
            self.before_write()
            self.in_line = not lines.endswith("\n")
        self.unsafe.write(lines)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        # Bytes would pass by: who asks for the stream of bytes has to do without.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.unsafe, name)


def _terminal_width(stream: TextIO) -> int:
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):  # no terminal behind it
        return _USUAL_WIDTH


@contextmanager
def verbatim() -> Iterator[None]:
    """Lines are written as they are within the block: JSON and CSV are data in a terminal too."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, SafeStream)]
    for stream in streams:
        stream.wraps = False
    try:
        yield
    finally:
        for stream in streams:
            stream.wraps = True


@contextmanager
def safe_output(before_write: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Standard output and error show no secret and no control character within the block.

    What their encoding lacks is escaped too, instead of ending the command.

    Args:
        before_write: called before anything is written.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (SafeStream(stream, before_write) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


# The next step as a command that can be pasted into a shell.


DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
NO_TRACKING = "none"
"""As MLFLOW_TRACKING_URI of a search: its journal alone; `sync` or `attach` write it elsewhere."""

# They neither read nor write MLflow.
_WITHOUT_STORE = (
    "capture",
    "doctor",
    "endpoints",
    "jobs",
    "prepare",
    "query",
    "stop",
    "suggest",
    "suspects",
    "undeploy",
)


def next_command(
    verb: str, *arguments: str | Path, flags: str = "", store: str | None = None
) -> str:
    """A `visiontuner` command with its subject, and the MLflow store if it is not the default.

    Args:
        arguments: as they are; they are quoted for the shell here. A subject that nobody knows is a
            word in capitals, such as FOLDER: without one, a command would take the newest search.
        flags: which AWS account and region, as `Aws.flags` has them.
        store: the MLflow store; the one of this process if None.
    """
    command = shlex.join(["visiontuner", verb, *map(str, arguments)]) + flags
    uri = os.environ.get("MLFLOW_TRACKING_URI") if store is None else store
    # A search without tracking goes on without it; anything else needs a store.
    silent = uri == NO_TRACKING and verb not in ("tune", "train")
    if not uri or uri == DEFAULT_TRACKING_URI or silent or verb in _WITHOUT_STORE:
        return command
    return f"MLFLOW_TRACKING_URI={shell_word(uri, 'MLFLOW_TRACKING_URI')} {command}"
