"""The line that counts the seconds of a command that has written nothing for a while."""

import io
import sys

import pytest

from visiontuner.cli.silence import ERASE_LINE, SilenceLine
from visiontuner.text import safe_output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_after_two_seconds_it_counts_and_goes_before_anything_is_written(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    line = SilenceLine(terminal, clock=clock)
    clock.now = 1.4
    line.look()
    assert terminal.getvalue() == ""
    for clock.now in (2.0, 2.1, 3.0):
        line.look()
    assert terminal.getvalue() == f"{ERASE_LINE}… 2 s{ERASE_LINE}… 3 s"
    with safe_output(line.heard):
        print("done")
        clock.now = 4.0
        line.look()  # one second after `done`
    assert terminal.getvalue() == f"{ERASE_LINE}… 2 s{ERASE_LINE}… 3 s{ERASE_LINE}done\n"


def test_a_question_that_waits_for_its_answer_is_left_alone(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    line = SilenceLine(terminal, is_in_line=lambda: sys.stdout.in_line, clock=clock)
    with safe_output(line.heard):
        print("Really?", end=" ")
        clock.now = 60.0
        line.look()
    assert terminal.getvalue() == "Really? "


def test_a_server_that_waits_for_requests_is_not_counted(clock):
    terminal = Terminal()
    line = SilenceLine(terminal, clock=clock)
    clock.now = 5.0
    line.look()
    line.end()
    clock.now = 60.0
    line.look()
    assert terminal.getvalue() == f"{ERASE_LINE}… 5 s{ERASE_LINE}"
