"""`visiontuner lineage`: parsing and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN

if TYPE_CHECKING:
    from rich.tree import Tree

    from visiontuner.serving.lineage import Facts, Lineage
    from visiontuner.workflow.verify import LineageCheck

_NAMES_SHOWN = 5
_PIPE_WIDTH = 2000
_STATES = {"ok": "ok", "differs": "differs", "unknown": "cannot be checked"}


@click.command(cls=OneLineErrors)
@click.argument("subject", metavar="[MODEL|RUN|FOLDER|endpoint:NAME]", default="auto")
@click.option(
    "--verify", is_flag=True, help="Compute digests and answers again; exit 1 if any differs."
)
@click.option("--region", metavar="REGION", default="auto", help="Of an endpoint.")
@click.option(
    "--assume-role", metavar="ARN", default="none", help="Look at an endpoint as this role."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def lineage(subject: str, verify: bool, region: str, assume_role: str, as_json: bool) -> None:
    """Say where a model comes from: trial, search, experiment, pictures, code, machine.

    MODEL is NAME, NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION; RUN the id of a trial's or a
    search's MLflow run; FOLDER a search folder; endpoint:NAME a SageMaker endpoint. Default: the
    newest search.

    \b
    Examples:
      visiontuner lineage
      visiontuner lineage dog-breeds@champion
      visiontuner lineage models:/dog-breeds/3 --verify
      visiontuner lineage endpoint:dog-breeds
    """
    from visiontuner.workflow.lineage import trace

    traced = trace(
        None if subject in NOT_GIVEN else subject,
        region=None if region in NOT_GIVEN else region,
        assume_role=None if assume_role in NOT_GIVEN else assume_role,
    )
    checks = _verify(traced) if verify else []
    if as_json:
        click.echo(_as_json(traced, checks if verify else None))
    else:
        _print(traced, checks)
    if any(check.state == "differs" for check in checks):
        raise click.exceptions.Exit(1)


def _verify(traced: Lineage) -> list[LineageCheck]:
    from visiontuner.workflow.verify import verify

    return verify(traced)


def _as_json(traced: Lineage, checks: Sequence[LineageCheck] | None) -> str:
    raw = traced.to_dict()
    if checks is not None:
        raw["checks"] = [asdict(check) for check in checks]
    return json.dumps(raw, indent=1)


def _print(traced: Lineage, checks: Sequence[LineageCheck]) -> None:
    from visiontuner.console import SafeConsole

    # In a pipe a fact stays in its line.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    SafeConsole(width=width).print(_tree(traced))
    for note in traced.notes:
        click.echo(f"note: {note}")
    for check in checks:
        click.echo(f"{check.what}: {_STATES[check.state]} ({check.detail})")


def _tree(traced: Lineage) -> Tree:
    """Each step hangs on the one that it made; what nobody knows is left out."""
    from rich.text import Text
    from rich.tree import Tree

    # Text: names of classes, models and folders may hold rich's own [markup].
    root = node = Tree(Text("lineage"), hide_root=True)
    for title, section, lines in (
        ("model", traced.model, _model_lines),
        ("trial", traced.trial, _trial_lines),
        ("search", traced.search, _search_lines),
    ):
        if section is None:
            continue
        node = node.add(Text(f"{title} {_headline(title, section)}"))
        for line in lines(section, traced):
            node.add(Text(line))
    return root


def _headline(title: str, facts: Facts) -> str:
    if title == "model":
        aliases = ", ".join(facts.get("aliases") or ())
        return f"{facts.get('uri')}" + (f" ({aliases})" if aliases else "")
    known = facts.get("trial_id" if title == "trial" else "name")
    run_id = f"run {facts['run_id']}" if facts.get("run_id") else "not in MLflow"
    return f"{known} ({facts.get('state')}, {run_id})"


def _model_lines(model: Facts, traced: Lineage) -> Iterator[str]:
    digest = _short(model.get("classifier_digest"))
    yield f"registered {model.get('registered')}, classifier {digest}"
    if model.get("temperature") is not None:
        threshold = model.get("threshold")
        said = "not set" if threshold is None else f"{threshold:.4g}"
        if model.get("abstains"):
            said = "out of reach: every answer abstains"
        yield f"temperature {model['temperature']:.4g}, threshold {said}"
    yield from _evaluation_lines(traced.evaluation)
    if model.get("promotion"):
        yield f"{model['promotion']}: {model.get('promotion_reason')}"


def _evaluation_lines(evaluation: Facts | None) -> Iterator[str]:
    if evaluation is None:
        yield "not evaluated on test pictures yet"
        return
    looks = f"looked at {evaluation.get('looks')} time(s)"
    if evaluation.get("accuracy") is None:
        yield f"evaluated without test accuracy, {looks}"
        return
    interval = f"95 %: {evaluation['low']:.4f} to {evaluation['high']:.4f}"
    same = "" if evaluation.get("same_classifier") is not False else "; before its calibration"
    yield (
        f"test accuracy {evaluation['accuracy']:.4f} ({interval}) on {evaluation['pictures']:,} "
        f"pictures, {looks}{same}"
    )


def _trial_lines(trial: Facts, traced: Lineage) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in trial["configuration"].items())
    for key, value in trial["best"].items():
        yield f"{key} {value} in epoch {trial.get('best_epoch')}"
    if traced.model is None:
        yield from _evaluation_lines(traced.evaluation)


def _search_lines(search: Facts, traced: Lineage) -> Iterator[str]:
    yield f"started {search.get('started')}, objective {search.get('objective')}"
    yield f"experiment: {search.get('experiment_file') or 'file not found'}"
    network, data = traced.network or {}, traced.data or {}
    yield (
        f"network: {network.get('backbone')}, weights {_short(network.get('weights_digest'))}, "
        f"{network.get('engine')}"
    )
    yield f"data: {data.get('source')}, digest {_short(data.get('digest'))}"
    yield f"pictures: {_counts(data)}"
    yield from _origin_lines(traced)


def _origin_lines(traced: Lineage) -> Iterator[str]:
    code, environment = traced.code or {}, traced.environment or {}
    changes = {True: " with changes", False: ""}.get(code.get("dirty"), "")  # type: ignore[arg-type]
    commit = f", commit {_short(code.get('commit'))}{changes}" if code.get("commit") else ""
    yield f"code: visiontuner {code.get('version')}{commit}"
    yield f"machine: {environment.get('host')}, {environment.get('platform')}"
    packages = environment.get("packages") or {}
    yield "packages: " + (", ".join(f"{k} {v}" for k, v in packages.items()) or "not recorded")


def _counts(data: Facts) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in (data.get("counts") or {}).items())
    names = data.get("class_names") or ()
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return (counts or "not recorded") + (f"; {len(names)} classes: {shown}" if names else "")


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "unknown"
