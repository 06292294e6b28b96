"""What leaves the process: no secret of a URL, and no character that acts on a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from visiontuner.text import (
    SafeStream,
    csv_row,
    csv_text,
    has_secrets,
    hide_secrets,
    in_lines,
    one_line,
    printable,
    safe_output,
    shell_word,
    shown,
    verbatim,
    without_secrets,
)

LONG = "0123456789abcdef" * 3
URLS = {
    "http://host:5000/a b@c": "http://host:5000/a b@c",
    "models:/dogs@champion": "models:/dogs@champion",
    "sqlite:////home/me@work/mlflow.db": "sqlite:////home/me@work/mlflow.db",
    "https://host/show?id=3&size=large": "https://host/show?id=3&size=large",
    "at http://me:pass@host:5000: refused": "at http://***@host:5000: refused",
    "http://me:p@ss@host/x": "http://***@host/x",
    "http://me:it's\"so@host/x": "http://***@host/x",
    "https://ghp_token@github.com/a/b": "https://***@github.com/a/b",
    "postgresql://me:pa/s?s@host/db": "postgresql://***@host/db",
    "postgresql+psycopg2://me:pass@host:5432/db?sslmode=require": (
        "postgresql+psycopg2://***@host:5432/db?sslmode=require"
    ),
    "mysql://host/db?user=me&password=pass": "mysql://host/db?user=me&password=***",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dpass": "mssql+pyodbc:///?odbc_connect=***",
    "s3://AKIDEXAMPLE:pa/ss@bucket/x": "s3://***@bucket/x",
    "http://host/#/runs?viewStateShareKey=visiontuner&token=a": (
        "http://host/#/runs?viewStateShareKey=visiontuner&token=***"
    ),
    "http://host/#/runs?viewStateShareKey=abc": "http://host/#/runs?viewStateShareKey=***",
    "'https://host/a?X-Amz-Signature=12ab' is away": "'https://host/a?X-Amz-Signature=***' is away",
    "https://host/a.png?X-Amz-Date=1&X-Amz-Signature=12ab&x=2": (
        "https://host/a.png?X-Amz-Date=1&X-Amz-Signature=***&x=2"
    ),
    "https://host/a?X-Amz-Credential=AKID%2F1&X-Amz-Security-Token=ab": (
        "https://host/a?X-Amz-Credential=***&X-Amz-Security-Token=***"
    ),
    "https://host/a?Expires=9&Signature=a%2Fb&Key-Pair-Id=K1": (
        "https://host/a?Expires=9&Signature=***&Key-Pair-Id=***"
    ),
    "https://host/a?se=2026&sig=a%3D": "https://host/a?se=2026&sig=***",
    "https://host/a?api_key=12ab#b": "https://host/a?api_key=***#b",
    "https://host/a#access_token=12ab": "https://host/a#access_token=***",
    f"https://host/a?dl={LONG}&x=1": "https://host/a?dl=***&x=1",
    "Max retries exceeded with url: /a.zip?sig=12ab (Caused by x)": (
        "Max retries exceeded with url: /a.zip?sig=*** (Caused by x)"
    ),
    "Authorization: Bearer 12ab": "Authorization: Bearer ***",
    "the key AKIAIOSFODNN7EXAMPLE is unknown": "the key *** is unknown",
}


@pytest.mark.parametrize(("text", "safe"), URLS.items())
def test_a_text_shows_urls_without_their_secrets(text: str, safe: str) -> None:
    assert without_secrets(text) == safe
    assert without_secrets(safe) == safe
    assert has_secrets(text) is (text != safe)


@pytest.mark.parametrize("text", URLS)
def test_json_without_secrets_is_json_still(text: str) -> None:
    value = {"first": [text, 1.5, None], "second": f"mail bob@example.org, {text}"}
    assert json.loads(without_secrets(json.dumps(value, separators=(",", ":"))))
    assert hide_secrets(value)["first"] == [without_secrets(text), 1.5, None]


def test_a_message_is_cut_after_its_secrets_are_hidden() -> None:
    assert one_line("see\n http://me:pass@host/", 20) == "see http://***@host/"
    assert "pass" not in one_line("http://me:password@host/", 14)


def test_a_command_names_the_variable_of_an_address_with_a_secret() -> None:
    assert shell_word("postgresql://me:pass@host/db", "STORE") == '"$STORE"'
    assert shell_word("sqlite:///a b.db", "STORE") == "'sqlite:///a b.db'"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[31mred", r"\u001b[31mred"),
        ("\x9b31m\x7f\0", r"\u009b31m\u007f\u0000"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("invoice\u202egnp.exe", r"invoice\u202egnp.exe"),
        ("\u2066a\u2069\u2028", r"\u2066a\u2069\u2028"),
        ("caf\udce9.png", r"caf\udce9.png"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped_as_in_json(text: str, escaped: str) -> None:
    assert printable(text) == escaped
    assert json.loads(f'"{escaped}"') == text


@pytest.mark.parametrize(
    "name", ["Füchse", "柴犬\u3000犬", "क्‍ष", "می\u200cخواهم", "👩\u200d🔬", "עברית\u200f", r"a\nb"]
)
def test_names_of_any_language_stay_as_they_are(name: str) -> None:
    assert printable(name) == name
    assert shown(name) == name


@pytest.mark.parametrize(
    "text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1"]
)
def test_no_cell_is_a_formula(text: str) -> None:
    assert csv_row([text]).strip('"\n')[0] == "'"


@pytest.mark.parametrize("text", ["=1", "-green/9.png", "＝1", "'a'", "'", "a", "-"])
def test_a_cell_is_read_as_the_text_that_was_written(text: str) -> None:
    assert csv_text(csv_row([text]).strip('"\n')) == text


def test_a_sign_alone_is_no_formula() -> None:
    assert csv_row(["-", "blue"]) == "-,blue\n"


def test_numbers_and_gaps_stay_numbers_and_gaps() -> None:
    assert (
        csv_row(["a,b", -0.25, 10**9, None, float("nan"), True])
        == '"a,b",-0.25,1000000000,,,True\n'
    )
    assert csv_row(["http://me:pass@host", "a\nb\x1b"]) == "http://***@host,a\\nb\\u001b\n"


def test_streams_show_only_what_may_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_output():
        print("\x1b[31m", "http://me:pass@host\tx\r10 %")
        print("\u202e", file=sys.stderr)
        assert not hasattr(sys.stdout, "buffer")
    assert not isinstance(sys.stdout, SafeStream)
    assert capsys.readouterr() == ("\\u001b[31m http://***@host\tx\n10 %\n", "\\u202e\n")


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with safe_output():
            print("– ü")
    assert (tmp_path / "out").read_text() == "\\u2013 \\xfc\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("There are 56 training images in it.", ["There are 56", "training images in", "it."]),
        ("  note: indented lines stay so", ["  note: indented", "  lines stay so"]),
        ("a/path/that/is/longer/than/a/line then", ["a/path/that/is/longer/than/a/line", "then"]),
        # What is copied stays whole.
        ("Go on with: visiontuner tune --resume a", ["Go on with:", "visiontuner tune --resume a"]),
        ("Then `visiontuner evaluate a` says it", ["Then", "`visiontuner evaluate a`", "says it"]),
        ("To search: --set 'a={low: 1, high: 2}'", ["To search:", "--set 'a={low: 1, high: 2}'"]),
        ("MLflow: X=sqlite:/b visiontuner sync a", ["MLflow:", "X=sqlite:/b visiontuner sync a"]),
        ("torchvision's and timm's are there", ["torchvision's and", "timm's are there"]),
        # Letters of East Asia take two columns.
        ("犬犬犬犬犬 猫猫猫猫猫 x", ["犬犬犬犬犬", "猫猫猫猫猫 x"]),
        ("    code is left as it is, whatever its length", None),
    ],
)  # fmt: skip
def test_a_line_for_a_terminal_is_broken_between_words(text: str, lines: list[str] | None) -> None:
    assert in_lines(text, 18).split("\n") == (lines or [text])


class Terminal(io.StringIO):
    """A terminal that is 20 columns wide."""

    def isatty(self) -> bool:
        return True


def test_a_stream_to_a_terminal_breaks_lines_and_leaves_data_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", Terminal())
    terminal = sys.stdout
    with safe_output():
        print("a sentence that is too long")
        with verbatim():
            print('{"key": "a value that is long"}')
        print("Really? y/n and more", end=" ")  # a question: the terminal goes on in its line
        print("a sentence that is too long")
    assert terminal.getvalue() == (
        "a sentence that is\ntoo long\n"
        '{"key": "a value that is long"}\n'
        "Really? y/n and more a sentence that is too long\n"
    )
