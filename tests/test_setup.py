"""The set-up files agree with each other and with the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from visiontuner.experiment.schema import QUICKSTART, Experiment

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
ENTRY_POINTS = MLPROJECT["entry_points"]


def lines_of(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pins() -> dict[str, str]:
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines_of("constraints.txt"))
    }


def ranges() -> list[Requirement]:
    wanted = lines_of("requirements.txt")
    wanted += PYPROJECT["project"]["optional-dependencies"]["dev"]
    return [Requirement(text) for text in wanted]


# One list, one exact set.


def test_pyproject_reads_the_one_list():
    assert "dependencies" in PYPROJECT["project"]["dynamic"]
    dynamic = PYPROJECT["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"] == {"file": ["requirements.txt"]}


def test_conda_reads_the_same_lists_and_installs_no_copy_of_the_package():
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
    (pip,) = [item["pip"] for item in conda["dependencies"] if isinstance(item, dict)]
    assert pip == ["-r requirements.txt", "-c constraints.txt"]
    (python,) = [item for item in conda["dependencies"] if str(item).startswith("python=")]
    wanted = Requirement("python" + PYPROJECT["project"]["requires-python"])
    assert python.removeprefix("python=") in wanted.specifier


@pytest.mark.parametrize("requirement", ranges(), ids=lambda requirement: requirement.name)
def test_every_requirement_has_a_pin_inside_its_range(requirement):
    name = canonicalize_name(requirement.name)
    assert name in pins()
    assert pins()[name] in requirement.specifier


def test_every_constraint_is_exact():
    for line in lines_of("constraints.txt"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line
    assert len(pins()) == len(lines_of("constraints.txt"))


def test_torch_and_torchvision_are_pinned_as_a_pair():
    from visiontuner.workflow.doctor import pair_mismatch

    assert pair_mismatch(pins()["torch"], pins()["torchvision"]) is None


# MLproject and the command line.


def commands() -> dict[str, click.Command]:
    from visiontuner.cli.main import main

    assert isinstance(main, click.Group)
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def flags(command: click.Command) -> set[str]:
    return {
        name.removeprefix("--")
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }


def arguments(command: click.Command) -> set[str]:
    return {p.name or "" for p in command.params if isinstance(p, click.Argument)}


def command_of(entry_point: str) -> str:
    return {"main": "tune", "tune_sagemaker": "tune"}.get(entry_point, entry_point)


def test_main_is_tune():
    assert ENTRY_POINTS["main"] == ENTRY_POINTS["tune"]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_entry_point_is_a_subcommand_with_these_flags(entry_point):
    command = command_of(entry_point)
    assert command in commands()
    known = flags(commands()[command]) | arguments(commands()[command])
    assert set(ENTRY_POINTS[entry_point]["parameters"]) <= known


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_command_runs_this_tree_and_passes_every_parameter(entry_point):
    command = ENTRY_POINTS[entry_point]["command"]
    name = command_of(entry_point)
    assert command.startswith(f'PYTHONPATH="$PWD/src" python -m visiontuner {name} ')
    passed = re.findall(r"(?:--([\w-]+) )?\{([\w-]+)\}", command)
    for flag, value in passed:
        assert flag == value or (not flag and value in arguments(commands()[name]))
    assert [value for _, value in passed] == list(ENTRY_POINTS[entry_point]["parameters"])


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_every_parameter_has_a_default_in_words(entry_point):
    for name, parameter in ENTRY_POINTS[entry_point]["parameters"].items():
        # MLflow passes an empty default as '', which no flag could tell from a value.
        assert parameter["default"], name


def test_default_experiment_is_the_quickstart():
    """`auto` is what an installed package says as well, where there is no experiments folder."""
    for entry_point in ENTRY_POINTS.values():
        parameters = entry_point["parameters"]
        assert parameters.get("experiment", {"default": "auto"})["default"] == "auto"
    assert Experiment.parse(QUICKSTART) == Experiment.load(
        ROOT / "experiments" / "quickstart.yaml", ["search.first=null"]
    )


# make.

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def copy(tmp_path):
    """The set-up files in a folder with a space in its name."""
    folder = tmp_path / "my project"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_make
def test_make_alone_lists_the_targets(copy):
    done = make(copy)
    assert done.returncode == 0
    targets = ("install", "tune", "test", "test-container", "serving-image", "aws-smoke")
    for target in (*targets, "ui", "lint", "bench", "clean"):
        assert f"make {target} " in done.stdout


@needs_make
@pytest.mark.parametrize("target", ["install", "tune", "test"])
def test_old_python_ends_in_one_clear_line(copy, tmp_path, target):
    old = program(
        tmp_path / "bin dir" / "python3",
        'case "$1" in --version) echo "Python 3.9.1";; *) exit 1;; esac',
    )
    done = make(copy, target, f"PYTHON={old}")
    assert done.returncode != 0
    first = done.stderr.splitlines()[0]
    assert "needs Python 3.11 or newer" in first
    assert "Python 3.9.1" in first
    assert "make install PYTHON=" in first
    assert not (copy / ".venv").exists()


@needs_make
def test_missing_python_ends_in_one_clear_line(copy):
    done = make(copy, "install", "PYTHON=python3.99")
    assert "needs Python 3.11 or newer" in done.stderr.splitlines()[0]


@needs_make
def test_python_without_ensurepip_ends_in_one_clear_line(copy, tmp_path):
    half = program(
        tmp_path / "half" / "python3",
        'if [ "$1" = -m ]; then mkdir -p .venv/bin; ln -s "$0" .venv/bin/python; exit 1; fi',
    )
    done = make(copy, "install", f"PYTHON={half}", PATH="/usr/bin:/bin")
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr
    assert not (copy / ".venv").exists()  # so that the next `make` does not take it for whole


@needs_make
def test_second_install_does_nothing(copy):
    log = copy / "log"
    program(copy / ".venv" / "bin" / "python", f'echo "$@" >> "{log}"')
    path = f"{copy}/none:/usr/bin:/bin"  # no uv
    assert make(copy, "install", f"PYTHON={sys.executable}", PATH=path).returncode == 0
    installed = log.read_text()
    assert "-c constraints.txt -e .[dev]" in installed
    assert make(copy, "install", f"PYTHON={sys.executable}", PATH=path).returncode == 0
    assert log.read_text() == installed
    later = (copy / ".venv" / ".installed").stat().st_mtime + 1  # whatever the clock's steps
    os.utime(copy / "requirements.txt", (later, later))
    assert make(copy, "install", f"PYTHON={sys.executable}", PATH=path).returncode == 0
    assert len(log.read_text()) > len(installed)


@needs_make
def test_a_serving_image_without_a_docker_engine_is_one_clear_line(copy, tmp_path):
    program(copy / ".venv" / "bin" / "python", "exit 0")
    program(tmp_path / "bin" / "docker", "exit 1")
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    done = make(copy, "serving-image", "MODEL=models:/x/1", f"PYTHON={sys.executable}", PATH=path)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("No Docker engine runs here")


@needs_make
def test_clean_keeps_what_the_user_made(copy):
    (copy / "searches" / "digits").mkdir(parents=True)
    (copy / "mlflow.db").write_text("runs")
    (copy / "src" / "visiontuner" / "__pycache__").mkdir(parents=True)
    (copy / ".venv").mkdir()
    (copy / "tests").mkdir()
    done = make(copy, "clean")
    assert done.returncode == 0, done.stderr
    assert (copy / "searches" / "digits").is_dir()
    assert (copy / "mlflow.db").read_text() == "runs"
    assert not (copy / ".venv").exists()
    assert not (copy / "src" / "visiontuner" / "__pycache__").exists()


def test_license_is_the_one_pyproject_names():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
