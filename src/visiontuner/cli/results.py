"""How a search ended, for a person."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import click

from visiontuner.commands import DEFAULT_TRACKING_URI, next_command
from visiontuner.text import shell_word

if TYPE_CHECKING:
    from visiontuner.workflow import SearchResult


def print_result(result: SearchResult, *, said: set[str]) -> None:
    """The best trial, what was made of it, and the next command; exits 130 if it was interrupted.

    Args:
        said: what the user was told already.
    """
    best, folder = result.best, result.folder
    if best is not None:
        values = ", ".join(f"{k} {_short(v)}" for k, v in best.configuration.items())
        objective = result.record.objective
        click.echo(f"\nBest trial: {best.trial_id} with {values}")
        click.echo(f"  {objective} {best.best_value:.4f} in epoch {best.best_epoch}")
    print_artifacts(result, said=said)
    if result.state == "completed" and not result.tracking_problem:
        click.echo("\nNext, compare the trials: " + _ui_command(result.tracking_uri))
    if result.state != "completed":
        word = "Stopped" if result.state == "interrupted" else "The time budget is spent"
        click.echo(f"\n{word}. Go on with: {next_command('tune', '--resume', folder)}")
    if result.state == "interrupted":
        raise click.exceptions.Exit(130)


def print_artifacts(result: SearchResult, *, said: set[str]) -> None:
    """The classifier, the MLflow model, and what MLflow does not hold yet."""
    if result.classifier:
        click.echo(f"  classifier: {result.classifier}")
    if result.model:
        click.echo(f"  MLflow model: {result.model} (in {result.tracking_uri})")
    if result.tracking_problem:
        known = result.tracking_problem in said
        reason = "." if known else f": {result.tracking_problem}"
        click.echo(f"\nNot everything is in MLflow{reason}")
        click.echo(f"Nothing is lost. Write it later: {next_command('sync', result.folder)}")


def _ui_command(uri: str) -> str:
    if uri.startswith("http"):  # for a browser, which asks for a password itself
        parts = urlsplit(uri)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
    beside = Path(sys.executable).with_name("mlflow")
    mlflow = "mlflow" if shutil.which("mlflow") else os.path.relpath(beside)
    if uri == DEFAULT_TRACKING_URI:
        return f"{mlflow} ui"
    return f"{mlflow} ui --backend-store-uri {shell_word(uri, 'MLFLOW_TRACKING_URI')}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
