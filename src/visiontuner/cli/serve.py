"""The commands that serve: preflight, deploy, query and their kin."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from visiontuner.cli.console import SafeConsole, SearchConsole, make_console
from visiontuner.cli.options import (
    FOLDER,
    LISTED,
    PAIR,
    SINCE,
    TEXT,
    OneLineErrors,
    echo_data,
    echo_json,
    number,
)
from visiontuner.cli.silence import end_silence_line
from visiontuner.errors import UserMistake
from visiontuner.io.aws import account_flags
from visiontuner.text import columns_of, csv_row, next_command, printable

if TYPE_CHECKING:
    from visiontuner.aws.endpoint import Endpoint
    from visiontuner.serving.client import ImageAnswer
    from visiontuner.serving.preflight import PreflightReport


# The command that checks a model before it is deployed.


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option(
    "--env-manager",
    type=click.Choice(["uv", "local"]),
    default="uv",
    show_default=True,
    help="A clean environment from the model's requirements, or this one.",
)
@click.option("--container", is_flag=True, help="In SageMaker's container; needs a Docker engine.")
@click.option(
    "--image",
    metavar="NAME",
    type=TEXT,
    help="Image of the container. Default: MLflow builds one for the model's requirements.",
)
@click.option(
    "--ready-seconds",
    type=click.FloatRange(1, 3600),
    default=120,
    show_default=True,
    help="Longest start of the server.",
)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def preflight(
    model: str | None,
    env_manager: str,
    container: bool,
    image: str | None,
    ready_seconds: float,
    form: str,
) -> None:
    """Serve a model here as its endpoint will, and check what it answers over HTTP.

    MODEL is NAME (its champion, or the newest while there is none), NAME/VERSION, NAME@ALIAS, or
    a folder; without one the newest search's NAME. The code in it runs here, and its requirements
    are installed: only for models that you trust. Exits with 1 if a check fails.

    \b
    Examples:
      visiontuner preflight
      visiontuner preflight dogs@challenger
      visiontuner preflight models:/dogs/3 --env-manager local
      visiontuner preflight dogs --container
    """
    from visiontuner.workflow.preflight import preflight as check

    report = check(
        model,
        env_manager=env_manager,  # type: ignore[arg-type]  # one of click's choices
        container=container or image is not None,
        image=image,
        ready_seconds=ready_seconds,
        note=lambda text: click.echo(text, err=True),
    )
    if form == "json":
        echo_json(report.to_dict(), indent=2)
    else:
        _print_report(report)
    if not report.passed:
        raise click.exceptions.Exit(1)


def _print_report(report: PreflightReport) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in report.checks:
        passed = check.status == "ok"
        mark = Text("pass" if passed else "FAIL", style="green" if passed else "bold red")
        table.add_row(mark, Text(check.name), Text(check.detail))
    console = SafeConsole()
    console.print(table)
    console.print(
        f"\nOne image a request: p50 {report.p50_ms:.0f} ms, p95 {report.p95_ms:.0f} ms, "
        f"p99 {report.p99_ms:.0f} ms; {report.memory_mb:,.0f} MB of memory."
    )
    console.print(report.recommendation, soft_wrap=True)
    console.print(
        f"{report.model} is ready to be deployed."
        if report.passed
        else f"{report.model} would fail as an endpoint.",
        style="bold",
        soft_wrap=True,
    )


# The commands that put a model behind a SageMaker endpoint, swap it, list and remove endpoints.


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_WHERE = (
    click.option(
        "--region", metavar="REGION", type=TEXT, help="AWS region. Default: that of AWS's settings."
    ),
    click.option("--assume-role", metavar="ARN", type=TEXT, help="Act as this role."),
)
_ANYWHERE = (
    *_WHERE,
    click.option("--role", metavar="NAME|ARN", type=TEXT, help="Execution role of the instances."),
    click.option("--image", metavar="URL", type=TEXT, help="Serving image in ECR."),
    click.option(
        "--bucket", metavar="NAME", type=TEXT, help="S3 bucket for the model. Default: MLflow's."
    ),
    click.option(
        "--price", metavar="USD", type=number(), help="Price of one instance for an hour."
    ),
    click.option(
        "--env",
        "environment",
        metavar="KEY=VALUE",
        type=PAIR,
        multiple=True,
        help="Variable of the container. Repeatable.",
    ),
    click.option(
        "--tag",
        "tags",
        metavar="KEY=VALUE",
        type=PAIR,
        multiple=True,
        help="Tag of everything that is made. Repeatable.",
    ),
)
_NETWORK = (
    click.option(
        "--subnets", metavar="IDS", type=LISTED, help="Subnets of a VPC, separated by commas."
    ),
    click.option(
        "--security-groups", metavar="IDS", type=LISTED, help="Security groups of that VPC."
    ),
    click.option(
        "--kms-key",
        metavar="ID",
        type=TEXT,
        help="KMS key for uploads, disks and what is written to S3.",
    ),
)
_CHECKED = (
    click.option(
        "--env-manager",
        type=click.Choice(["uv", "local"]),
        default="uv",
        help="Environment of the preflight: a clean one, or this one.",
    ),
    click.option(
        "--preflight/--no-preflight",
        "check",
        default=True,
        help="Check it here first by serving it.",
    ),
    click.option("--dry-run", is_flag=True, help="Print what would happen; do nothing."),
)
_ENDPOINT = (
    *_ANYWHERE,
    click.option(
        "--ttl",
        metavar="TIME",
        type=TEXT,
        help="How long it is needed, as 8h; later `endpoints` says so.",
    ),
    click.option(
        "--startup-timeout",
        "startup_seconds",
        metavar="SECONDS",
        type=number(60, 3600, whole=True),
        help="Longest start of the container.",
    ),
    click.option(
        "--instance-type", type=TEXT, help="Default: ml.m5.large; of an update, unchanged."
    ),
    click.option(
        "--instances",
        type=click.IntRange(1, 100),
        help="Number of instances. Default: 1; of an update, unchanged.",
    ),
    click.option(
        "--autoscale",
        metavar="MIN:MAX[:N]",
        type=TEXT,
        help="Scale between MIN and MAX instances, N requests a minute to each (default: by the "
        "preflight).",
    ),
    click.option(
        "--timeout-seconds",
        type=click.IntRange(1, 7200),
        default=1800,
        show_default=True,
        help="How long to wait for the endpoint.",
    ),
    *_CHECKED,
)


def _options(decorators: tuple[Decorator, ...]) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option(
    "--name", metavar="NAME", type=TEXT, help="Name of the endpoint. Default: the model's."
)
@click.option(
    "--serverless",
    "serverless_mb",
    metavar="MB",
    type=number(whole=True),
    help="Serverless with this memory, 1024 to 6144, instead of instances.",
)
@click.option(
    "--async",
    "async_output",
    metavar="S3",
    type=TEXT,
    help="Answer asynchronously, into this folder: for large images and rare requests.",
)
@click.option(
    "--data-capture", metavar="S3", type=TEXT, help="Keep requests and answers in this folder."
)
@_options(_NETWORK)
@_options(_ENDPOINT)
def deploy(model: str | None, **given: Any) -> None:
    """Put a model behind a SageMaker endpoint, through MLflow's own client.

    MODEL is NAME (its champion, or the newest while there is none), NAME/VERSION or NAME@ALIAS;
    without one the newest search's NAME. What a failure or Ctrl-C leaves behind is removed.

    \b
    Examples:
      visiontuner deploy --dry-run                   what would happen, and MLflow's command for it
      visiontuner deploy dogs@champion --ttl 8h
      visiontuner deploy dogs --serverless 2048 --name dogs-test
      visiontuner deploy dogs --autoscale 1:4 --data-capture s3://my-bucket/captured
      visiontuner deploy dogs --async s3://my-bucket/answers
    """
    _run(model, given, update=False)


@click.command(cls=OneLineErrors)
@click.argument("name")
@click.argument("model", required=False, type=TEXT)
@_options(_ENDPOINT)
def update(name: str, model: str | None, **given: Any) -> None:
    """Put another model behind an endpoint, without a pause.

    MODEL as in `deploy`; without one the NAME of the model that the endpoint serves. The old
    model answers until the new one is healthy, and again if the new one answers the
    images that it was packaged with differently.

    \b
    Examples:
      visiontuner update dogs                        the champion of its model
      visiontuner update dogs dogs@challenger
      visiontuner update dogs --instance-type ml.c5.xlarge --autoscale 1:8:600
    """
    _run(model, given | {"name": name}, update=True)


@click.command(cls=OneLineErrors)
@click.argument("name")
@_options(_WHERE)
@click.option("--artifacts", is_flag=True, help="Delete the uploaded model archive too.")
def undeploy(name: str, region: str | None, assume_role: str | None, artifacts: bool) -> None:
    """Delete an endpoint, its configuration and its model.

    Where the endpoint is gone already, what is left of it is deleted.

    \b
    Example:
      visiontuner undeploy dogs --artifacts
    """
    from visiontuner.workflow.deploy import undeploy as remove

    kept = remove(
        name,
        region=region,
        assume_role=assume_role,
        artifacts=artifacts,
        note=_note,
    )
    click.echo(f"{name} is gone.")
    for archive, command in kept.items():
        click.echo(f"Kept {archive}; this deletes it too: {command}")


@click.command(cls=OneLineErrors)
@_options(_WHERE)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def endpoints(region: str | None, assume_role: str | None, form: str) -> None:
    """List visiontuner's endpoints in a region: age, cost, model, time left.

    \b
    Example:
      visiontuner endpoints --region eu-west-1
    """
    from visiontuner.workflow.deploy import endpoints as find

    found = find(region, assume_role)
    if form == "json":
        echo_json([{**asdict(e), "overdue": e.overdue} for e in found], indent=2)
    elif found:
        _print_endpoints(found, account_flags(region, assume_role))
    else:
        command = next_command("deploy", "MODEL", flags=account_flags(region, assume_role))
        click.echo(f"None. `{command}` makes one.")


def _as_options(given: dict[str, Any]) -> dict[str, Any]:
    """What click gives, as the options of a verb."""
    pairs = {key: dict(given[key]) for key in ("environment", "tags")}
    lists = {key: given[key] or () for key in ("subnets", "security_groups") if key in given}
    return given | pairs | lists


def _run(model: str | None, given: dict[str, Any], *, update: bool) -> None:
    from visiontuner.workflow import deploy as verbs

    dry_run, check, env_manager = (given.pop(key) for key in ("dry_run", "check", "env_manager"))
    options = verbs.DeployOptions(**_as_options(given))
    aws, plan = verbs.plan_deployment(model, options, updated=update)
    for line in plan.lines():
        click.echo(line, err=True)
    if dry_run:
        click.echo(plan.command("update" if update else "create"))
        return
    preflight = env_manager if check else None
    verbs.deploy(aws, plan, preflight=preflight, update=update, note=_note)
    click.echo(f"{plan.name} serves {plan.model_uri}.")
    click.echo(f"Ask it:    {next_command('query', plan.name, 'IMAGE', flags=aws.flags)}")
    click.echo(f"Remove it: {next_command('undeploy', plan.name, flags=aws.flags)}")


def _note(text: str) -> None:
    click.echo(text, err=True)


def _print_endpoints(found: list[Endpoint], flags: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    scaled = ["instances"] if any(endpoint.scales for endpoint in found) else []
    for heading in ("endpoint", "state", "model", "age", "cost so far", "meant to live", *scaled):
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
            *([endpoint.scales or ""] if scaled else []),
        )
    make_console().print(table)
    for endpoint in found:
        for tag, value in endpoint.unreadable.items():
            _note(f"?: {endpoint.name} has the tag {tag}={value!r}, which cannot be read.")


def _cost(endpoint: Endpoint) -> str:
    if endpoint.cost is None:
        return "?" if endpoint.has_odd_price else "not known"
    about = "about " if endpoint.scales else ""
    return f"{about}${endpoint.cost:,.2f}"


def _life(endpoint: Endpoint, flags: str) -> str:
    if endpoint.ttl_hours is None:
        return "?" if endpoint.has_odd_ttl else ""
    life = f"{endpoint.ttl_hours:.3g} h"
    if not endpoint.overdue:
        return life
    return f"{life}, passed: {next_command('undeploy', endpoint.name, flags=flags)}"


# The command that answers a folder on S3.


@click.command(cls=OneLineErrors)
@click.argument("source", metavar="S3-IMAGES")
@click.argument("output", metavar="S3-ANSWERS")
@click.option("--model", metavar="MODEL", type=TEXT, help="As `deploy` takes it.")
@click.option("--top-k", type=int, default=5, show_default=True, help="How many classes to list.")
@click.option("--threshold", metavar="P", type=number(0, 1), help="Abstain below this probability.")
@click.option("--instance-type", type=TEXT, help="Default: ml.m5.large.")
@click.option("--instances", type=click.IntRange(1, 100), help="How many. Default: 1.")
@_options(_NETWORK)
@_options(_ANYWHERE)
@_options(_CHECKED)
def transform(source: str, output: str, model: str | None, **given: Any) -> None:
    """Answer all images of a folder on S3 with a batch transform job.

    The images are read here and staged as requests, since MLflow's server takes JSON alone; the
    job is followed, its answers go to S3-ANSWERS/JOB.jsonl, one line an image with its key, and all
    else is deleted, also after a failure or Ctrl-C. Exits with 1 if an image was not answered.

    \b
    Examples:
      visiontuner transform s3://my-bucket/new s3://my-bucket/answers --model dogs --dry-run
      visiontuner transform s3://my-bucket/new s3://my-bucket/answers --model dogs@champion
    """
    from visiontuner.workflow import deploy as verbs

    dry_run, check, env_manager = (given.pop(key) for key in ("dry_run", "check", "env_manager"))
    options = verbs.TransformOptions(**_as_options(given))
    aws, plan = verbs.plan_transform(source, output, model, options)
    for line in plan.lines():
        click.echo(line, err=True)
    if dry_run:
        return
    console = SearchConsole(_stderr_console())
    try:
        done = verbs.transform(
            aws,
            plan,
            preflight=env_manager if check else None,
            note=console.note,
            progress=console.progress,
        )
    finally:
        console.close()
    spent = "" if done.cost is None else f", about ${done.cost:,.2f}"
    click.echo(f"{done.images - done.failed:,} of {done.images:,} images: {done.output}")
    click.echo(f"{done.job} ran {done.seconds / 60:.1f} machine minutes{spent}.", err=True)
    if done.failed:
        click.echo(f"{done.failed:,} not answered; their lines say why.", err=True)
        raise click.exceptions.Exit(1)


# The command that brings home what an endpoint was asked.


@click.command(cls=OneLineErrors)
@click.argument("name", metavar="NAME|S3")
@click.option("--output", metavar="FOLDER", type=FOLDER, required=True, help="It is made.")
@click.option(
    "--since", metavar="TIME", type=SINCE, help="Only those of the last TIME, as 24h or 7d."
)
@_options(_WHERE)
def capture(
    name: str, output: Path, since: timedelta | None, region: str | None, assume_role: str | None
) -> None:
    """Bring home the images and answers that an endpoint's data capture has kept.

    For endpoints that were made with `deploy --data-capture`. Of one that is gone name the folder,
    s3://BUCKET/FOLDER/ENDPOINT. Images go to FOLDER/images, named after SageMaker's event ids, and
    answers to FOLDER/answers.csv and answers.jsonl; what is there from before stays.

    \b
    Examples:
      visiontuner capture dogs --output captured
      visiontuner capture dogs --output captured --since 24h
    """
    from visiontuner.workflow.deploy import capture as bring

    console = SearchConsole(_stderr_console())
    try:
        came = bring(
            name,
            output=output,
            since=since,
            region=region,
            assume_role=assume_role,
            progress=console.progress,
        )
    finally:
        console.close()
    click.echo(f"{came.images:,} images from {came.source} are in {came.folder}/images,")
    click.echo(f"their answers in {came.folder}/answers.csv.")
    if came.unreadable:
        click.echo(f"{came.unreadable:,} could not be read; answers.csv says why.", err=True)


# The command that asks a model what is on images.


_FIELDS = (
    *("image", "label", "probability", "confident", "known", "novelty"),
    *("top_k", "error", "reduced"),
)
_SHOWN_CHOICES = 3
_ENDPOINT_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_LOCAL_SERVER = "http://127.0.0.1:5000"
_FEW = 32  # images that are answered before anyone wants to see progress


@click.command(cls=OneLineErrors)
@click.argument("names", metavar="[NAME|URL] IMAGE…", nargs=-1, required=True)
@click.option("--local", is_flag=True, help="Ask a server or a model on this machine.")
@click.option(
    "--url",
    metavar="URL",
    type=TEXT,
    help="Address of the server (with --local). Default: port 5000 here.",
)
@click.option(
    "--model",
    metavar="MODEL",
    type=TEXT,
    help="Ask a folder or registered model itself, without a server; runs no code in it.",
)
@click.option("--region", metavar="REGION", type=TEXT, help="AWS region of the endpoint.")
@click.option("--assume-role", metavar="ARN", type=TEXT, help="Ask the endpoint as this role.")
@click.option("--top-k", type=int, default=5, show_default=True, help="How many classes to list.")
@click.option("--threshold", metavar="P", type=number(0, 1), help="Abstain below this probability.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="table to read, json (one object a line) or csv for programs.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=4, help="Requests at a time.")
@click.option(
    "--request-mb",
    type=click.FloatRange(0.01, 40),
    help="Largest request. Default: 6, of an asynchronous endpoint 40; one that takes less is "
    "sent less.",
)
@click.option(
    "--explain",
    metavar="FOLDER",
    type=FOLDER,
    help="With --model: draw for each image what decided.",
)
def query(
    names: tuple[str, ...],
    local: bool,
    url: str | None,
    model: str | None,
    region: str | None,
    assume_role: str | None,
    top_k: int,
    threshold: float | None,
    form: str,
    workers: int,
    request_mb: float | None,
    explain: Path | None,
) -> None:
    """Ask what is on images: files, folders, URLs, or - for standard input.

    NAME is a SageMaker endpoint; with --local, --url or --model there is none to name.
    Exits with 1 if an image could not be read; the others are answered.

    \b
    Examples:
      visiontuner query dog-breeds photo.jpg folder/ https://example.org/dog.png
      visiontuner query --local photo.jpg                      a server on port 5000
      visiontuner query --model models:/dogs@champion folder/ --format csv > answers.csv
      cat photo.jpg | visiontuner query --model searches/dogs-20261122-1541 -
      visiontuner query --model dogs@champion folder/ --explain why/
    """
    where, sources = _where(names, local, url, model)
    from visiontuner.workflow.query import query as ask

    console = SearchConsole(_stderr_console())

    def progress(label: str, done: int, total: int, unit: str) -> None:
        if total > _FEW:
            console.progress(label, done, total, unit)

    answers = ask(
        sources,
        **where,
        region=region,
        assume_role=assume_role,
        top_k=top_k,
        threshold=threshold,
        workers=workers,
        request_bytes=None if request_mb is None else round(request_mb * 1e6),
        explain=explain,
        progress=progress,
    )
    write = {"table": _print_table, "json": _print_json, "csv": _print_csv}[form]
    try:
        failed = write(answers)
    finally:
        console.close()
    if explain is not None and any(explain.iterdir()):
        click.echo(f"Heat maps: {explain}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


def _where(
    names: Sequence[str], local: bool, url: str | None, model: str | None
) -> tuple[dict[str, str], Sequence[str]]:
    """Whom to ask, as an argument of `workflow.query`, and the images."""
    if model is not None:
        return {"model": model}, names
    if url is not None:
        return {"url": url}, names
    if local:
        return {"url": _LOCAL_SERVER}, names
    first, *images = names
    if images and first.startswith(("http://", "https://")):
        return {"url": first}, images
    # A folder of this name is no image: endpoints are named after the folder of their images.
    if not images or not _ENDPOINT_NAME.fullmatch(first) or Path(first).is_file():
        raise UserMistake(
            "Name an endpoint or a URL, then images; or --local or --model, then images. "
            "`visiontuner query --help` has examples."
        )
    return {"endpoint": first}, images


def _stderr_console() -> Any:
    return SafeConsole(stderr=True, soft_wrap=True)


def _print_table(answers: Iterable[ImageAnswer]) -> int:
    """Returns how many images failed; what was answered before an error is shown first."""
    shown: list[ImageAnswer] = []
    try:
        shown.extend(answers)
    finally:
        _show_table(shown)
    return sum(one.answer.error is not None for one in shown)


_GAP = 2  # columns between two cells


def _show_table(shown: Sequence[ImageAnswer]) -> None:
    if not shown:
        return
    console = SafeConsole()
    folder = _common_folder([one.image for one in shown])
    rows = [_table_row(one, folder) for one in shown]
    widths = [
        max(columns_of(str(cell)) for cell in cells) + _GAP for cells in zip(*rows, strict=True)
    ]
    fits = not console.is_terminal or sum(widths) - _GAP <= console.width
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("image", "label"):
        table.add_column(heading, overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    if fits:
        table.add_column("or", style="dim")
    for row in rows:
        table.add_row(*row[: None if fits else -1])
    if folder:
        console.print(f"In {printable(folder)}")
    console.print(table)
    if unsure := sum(one.answer.confident is False for one in shown):
        console.print(f"{unsure} not sure.")
    if new := sum(one.answer.known is False for one in shown):
        console.print(f"{new} new: unlike the training images, perhaps of no class.")
    if reduced := sum(one.reduced for one in shown):
        console.print(f"{reduced} sent smaller than they are, to fit into a request.")
    if failed := sum(one.answer.error is not None for one in shown):
        console.print(f"{failed} not answered.", style="red")


def _table_row(one: ImageAnswer, folder: str) -> tuple[Text | str, ...]:
    answer, image = one.answer, Text(printable(one.image.removeprefix(folder)))
    if answer.error is not None:
        return image, Text(answer.error, style="red"), "", ""
    others = ", ".join(
        f"{choice['label']} {choice['probability']:.1%}"
        for choice in answer.top_k[1:_SHOWN_CHOICES]
    )
    doubts = ["not sure"] * (not answer.confident) + ["new"] * (answer.known is False)
    label = f"{answer.label}" + (f" ({', '.join(doubts)})" if doubts else "")
    style = "yellow" if doubts else "bold"
    return image, Text(label, style=style), f"{answer.probability:.1%}", Text(others)


def _common_folder(images: Sequence[str]) -> str:
    """The folder that all images are in, with a slash; empty if they are not."""
    folders = {image.rpartition("/")[0] for image in images}
    absolute = {folder.startswith("/") for folder in folders}
    if len(images) < 2 or len(absolute) > 1 or any("://" in folder for folder in folders):
        return ""
    common = os.path.commonpath(folders).rstrip("/")
    return f"{common}/" if common or absolute == {True} else ""


def _print_json(answers: Iterable[ImageAnswer]) -> int:
    failed = 0
    for one in answers:
        failed += one.answer.error is not None
        echo_json(one.to_dict(), ensure_ascii=False)
    return failed


def _print_csv(answers: Iterable[ImageAnswer]) -> int:
    failed = 0
    echo_data(csv_row(_FIELDS), nl=False)
    for one in answers:
        failed += one.answer.error is not None
        row = one.to_dict()
        row["top_k"] = "; ".join(f"{c['label']} {c['probability']:.4f}" for c in row["top_k"])
        echo_data(csv_row(row[name] for name in _FIELDS), nl=False)
    return failed


# The command that serves a page to try a model on.


@click.command(cls=OneLineErrors)
@click.argument("model", metavar="[MODEL]", required=False, type=TEXT)
@click.option("--port", metavar="PORT", type=number(0, 65535, whole=True), help="Default: 7860.")
@click.option(
    "--export",
    metavar="FOLDER",
    type=FOLDER,
    help="Write a Gradio Space, which runs without visiontuner, instead.",
)
def demo(model: str | None, port: int | None, export: Path | None) -> None:
    """Try a model in the browser: drop an image, and see what it is taken for and why.

    The page shows names with probabilities, whether the answer is confident and the image known,
    where the class was seen, and the nearest training images. It answers this machine alone
    and asks nothing of any other. MODEL is a folder or a registered model, by default the newest
    search's. Ctrl-C ends it.

    \b
    Examples:
      visiontuner demo
      visiontuner demo dogs@champion --port 8000
      visiontuner demo dogs@champion --export space/
    """
    from visiontuner.workflow import demo as verbs

    if export is not None:
        if port is not None:
            raise UserMistake("--export writes a folder and serves nothing: leave out --port.")
        verbs.export_demo(model, export)
        click.echo(f"The Space: {export}. Try it: pip install -r requirements.txt, python app.py.")
        return
    console = SearchConsole(_stderr_console())

    def ready(address: str) -> None:
        console.close()
        click.echo(f"Open {address} in a browser. Ctrl-C ends it.")
        end_silence_line()

    try:
        chosen = verbs.PORT if port is None else int(port)
        verbs.demo(model, port=chosen, observer=console, ready=ready)
    finally:
        console.close()
