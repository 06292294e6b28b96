"""The commands that put a model behind a SageMaker endpoint, swap it, list and remove endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.errors import OneLineErrors
from visiontuner.cli.options import NOT_GIVEN
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.serving.endpoint_listing import Endpoint

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_WHERE = (
    click.option(
        "--region", metavar="REGION", default="auto", help="By default that of AWS's settings."
    ),
    click.option("--assume-role", metavar="ARN", default="none", help="Act as this role."),
)
_HOW = (
    *_WHERE,
    click.option("--role", metavar="NAME|ARN", default="auto", help="What the endpoint runs as."),
    click.option("--image", metavar="URL", default="auto", help="Serving image in ECR."),
    click.option(
        "--bucket", metavar="NAME", default="auto", help="For the model; by default MLflow's."
    ),
    click.option("--ttl", metavar="TIME", default="none", help="How long it is needed, as 8h."),
    click.option("--price", metavar="USD", default="auto", help="Of one instance for an hour."),
    click.option(
        "--env", "environment", metavar="KEY=VALUE", multiple=True, help="For the container."
    ),
    click.option(
        "--timeout-seconds", type=click.IntRange(1, 7200), default=1800, show_default=True
    ),
    click.option(
        "--env-manager",
        type=click.Choice(["uv", "local"]),
        default="uv",
        help="Of the preflight: a clean environment, or this one.",
    ),
    click.option("--preflight/--no-preflight", "check", default=True, help="Serve it here first."),
    click.option(
        "--dry-run", is_flag=True, help="Print MLflow's command and the cost; do nothing."
    ),
)


def _options(decorators: tuple[Decorator, ...]) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


@click.command(cls=OneLineErrors)
@click.argument("model", default="auto")
@click.option(
    "--name", metavar="NAME", default="auto", help="Of the endpoint; by default the model's."
)
@click.option("--instance-type", default="auto", help="Default: ml.m5.large.")
@click.option("--instances", type=click.IntRange(1, 100), help="How many. Default: 1.")
@click.option(
    "--serverless", metavar="MB", default="none", help="Instead of instances: 1024 to 6144."
)
@click.option(
    "--data-capture", metavar="S3", default="none", help="Keep requests and answers there."
)
@_options(_HOW)
def deploy(model: str, **given: Any) -> None:
    """Put a model behind a SageMaker endpoint, through MLflow's own client.

    MODEL is NAME (its champion, or the newest while there is none), NAME/VERSION or NAME@ALIAS;
    without one the newest search's NAME. What a failure or Ctrl-C leaves behind is taken away.

    \b
    Examples:
      visiontuner deploy --dry-run                   what would happen, and MLflow's command for it
      visiontuner deploy dogs@champion --ttl 8h
      visiontuner deploy dogs --serverless 2048 --name dogs-test
    """
    _run(model, given, update=False)


@click.command(cls=OneLineErrors)
@click.argument("name")
@click.argument("model", default="auto")
@_options(_HOW)
def update(name: str, model: str, **given: Any) -> None:
    """Put another model behind an endpoint, without a pause.

    MODEL as in `deploy`; without one the NAME of the model that the endpoint serves. The old
    model answers until the new one is healthy, and again if the new one answers the
    pictures that it was packaged with differently.

    \b
    Examples:
      visiontuner update dogs                        the champion of its model
      visiontuner update dogs dogs@challenger
    """
    _run(model, given | {"name": name}, update=True)


@click.command(cls=OneLineErrors)
@click.argument("name")
@_options(_WHERE)
@click.option("--artifacts", is_flag=True, help="Delete the uploaded model archive too.")
def undeploy(name: str, region: str, assume_role: str, artifacts: bool) -> None:
    """Delete an endpoint, its configuration and its model.

    Where the endpoint is gone already, what is left of it is deleted.

    \b
    Example:
      visiontuner undeploy dogs --artifacts
    """
    from visiontuner.workflow.deploy import undeploy as remove

    kept = remove(
        name,
        region=_given(region),
        assume_role=_given(assume_role),
        artifacts=artifacts,
        note=_note,
    )
    click.echo(f"{name} is gone.")
    for archive, command in kept.items():
        click.echo(f"Kept {archive}; this deletes it too: {command}")


@click.command(cls=OneLineErrors)
@_options(_WHERE)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def endpoints(region: str, assume_role: str, form: str) -> None:
    """List the endpoints that visiontuner deployed in a region: age, cost, model, time left.

    \b
    Example:
      visiontuner endpoints --region eu-west-1
    """
    from visiontuner.aws import account_flags
    from visiontuner.workflow.deploy import endpoints as find

    where = _given(region), _given(assume_role)
    found = find(*where)
    if form == "json":
        click.echo(json.dumps([{**asdict(e), "overdue": e.overdue} for e in found], indent=2))
    elif found:
        _print_endpoints(found, account_flags(*where))
    else:
        command = next_command("deploy", "MODEL", flags=account_flags(*where))
        click.echo(f"None. `{command}` makes one.")


def _run(model: str, given: dict[str, Any], *, update: bool) -> None:
    from visiontuner.workflow.deploy import DeployOptions, plan_deployment
    from visiontuner.workflow.deploy import deploy as act

    dry_run, check, env_manager = (given.pop(key) for key in ("dry_run", "check", "env_manager"))
    options = DeployOptions(**_read(given))
    aws, plan = plan_deployment(_given(model), options, updated=update)
    for line in plan.lines():
        click.echo(line, err=True)
    if dry_run:
        click.echo(plan.command("update" if update else "create"))
        return
    preflight = env_manager if check else None
    act(aws, plan, preflight=preflight, update=update, note=_note)
    click.echo(f"{plan.name} serves {plan.model_uri}.")
    click.echo(f"Ask it:    {next_command('query', plan.name, 'PICTURE', flags=aws.flags)}")
    click.echo(f"Remove it: {next_command('undeploy', plan.name, flags=aws.flags)}")


def _read(given: dict[str, Any]) -> dict[str, Any]:
    """Options as `DeployOptions` takes them."""
    read: dict[str, Any] = {key: _given(v) if isinstance(v, str) else v for key, v in given.items()}
    read["environment"] = dict(_pair(text) for text in given["environment"])
    read["price"] = _number("--price", read["price"])
    serverless = _number("--serverless", read.pop("serverless", None))
    return read | {"serverless_mb": None if serverless is None else int(serverless)}


def _given(text: str) -> str | None:
    return None if text in NOT_GIVEN else text


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserMistake(f"--env takes KEY=VALUE, got {text!r}.")
    return key, value


def _number(flag: str, text: str | None) -> float | None:
    try:
        number = None if text is None else float(text)
    except ValueError:
        number = -1.0
    if number is not None and not 0 <= number < 1e6:
        raise UserMistake(f"{flag} takes a number from 0, got {text!r}.")
    return number


def _note(text: str) -> None:
    click.echo(text, err=True)


def _print_endpoints(found: list[Endpoint], flags: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from visiontuner.console import make_console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("endpoint", "state", "model", "age", "cost so far", "meant to live"):
        table.add_column(heading)
    for endpoint in found:
        life = _life(endpoint, flags)
        table.add_row(
            Text(endpoint.name),
            Text(endpoint.state),
            Text(endpoint.model),
            f"{endpoint.age_hours:.1f} h",
            _cost(endpoint),
            Text(life, style="red" if endpoint.overdue else ""),
        )
    make_console().print(table)
    for endpoint in found:
        for tag, value in endpoint.unreadable.items():
            _note(f"?: {endpoint.name} has the tag {tag}={value!r}, which cannot be read.")


def _cost(endpoint: Endpoint) -> str:
    from visiontuner.serving.deployment import PRICE_TAG

    if endpoint.cost is None:
        return "?" if PRICE_TAG in endpoint.unreadable else "not known"
    return f"${endpoint.cost:,.2f}"


def _life(endpoint: Endpoint, flags: str) -> str:
    from visiontuner.serving.deployment import TTL_TAG

    if endpoint.ttl_hours is None:
        return "?" if TTL_TAG in endpoint.unreadable else ""
    life = f"{endpoint.ttl_hours:.3g} h"
    if not endpoint.overdue:
        return life
    return f"{life}, passed: {next_command('undeploy', endpoint.name, flags=flags)}"
