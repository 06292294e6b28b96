"""Deploy a model on your own AWS account, ask it and take it away again, under a cost cap.

    make aws-smoke                                   the champion of the newest search's model
    make aws-smoke ARGS="dogs@champion --max-cost 0.25 --yes"
    make aws-smoke ARGS=--job                        first train the digits, and deploy that
    make aws-smoke ARGS="--job --gpu --max-cost 2"   on a GPU, too

Without an account, or where it could cost more than the cap, nothing is made. A report is written
at the end, whatever happens: aws-smoke-report.md, to be sent to the makers.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import click

from visiontuner.aws.account import hourly_price
from visiontuner.aws.endpoint import GONE_SECONDS, DeploymentPlan
from visiontuner.aws.request import JobPlan
from visiontuner.cli.options import TEXT, OneLineErrors
from visiontuner.errors import ServingError, UserMistake, VisiontunerError
from visiontuner.experiment.schema import QUICKSTART, Experiment
from visiontuner.io.aws import Aws
from visiontuner.serving.client import Reference
from visiontuner.text import one_line, without_secrets
from visiontuner.workflow.deploy import (
    DeployOptions,
    deploy,
    endpoints,
    plan_deployment,
    undeploy,
)
from visiontuner.workflow.jobs import attach
from visiontuner.workflow.promote import model_folder
from visiontuner.workflow.query import query
from visiontuner.workflow.submit import JobOptions, plan_job, submit_job

# Asking, and an update that goes well; three hundred seconds to delete what is in service.
_REST_SECONDS = 900
# Most of a job's time is starting a machine and installing packages.
_JOB_SECONDS = 1800
_MOST = {"endpoint": 0.25, "job": 0.5, "gpu": 2.0}  # US dollars unless --max-cost says otherwise
_REPORT = "aws-smoke-report.md"
_TRAINING_TYPES = ("ml.m5.large", "ml.g5.xlarge")


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option("--job", "with_job", is_flag=True, help="First train on SageMaker: the digits.")
@click.option("--gpu", is_flag=True, help="With --job: on one ml.g5.xlarge, too.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Of the training.")
@click.option("--training-price", metavar="USD", multiple=True, type=click.FloatRange(0),
              help="Of the training instances, an hour each, in their order.")  # fmt: skip
@click.option("--bucket", metavar="NAME", help="Of the training job.")
@click.option(
    "--max-cost", metavar="USD", type=click.FloatRange(0), help="Default: 0.25; 0.5 or 2 with jobs."
)
@click.option("--price", metavar="USD", type=click.FloatRange(0), help="Of the instance, an hour.")
@click.option("--instance-type", default="ml.m5.large", show_default=True)
@click.option("--region", metavar="REGION", help="By default that of AWS's settings.")
@click.option("--role", metavar="NAME|ARN", help="What the endpoint runs as.")
@click.option("--image", metavar="URL", help="Serving image in ECR.")
@click.option("--timeout-seconds", type=click.IntRange(60, 3600), default=1800, show_default=True)
@click.option("--no-preflight", is_flag=True, help="Do not serve it here first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def main(**given: Any) -> None:
    """Deploy MODEL, ask it its reference images, update it, ask again, undeploy.

    By default the champion of the newest search's model; with --job the one that a job has trained.
    """
    chosen = Choices(**given)
    report = Report()
    try:
        smoke(chosen, report)
    except BaseException as error:
        report.failed = str(error) or type(error).__name__
        raise
    finally:
        if report.steps:
            report.write(Path(_REPORT))
            click.echo(f"Report: {_REPORT}", err=True)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the command line says."""

    model: str | None
    with_job: bool
    gpu: bool
    overrides: tuple[str, ...]
    training_price: tuple[float, ...]
    bucket: str | None
    max_cost: float | None
    price: float | None
    instance_type: str
    region: str | None
    role: str | None
    image: str | None
    timeout_seconds: int
    no_preflight: bool
    yes: bool

    @property
    def cap(self) -> float:
        """US dollars."""
        if self.max_cost is not None:
            return self.max_cost
        return _MOST["gpu" if self.gpu else "job" if self.with_job else "endpoint"]

    @property
    def training_types(self) -> tuple[str, ...]:
        if not self.with_job:
            return ()
        return _TRAINING_TYPES[: 2 if self.gpu else 1]

    def deployment(self) -> DeployOptions:
        return DeployOptions(
            name=f"visiontuner-smoke-{uuid.uuid4().hex[:8]}",
            region=self.region,
            role=self.role,
            image=self.image,
            instance_type=self.instance_type,
            price=self.price,
            ttl="2h",
            timeout_seconds=self.timeout_seconds,
        )


def smoke(chosen: Choices, report: Report) -> None:
    """All of it, or nothing where it could cost more than the cap.

    Raises:
        UserMistake: it could, or the price is not known.
        ServingError: a step fails; what costs money is taken away.
    """
    if chosen.gpu and not chosen.with_job:
        raise UserMistake("--gpu is of the training job: add --job.")
    jobs, model, options = plan_jobs(chosen), chosen.model, chosen.deployment()
    plans: list[JobPlan | DeploymentPlan] = [plan for _, plan in jobs]
    price = chosen.price
    if not jobs:
        _, plan = plan_deployment(model, options)
        plans, price = [plan], plan.price_per_hour
    elif price is None:  # its model is not there yet
        price = hourly_price(jobs[0][0], chosen.instance_type)
    for each in plans:
        click.echo("\n".join(each.lines()))
    before = sum(plan.most_it_can_cost or 0 for _, plan in jobs)
    most = most_it_can_cost(price, chosen.timeout_seconds, chosen.cap, before=before)
    if not chosen.yes:
        click.confirm(f"It costs at most ${most:.2f}. Go on?", abort=True)
    for aws, job in jobs:
        model = train(aws, job, report)
    deploy_and_ask(model, options, None if chosen.no_preflight else "uv", report)
    click.echo(f"Deployed, asked, updated and taken away; nothing is left. {report.told()}")


def plan_jobs(chosen: Choices) -> list[tuple[Aws, JobPlan]]:
    """A search of two trials on the digits for each type of instance.

    Raises:
        UserMistake: what one costs is not known.
    """
    raw = {**QUICKSTART, "name": "aws-smoke", "search": {"trials": 2}}
    experiment = Experiment.parse(raw, chosen.overrides, where="aws-smoke")
    prices = dict(zip(_TRAINING_TYPES, chosen.training_price, strict=False))
    found = []
    for kind in chosen.training_types:
        options = JobOptions(
            instance_type=kind,
            max_run=f"{_JOB_SECONDS}s",
            price=prices.get(kind),
            region=chosen.region,
            role=chosen.role,
            bucket=chosen.bucket,
        )
        aws, plan = plan_job(experiment, options)
        if plan.most_it_can_cost is None:
            raise UserMistake(f"AWS does not say what {kind} costs; tell it with --training-price.")
        found.append((aws, plan))
    return found


def train(aws: Aws, plan: JobPlan, report: Report) -> str:
    """Submit a job, follow it and bring it home; the name of the model that it registered.

    Raises:
        ServingError: it failed, or packaged no model.
    """
    began = time.monotonic()
    name = submit_job(aws, plan, note=say)
    report.add(f"submitted on {plan.instance_type}", name, began)
    began = time.monotonic()
    came = attach(name, region=plan.region)
    seconds = time.monotonic() - began
    report.add(f"followed and brought home from {plan.instance_type}", "; ".join(came.lines), began)
    if came.failed or came.result is None:
        raise ServingError(f"The job {name} did not end well: {'; '.join(came.lines)}")
    report.spent += plan.price.of(seconds) or 0.0
    return plan.experiment.name


def deploy_and_ask(
    model: str | None, options: DeployOptions, preflight: Literal["uv"] | None, report: Report
) -> None:
    """Deploy, ask, update to the same model, ask again, and take all of it away.

    Raises:
        ServingError: one of these fails.
    """
    began = start = time.monotonic()
    aws, plan = plan_deployment(model, options)
    deploy(aws, plan, preflight=preflight, note=say)
    report.add(f"deployed on {plan.instance_type}", plan.model_uri, began)
    try:
        began = time.monotonic()
        report.add("asked", ask(plan.name, plan.model_uri, plan.region), began)
        began = time.monotonic()
        aws, swapped = plan_deployment(model, options, updated=True)
        deploy(aws, swapped, preflight=None, update=True, note=say)
        report.add("updated", swapped.model_uri, began)
        began = time.monotonic()
        report.add("asked again", ask(plan.name, plan.model_uri, plan.region), began)
    finally:
        began = time.monotonic()
        take_away(plan.name, plan.region)
        report.add("taken away", plan.name, began)
        report.spent += (time.monotonic() - start) / 3600 * (plan.price_per_hour or 0)


class Report:
    """What was done, in how many seconds, and with which versions."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, str]] = []
        self.spent = 0.0
        self.failed: str | None = None

    def add(self, step: str, told: str, began: float) -> None:
        self.steps.append((step, time.monotonic() - began, told))

    def told(self) -> str:
        minutes = sum(seconds for _, seconds, _ in self.steps) / 60
        return f"It took {minutes:.0f} minutes, for at most about ${self.spent:.2f}."

    def write(self, path: Path) -> None:
        """As a table in Markdown, without account numbers or secrets."""
        lines = [
            "# aws-smoke", "", self.told(), "", "| step | seconds | what |", "|---|---|---|",
            *(f"| {step} | {seconds:.0f} | {_plain(told)} |" for step, seconds, told in self.steps),
            "", "| package | version |", "|---|---|",
            *(f"| {name} | {version(name)} |" for name in _VERSIONS),
        ]  # fmt: skip
        path.write_text("\n".join(lines) + "\n", "utf-8")


_VERSIONS = ("visiontuner", "mlflow", "sagemaker", "boto3", "ray", "torch")


def _plain(text: str) -> str:
    return re.sub(r"\d{12}", "ACCOUNT", without_secrets(one_line(text, 400))).replace("|", "/")


def most_it_can_cost(
    price_per_hour: float | None, timeout_seconds: int, cap: float, *, before: float = 0.0
) -> float:
    """US dollars if everything takes as long as it may.

    SageMaker deletes no endpoint that is being created, and gives one up after an hour: deleting
    may take that long.

    Args:
        before: what the jobs may cost.

    Raises:
        UserMistake: it is not known, or more than the cap.
    """
    if price_per_hour is None:
        raise UserMistake("AWS does not say what the instance costs; tell it with --price.")
    most = before + price_per_hour * (timeout_seconds + _REST_SECONDS + GONE_SECONDS) / 3600
    if most > cap:
        raise UserMistake(
            f"It could cost ${most:.2f}, more than --max-cost {cap:g}. Raise that, or choose a "
            "shorter --timeout-seconds or a smaller --instance-type."
        )
    return most


def ask(name: str, model_uri: str, region: str) -> str:
    """Ask the endpoint the images that its model was packaged with, as a user would; in words.

    Raises:
        ServingError: it does not answer them all.
    """
    with model_folder(model_uri) as folder:
        images = Reference.read(folder).images
    with TemporaryDirectory() as temporary:
        sources = write_images(Path(temporary), images)
        answers = list(query(sources, endpoint=name, region=region))
    failed = [one.answer.error for one in answers if one.answer.error]
    if failed:
        raise ServingError(f"{len(failed)} of {len(answers)} images have no answer: {failed[0]}")
    first = answers[0].answer
    told = f"{len(answers)} images answered; the first: {first.label} {first.probability:.1%}"
    click.echo(told)
    return told


def write_images(folder: Path, images: Sequence[bytes]) -> list[str]:
    paths = [folder / str(number) for number in range(len(images))]
    for path, content in zip(paths, images, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def take_away(name: str, region: str) -> None:
    """Delete the endpoint and all that belongs to it.

    Raises:
        ServingError: it did not end; something may cost money.
    """
    try:
        undeploy(name, region=region, artifacts=True, note=say)
        left = [one.name for one in endpoints(region) if one.name == name]
    except (VisiontunerError, KeyboardInterrupt) as error:
        left = [str(error) or "stopped"]
    if left:
        raise ServingError(
            f"Taking it away did not end ({left[0]}): something may cost money. Run "
            f"`visiontuner undeploy {name} --artifacts --region {region}`."
        )


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
