"""The commands that give a model another form: quantize and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from visiontuner.cli.console import SafeConsole, SearchConsole
from visiontuner.cli.options import FOLDER, TEXT, OneLineErrors, echo_json, number
from visiontuner.text import next_command

if TYPE_CHECKING:
    from visiontuner.evaluation.intervals import Interval
    from visiontuner.workflow.quantize import QuantizeResult


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option(
    "--max-loss",
    metavar="POINTS",
    type=number(0, 100),
    default="0.5",
    show_default=True,
    help="Refuse where even the low end of the loss's 95 % interval is above.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def quantize(model: str | None, max_loss: float, as_json: bool) -> None:
    """Make a model's int8 form, compare its answers, and register it as a version of its own.

    MODEL is a search folder or a registered model as in `preflight`. Scales are measured on 128
    training images; accuracy, loss and temperature come from the validation images. Nothing is
    registered where it loses more than asked. Aliases stay: name the new version to deploy it.

    \b
    Examples:
      visiontuner quantize
      visiontuner quantize searches/dog-breeds-20261122-154100
      visiontuner quantize dogs@champion --max-loss 1 --json
    """
    from visiontuner.workflow.quantize import quantize as make

    console = SearchConsole(SafeConsole(soft_wrap=True, stderr=True))
    try:
        result = make(model, max_loss=max_loss / 100, observer=console)
    finally:
        console.close()
    if as_json:
        echo_json(result.to_dict(), indent=2)
    else:
        _print_quantized(result)


def _print_quantized(result: QuantizeResult) -> None:
    compared, fast, slow = result.comparison, result.speed_int8, result.speed_fp32
    click.echo(f"\n{compared.images:,} validation images    float32 → int8")
    for name, before, after in (
        ("accuracy", compared.accuracy_fp32, compared.accuracy_int8),
        ("log loss", compared.nll_fp32, compared.nll_int8),
    ):
        click.echo(f"  {name}      {_with_ends(before)} → {_with_ends(after)}")
    click.echo(f"  loss of accuracy  {_with_ends(compared.loss)}")
    click.echo(f"  same answer       {_with_ends(compared.agreement)}")
    click.echo("One thread of this machine, one image at a time")
    click.echo(
        f"  network     {slow.images_per_second:.0f} → {fast.images_per_second:.0f} images/s"
    )
    click.echo(
        f"  file to answer  {slow.answers_per_second:.0f} → {fast.answers_per_second:.0f} images/s"
    )
    click.echo(f"  size        {result.megabytes_fp32:.1f} → {result.megabytes:.1f} MB")
    for note in compared.notes:
        click.echo(f"note: {note}")
    if not result.is_faster:
        click.echo(
            "warning: int8 is no faster on this machine: its processor may lack instructions for "
            "it (VNNI). Measure where it will be served."
        )
    name = result.model.removeprefix("models:/")
    click.echo(f"\n{result.model} is the int8 form of {result.source}.")
    click.echo(f"Check it:  {next_command('preflight', name)}")
    click.echo(f"Deploy it: {next_command('deploy', name)}")


def _with_ends(interval: Interval) -> str:
    return f"{interval.value:.4f} ({interval.low:.4f} to {interval.high:.4f})"


@click.command(cls=OneLineErrors)
@click.argument("model", required=False, type=TEXT)
@click.option(
    "--to",
    type=click.Choice(["onnx", "onnx-int8", "openvino", "coreml"]),
    required=True,
    help="The runtime that will use it.",
)
@click.option("--output", metavar="FOLDER", type=FOLDER, required=True, help="Made here.")
def export(model: str | None, to: str, output: Path) -> None:
    """Write a model for another runtime: network, model.json and example.py that uses them.

    MODEL is a folder or a registered model as in `preflight`. Before anything appears the answers
    are compared with the artifact's own on its reference images. model.json holds class names,
    preprocessing, temperature and threshold. Core ML is refused: nothing converts ONNX to it.

    \b
    Examples:
      visiontuner export --to onnx --output dogs-onnx
      visiontuner export dogs@champion --to openvino --output dogs-openvino
      visiontuner export dogs/3 --to onnx-int8 --output dogs-int8
    """
    from visiontuner.workflow.quantize import export as write

    console = SearchConsole(SafeConsole(soft_wrap=True, stderr=True))
    try:
        done = write(model, to, output, observer=console)  # type: ignore[arg-type]  # a choice
    finally:
        console.close()
    click.echo(
        f"{done.folder} holds {done.file}, model.json and example.py. Probabilities are those of "
        f"the model within {done.difference:.1e} on its {done.images} reference images."
    )
    click.echo(f"Try it: python {done.folder / 'example.py'} IMAGE")
