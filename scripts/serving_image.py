"""Build the image that serves a registered model: `make serving-image MODEL=NAME/VERSION`."""

from __future__ import annotations

import click

from visiontuner.cli.options import TEXT, OneLineErrors
from visiontuner.workflow.preflight import build_serving_image


@click.command(cls=OneLineErrors)
@click.argument("model", type=TEXT)
@click.argument("image", type=TEXT)
def main(model: str, image: str) -> None:
    """Build IMAGE for MODEL's requirements."""
    build_serving_image(model, image, note=lambda text: click.echo(text, err=True))


if __name__ == "__main__":
    main()
