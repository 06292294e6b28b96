"""Which code on which machine: what a result can be traced back to."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnxruntime",
    "ray",
    "optuna",
    "mlflow",
    "numpy",
    "pillow",
)


def describe_code() -> dict[str, Any]:
    """visiontuner's version, and commit and dirty state where it runs from a git checkout."""
    source = Path(__file__).resolve().parent
    version = metadata.version("visiontuner") if _installed("visiontuner") else "unknown"
    commit = _git(source, "rev-parse", "HEAD")
    changed = _git(source, "status", "--porcelain", "--", str(source)) if commit else None
    return {
        "version": version,
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
    }


def describe_machine() -> dict[str, Any]:
    """Host, processor count, platform and the versions that results depend on."""
    return {
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of one git command, or None without git or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
