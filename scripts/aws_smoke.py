"""Deploy a model on your own AWS account, ask it and take it away again, under a cost cap.

    make aws-smoke                                   the champion of the newest search's model
    make aws-smoke ARGS="dogs@champion --max-cost 0.10 --yes"

Without an account, or where it could cost more than the cap, nothing is made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from visiontuner.cli.options import TEXT, OneLineErrors
from visiontuner.errors import ServingError, UserMistake, VisiontunerError

# What the endpoint may still cost after its time to come into service: asking and deleting.
_REST_SECONDS = 900


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option(
    "--max-cost", metavar="USD", type=click.FloatRange(0), default=0.25, show_default=True
)
@click.option("--price", metavar="USD", type=click.FloatRange(0), help="Of the instance, an hour.")
@click.option("--instance-type", default="ml.m5.large", show_default=True)
@click.option("--region", metavar="REGION", help="By default that of AWS's settings.")
@click.option("--role", metavar="NAME|ARN", help="What the endpoint runs as.")
@click.option("--image", metavar="URL", help="Serving image in ECR.")
@click.option("--timeout-seconds", type=click.IntRange(60, 3600), default=1800, show_default=True)
@click.option("--no-preflight", is_flag=True, help="Do not serve it here first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def main(
    model: str | None, max_cost: float, price: float | None, instance_type: str, region: str | None,
    role: str | None, image: str | None, timeout_seconds: int, no_preflight: bool, yes: bool,
) -> None:  # fmt: skip
    """Deploy MODEL, ask it its reference images, undeploy.

    By default the champion of the newest search's model.
    """
    from visiontuner.workflow.deploy import DeployOptions, deploy, plan_deployment

    options = DeployOptions(
        name=f"visiontuner-smoke-{uuid.uuid4().hex[:8]}",
        region=region,
        role=role,
        image=image,
        instance_type=instance_type,
        price=price,
        ttl="1h",
        timeout_seconds=timeout_seconds,
    )
    aws, plan = plan_deployment(model, options)
    for line in plan.lines():
        click.echo(line)
    most = most_it_can_cost(plan.price_per_hour, timeout_seconds, max_cost)
    if not yes:
        click.confirm(f"It costs at most ${most:.2f}. Go on?", abort=True)
    began = time.monotonic()
    deploy(aws, plan, preflight=None if no_preflight else "uv", note=say)
    try:
        ask(plan.name, plan.model_uri, plan.region)
    finally:
        take_away(plan.name, plan.region)
    hours = (time.monotonic() - began) / 3600
    click.echo(
        f"Deployed, asked and taken away in {hours * 60:.0f} minutes, for at most "
        f"${hours * (plan.price_per_hour or 0):.2f}; nothing is left."
    )


def most_it_can_cost(price_per_hour: float | None, timeout_seconds: int, cap: float) -> float:
    """US dollars if everything takes as long as it may.

    Raises:
        UserMistake: it is not known, or more than the cap.
    """
    if price_per_hour is None:
        raise UserMistake("AWS does not say what the instance costs; tell it with --price.")
    most = price_per_hour * (timeout_seconds + _REST_SECONDS) / 3600
    if most > cap:
        raise UserMistake(
            f"It could cost ${most:.2f}, more than --max-cost {cap:g}. Raise that, or choose a "
            "shorter --timeout-seconds or a smaller --instance-type."
        )
    return most


def ask(name: str, model_uri: str, region: str) -> None:
    """Ask the endpoint the images that its model was packaged with, as a user would.

    Raises:
        ServingError: it does not answer them all.
    """
    from visiontuner.serving.client import Reference
    from visiontuner.workflow.promote import model_folder
    from visiontuner.workflow.query import query

    with model_folder(model_uri) as folder:
        images = Reference.read(folder).images
    with TemporaryDirectory() as temporary:
        sources = write_images(Path(temporary), images)
        answers = list(query(sources, endpoint=name, region=region))
    failed = [one.answer.error for one in answers if one.answer.error]
    if failed:
        raise ServingError(f"{len(failed)} of {len(answers)} images have no answer: {failed[0]}")
    first = answers[0].answer
    click.echo(f"{len(answers)} images answered; the first: {first.label} {first.probability:.1%}")


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
    from visiontuner.workflow.deploy import endpoints, undeploy

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
