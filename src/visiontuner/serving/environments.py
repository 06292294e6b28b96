"""A clean Python environment from a model's pinned requirements, built once for each set."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock

from visiontuner.errors import ClassifierError, ServingError

_TIMEOUT_SECONDS = 1800
_COMPLETE = ".complete"  # written last, with the seconds it took


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a model is served.

    Args:
        python: its interpreter.
        install_seconds: what installing took when it was built; None if it is this process's own.
        size_mb: of its packages, in 10^6 bytes; None likewise.
    """

    python: Path
    install_seconds: float | None = None
    size_mb: float | None = None


def local_environment() -> Environment:
    """The one that this process runs in."""
    return Environment(python=Path(sys.executable))


def clean_environment(model: Path, cache: Path) -> Environment:
    """One with exactly what a model's `requirements.txt` pins, from the cache if it is there.

    Args:
        model: an MLflow model folder.
        cache: environments are kept below it.

    Raises:
        ClassifierError: the model does not say what it needs.
        ServingError: it cannot be installed.
    """
    requirements, version = wanted_by(model)
    wanted = "\n".join([version, platform.platform(), *sorted(requirements.split("\n"))])
    folder = cache / "environments" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _COMPLETE).is_file():
            _build(folder, model / "requirements.txt", version)
        seconds = float((folder / _COMPLETE).read_text(encoding="utf-8"))
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    return Environment(
        python=folder / "bin" / "python", install_seconds=seconds, size_mb=size / 1e6
    )


def wanted_by(model: Path) -> tuple[str, str]:
    """The lines of a model's requirements, and its Python's version as `3.11`.

    Raises:
        ClassifierError: the model does not say what it needs.
    """
    try:
        requirements = (model / "requirements.txt").read_text(encoding="utf-8").strip()
        raw = yaml.safe_load((model / "python_env.yaml").read_text(encoding="utf-8"))
        major, minor = str(raw["python"]).split(".")[:2]
        return requirements, f"{int(major)}.{int(minor)}"
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError):
        raise ClassifierError(
            f"{model} does not say what it needs (requirements.txt, python_env.yaml); "
            "is it an MLflow model?"
        ) from None


def _build(folder: Path, requirements: Path, version: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    own = version == f"{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = sys.executable if own else version
    python = folder / "bin" / "python"
    uv = _find_uv()
    began = time.monotonic()
    if uv:
        _run([uv, "venv", "--quiet", "--python", interpreter, str(folder)])
        _run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(requirements)])
    elif own:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
    else:
        raise ServingError(
            f"The model was made with Python {version}; `pip install uv` to serve it from here."
        )
    (folder / _COMPLETE).write_text(f"{time.monotonic() - began:.1f}", encoding="utf-8")


def _find_uv() -> str | None:
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.is_file() else None)


def _run(command: list[str]) -> None:
    foreign = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServingError(f"Installing took over {_TIMEOUT_SECONDS} s: {command[0]}.") from None
    if done.returncode != 0:
        last = " ".join(done.stderr.split())[-300:]
        raise ServingError(
            f"The model's requirements cannot be installed: {last} "
            "`--env-manager local` serves it in this environment."
        )
