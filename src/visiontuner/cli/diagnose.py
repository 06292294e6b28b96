"""`visiontuner diagnose`: parsing and printing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN

if TYPE_CHECKING:
    from rich.text import Text

    from visiontuner.journal import Finding
    from visiontuner.workflow.diagnose import DiagnosedRun, Diagnosis

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
_ORDER = {"error": 0, "warning": 1, "info": 2}


@click.command(cls=OneLineErrors)
@click.argument("target", metavar="[RUN|FOLDER]", default="auto")
@click.option("--write", is_flag=True, help="Put the findings on the MLflow runs: tag, artifact.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diagnose(target: str, write: bool, as_json: bool) -> None:
    """Say what went wrong in a training, why, and what to change.

    RUN is an MLflow run id, of any tool (a parent run means its children), or an experiment's
    name; FOLDER a search folder. Default: the newest search. Rules: docs/rules.md.

    \b
    Examples:
      visiontuner diagnose
      visiontuner diagnose searches/digits-20261122-154100 --json
      visiontuner diagnose 0f3c9a… --write
    """
    from visiontuner.workflow.diagnose import diagnose as look

    diagnosis = look(None if target in NOT_GIVEN else target, write=write)
    if as_json:
        click.echo(json.dumps(diagnosis.to_dict(), indent=1, ensure_ascii=False))
    else:
        _print(diagnosis)


def _print(diagnosis: Diagnosis) -> None:
    from rich.table import Table

    from visiontuner.console import SafeConsole

    console = SafeConsole()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("trial", "finding", "evidence and advice"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "trial")
    rows = [(run.name, finding) for run in diagnosis.runs for finding in run.findings]
    rows += [("data", finding) for finding in diagnosis.data]
    for name, finding in sorted(rows, key=lambda row: _ORDER[row[1].severity]):
        table.add_row(name, _rule(finding), _said(finding))
    if rows:
        console.print(table)
    for run in diagnosis.runs:
        if run.note:
            click.echo(f"{run.name}: {run.note}")
    for note in diagnosis.notes:
        click.echo(note)
    click.echo(_summary(diagnosis.runs, diagnosis.target))


def _rule(finding: Finding) -> Text:
    from rich.text import Text

    return Text(f"{finding.rule}\n{finding.severity}", style=_COLOURS[finding.severity])


def _said(finding: Finding) -> Text:
    from rich.text import Text

    where = f" (epoch {finding.step})" if finding.step is not None else ""
    text = Text(f"{finding.evidence.rstrip('.')}{where}.\n")
    return text.append(finding.advice, style="dim")


def _summary(runs: tuple[DiagnosedRun, ...], target: str) -> str:
    errors = sum(bool(run.errors) for run in runs)
    quiet = sum(not run.findings for run in runs)
    trainings = "1 training" if len(runs) == 1 else f"{len(runs)} trainings"
    return f"{target}: {trainings}, {errors} with errors, {quiet} with nothing to say."
