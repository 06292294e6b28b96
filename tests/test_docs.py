"""README and pages of docs: every command line on them is one that visiontuner takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from visiontuner.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/commands.md", "docs/quantize.md")
LINES = [
    (page, match[1])
    for page in PAGES
    for match in re.finditer(r"^    (visiontuner .+)$", (ROOT / page).read_text("utf-8"), re.M)
]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_line_of_a_page_is_understood(page, line):  # noqa: ARG001
    _, *arguments = shlex.split(line, comments=True)
    context = click.Context(main, info_name="visiontuner")
    command = main.get_command(context, arguments[0])
    assert command is not None
    command.make_context(arguments[0], arguments[1:], parent=context)


def test_pages_hold_commands_and_links_that_lead_somewhere():
    assert len(LINES) >= 25
    for page in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / page).read_text("utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
