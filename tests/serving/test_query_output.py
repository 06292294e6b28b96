"""What becomes of a command's output: pipes whose reader ends, names that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "visiontuner"]


def test_a_command_ends_quietly_with_who_reads_its_output() -> None:
    with subprocess.Popen(
        [*COMMAND, "backbones"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert b"bundled" in command.stdout.readline()
        command.stdout.close()  # there is more to come than a pipe holds
        assert command.stderr.read() == b""
    assert command.returncode == 1


def test_a_command_says_what_is_wrong_also_without_a_reader(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "lineage", "nothing/"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    os.close(write)
    assert done.stderr.startswith("Error: ")
    assert "BrokenPipe" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_a_file_name_that_is_no_text_is_spelled_out(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path, form: str
) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(make_image("red"))
    except OSError:
        pytest.skip("this file system takes no such name")
    done = subprocess.run(
        [*COMMAND, "query", "--model", str(colour_classifier), str(tmp_path), "--format", form],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "400"},
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout.decode()
    assert r"caf\udce9.png" in output
    if form == "json":
        assert os.fsencode(json.loads(output)["image"]).endswith(b"caf\xe9.png")
