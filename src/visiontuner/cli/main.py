"""The command line: one subcommand per entry point of MLproject; parsing and printing only.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from visiontuner.cli.cloud import attach, jobs, stop
from visiontuner.cli.judge import compare, diagnose, evaluate, lineage, promote
from visiontuner.cli.search import backbones, doctor, lr_find, prepare, sync, train, tune
from visiontuner.cli.serve import deploy, endpoints, preflight, query, undeploy, update
from visiontuner.text import safe_output
from visiontuner.workarounds import python as garbage

_GROUPS: dict[str, tuple[click.Command, ...]] = {
    "Search": (tune, prepare, train, lr_find, sync, backbones, doctor),
    "Judge": (evaluate, compare, diagnose, promote, lineage),
    "Serve": (preflight, deploy, update, query, endpoints, undeploy),
    "Cloud": (jobs, attach, stop),
}


class GroupedCommands(click.Group):
    """`--help` with the subcommands under headings, in the order people need them.

    Nothing that a command prints holds a secret or a control character, a traceback included.
    """

    def main(self, *args: Any, **settings: Any) -> Any:
        with safe_output():
            try:
                return super().main(*args, **settings)
            except Exception:  # of `--debug`, or a fault of ours
                if not settings.get("standalone_mode", True):
                    raise
                traceback.print_exc()
                sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [command.name or "" for commands in _GROUPS.values() for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in _GROUPS.items():
            rows = [(c.name or "", c.get_short_help_str(80)) for c in commands]
            with formatter.section(heading):
                formatter.write_dl(rows)


@click.group(
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: visiontuner tune",
)
@click.version_option(package_name="visiontuner")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:  # noqa: ARG001 `errors.py` reads it
    """Fine-tune an image classifier on your own pictures.

    Search the learning rate and the batch size with Ray Tune, see every trial in MLflow, and
    put the best model behind a SageMaker endpoint.
    """
    garbage.collect_rarely()


for _commands in _GROUPS.values():
    for _command in _commands:
        main.add_command(_command)
