"""The command line: which commands there are; the module of one is imported when it is called."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any, NamedTuple

import click

from visiontuner.cli.silence import silence_line
from visiontuner.text import safe_output
from visiontuner.workarounds.python import collect_rarely


class CommandEntry(NamedTuple):
    """Where a command lies in `visiontuner.cli`, and its line of `visiontuner --help`."""

    module: str
    function: str
    summary: str


COMMANDS: dict[str, dict[str, CommandEntry]] = {
    "Search": {
        "tune": CommandEntry(
            "search",
            "tune",
            "Search hyperparameters; every trial becomes an MLflow run, the best one a model.",
        ),
        "prepare": CommandEntry(
            "search",
            "prepare",
            "Look at the images: how many of which class, and what is wrong with them.",
        ),
        "train": CommandEntry(
            "search", "train", "Train once, without a search; the model registers like any other."
        ),
        "lr-find": CommandEntry(
            "search",
            "lr_find",
            "Train once with a growing learning rate, and suggest a range to search.",
        ),
        "sync": CommandEntry(
            "search",
            "sync",
            "Write a search into MLflow, late or elsewhere; the newest one if none is named.",
        ),
        "backbones": CommandEntry(
            "search", "backbones", "List pretrained networks whose name contains a text."
        ),
        "doctor": CommandEntry(
            "search", "doctor", "Look for what would fail on this machine, before it does."
        ),
    },
    "Judge": {
        "evaluate": CommandEntry(
            "judge",
            "evaluate",
            "Test the chosen model on images that played no part in the choice.",
        ),
        "compare": CommandEntry(
            "judge",
            "compare",
            "Compare runs: parameters, best value, epochs, time, findings; the best first.",
        ),
        "diagnose": CommandEntry(
            "judge", "diagnose", "Say what went wrong in a training, why, and what to change."
        ),
        "suspects": CommandEntry(
            "judge",
            "suspects",
            "Name the images whose label is probably wrong, in a table to correct them with.",
        ),
        "suggest": CommandEntry(
            "judge",
            "suggest",
            "Choose the unlabelled images of FOLDER that are most worth a label.",
        ),
        "drift": CommandEntry(
            "judge",
            "drift",
            "Say whether an endpoint's images, or a folder's, are still like those of the search.",
        ),
        "promote": CommandEntry(
            "judge",
            "promote",
            "Make a version the champion, if it is better on the same test images beyond noise.",
        ),
        "lineage": CommandEntry(
            "judge",
            "lineage",
            "Say where a model comes from: trial, search, experiment, images, code, machine.",
        ),
    },
    "Serve": {
        "preflight": CommandEntry(
            "serve",
            "preflight",
            "Serve a model here as its endpoint will, and check what it answers over HTTP.",
        ),
        "quantize": CommandEntry(
            "model_forms",
            "quantize",
            "Make a model's int8 form, compare its answers, and register it as a version of its "
            "own.",
        ),
        "export": CommandEntry(
            "model_forms",
            "export",
            "Write a model for another runtime: network, model.json and example.py that uses them.",
        ),
        "deploy": CommandEntry(
            "serve",
            "deploy",
            "Put a model behind a SageMaker endpoint, through MLflow's own client.",
        ),
        "update": CommandEntry(
            "serve", "update", "Put another model behind an endpoint, without a pause."
        ),
        "query": CommandEntry(
            "serve",
            "query",
            "Ask what is on images: files, folders, URLs, or - for standard input.",
        ),
        "transform": CommandEntry(
            "serve",
            "transform",
            "Answer all images of a folder on S3 with a batch transform job.",
        ),
        "capture": CommandEntry(
            "serve",
            "capture",
            "Bring home the images and answers that an endpoint's data capture has kept.",
        ),
        "demo": CommandEntry(
            "serve",
            "demo",
            "Try a model in the browser: drop an image, and see what it is taken for and why.",
        ),
        "endpoints": CommandEntry(
            "serve",
            "endpoints",
            "List visiontuner's endpoints in a region: age, cost, model, time left.",
        ),
        "undeploy": CommandEntry(
            "serve", "undeploy", "Delete an endpoint, its configuration and its model."
        ),
    },
    "Cloud": {
        "jobs": CommandEntry(
            "cloud",
            "jobs",
            "List the training jobs that visiontuner submitted in a region, the newest first.",
        ),
        "attach": CommandEntry(
            "cloud",
            "attach",
            "Follow a training job; once it has ended, bring its search home and into MLflow.",
        ),
        "stop": CommandEntry(
            "cloud", "stop", "End a training job in order; what it has done is kept."
        ),
    },
}
"""The commands under the headings of `--help`, in the order in which people need them."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is called, so that `--help` answers at once.

    Nothing that a command prints holds a secret or a control character, a traceback included.

    Source: https://click.palletsprojects.com/en/stable/complex/#lazily-loading-subcommands
    """

    def main(self, *args: Any, **settings: Any) -> Any:
        with silence_line() as silence, safe_output(silence.heard):
            try:
                return super().main(*args, **settings)
            except Exception:  # of `--debug`, or a fault of ours
                if not settings.get("standalone_mode", True):
                    raise
                traceback.print_exc()
                sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for commands in COMMANDS.values():
            if cmd_name in commands:
                entry = commands[cmd_name]
                module = importlib.import_module(f"visiontuner.cli.{entry.module}")
                command: click.Command = getattr(module, entry.function)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, entry.summary) for name, entry in commands.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: visiontuner tune",
)
@click.version_option(package_name="visiontuner")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:  # noqa: ARG001 `OneLineErrors` reads it
    """Fine-tune an image classifier on your own images.

    Search the learning rate and the batch size with Ray Tune, see every trial in MLflow, and
    put the best model behind a SageMaker endpoint.
    """
    collect_rarely()
