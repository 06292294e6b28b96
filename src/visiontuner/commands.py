"""The next step as a command that can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from visiontuner.text import shell_word

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
NO_TRACKING = "none"
"""As MLFLOW_TRACKING_URI of a search: its journal alone; `sync` or `attach` write it elsewhere."""

# They neither read nor write MLflow.
_WITHOUT_STORE = ("doctor", "endpoints", "jobs", "prepare", "query", "stop", "undeploy")


def next_command(
    verb: str, *arguments: str | Path, flags: str = "", store: str | None = None
) -> str:
    """A `visiontuner` command with its subject, and the MLflow store if it is not the default.

    Args:
        arguments: as they are; they are quoted for the shell here. A subject that nobody knows is a
            word in capitals, such as FOLDER: without one, a command would take the newest search.
        flags: which AWS account and region, as `Aws.flags` has them.
        store: the MLflow store; the one of this process if None.
    """
    command = shlex.join(["visiontuner", verb, *map(str, arguments)]) + flags
    uri = os.environ.get("MLFLOW_TRACKING_URI") if store is None else store
    # A search without tracking goes on without it; anything else needs a store.
    silent = uri == NO_TRACKING and verb not in ("tune", "train")
    if not uri or uri == DEFAULT_TRACKING_URI or silent or verb in _WITHOUT_STORE:
        return command
    return f"MLFLOW_TRACKING_URI={shell_word(uri, 'MLFLOW_TRACKING_URI')} {command}"
