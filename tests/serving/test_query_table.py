"""The table of `visiontuner query` in a narrow terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from visiontuner.cli.serve import query


@pytest.mark.parametrize(("width", "runners_up"), [(80, False), (140, True)])
def test_no_name_is_cut_where_the_runners_up_can_go(
    colour_classifier: Path,
    make_image: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    runners_up: bool,
) -> None:
    names = [f"a rather long name of a photograph, number {n}.png" for n in range(3)]
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_bytes(make_image("red"))
    monkeypatch.chdir(tmp_path)
    terminal = {"TTY_COMPATIBLE": "1", "COLUMNS": str(width)}
    done = CliRunner().invoke(query, ["--model", str(colour_classifier), "photos"], env=terminal)
    assert done.exit_code == 0, done.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "In photos/"
    assert all(len(line) <= width for line in lines)
    rows = lines[2:5]
    assert all(row.startswith(name) for row, name in zip(rows, names, strict=True))
    assert all("red" in row for row in rows)
    assert all(("green" in row) == runners_up for row in rows)
