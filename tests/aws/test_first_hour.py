"""docs/first-hour.md: its commands run against the stand-in, and print what the page says.

To write the page's transcripts anew: WRITE_FIRST_HOUR=1 pytest tests/aws/test_first_hour.py
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from visiontuner.cli.main import main

# What differs from run to run: digests and ids, the store, times, memory, speeds.
CHANGING = (
    (r"MLFLOW_TRACKING_URI=\S+ ", ""),
    (r"[0-9a-f]{12,64}", "…"),
    (r"(?<=colours/)\d+", "N"),
    (r"with \S*/python\S*", "with …/python."),
    (r"\d+(\.\d+)?\s+(s|ms|MB|GB)\b", r"N \2"),
    (r"\b[\d,.]+ images", "N images"),
    (r"\d\.\de[+-]\d+", "N"),
    (r"[+-]\d+\.\d%", "N %"),
)
# Where to run it depends on how fast this machine is, and how lines are broken on the numbers.
ADVICE = re.compile(r"^(ml\.|Serverless).*$\n?", re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str]]:
    """Each command with what the page says that it prints."""
    found = re.findall(
        r"^    \$ (.+)\n((?:    (?!\$).*\n|\n(?=    (?!\$)))*)", page, flags=re.MULTILINE
    )
    return [(command, re.sub(r"^    ", "", said, flags=re.MULTILINE)) for command, said in found]


def stable(text: str) -> str:
    for pattern, instead in CHANGING:
        text = re.sub(pattern, instead, text)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def compared(text: str) -> list[str]:
    """Word by word, without advice that depends on the machine."""
    return ADVICE.sub("", stable(text)).split()


@pytest.mark.slow
def test_the_first_hour_prints_what_the_page_says(
    account: Any,
    model: str,
    make_image: Callable[..., bytes],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    account.put_role("sagemaker-endpoints")
    Path("red.png").write_bytes(make_image("red"))
    path = repository / "docs/first-hour.md"
    page = path.read_text("utf-8")
    for command, said in blocks(page):
        printed = _run(command, model)
        if "WRITE_FIRST_HOUR" in os.environ:
            page = page.replace(_block(command, said), _block(command, stable(printed)), 1)
            path.write_text(page, "utf-8")
        else:
            assert compared(printed) == compared(said), command
    assert not any(account.holds().values())


def _run(command: str, model: str) -> str:
    """What a command prints; the page's model is the tests' version of it."""
    words = shlex.split(command)[1:]
    if words[0] in ("preflight", "deploy"):
        words[1] = model
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.output


def _block(command: str, said: str) -> str:
    lines = [f"    {line}".rstrip() + "\n" for line in said.splitlines()]
    return f"    $ {command}\n" + "".join(lines)
