"""A wheel holds the whole package: it runs in an empty folder, without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "src", "pyproject.toml", "requirements.txt", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    source = folder / "source"  # a build leaves files beside what it builds
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("visiontuner-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    package = ROOT / "src" / "visiontuner"
    theirs = {path.relative_to(installed) for path in _files(installed)}
    assert {path.relative_to(package.parent) for path in _files(package)} <= theirs


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder_and_packs_itself_for_a_job(
    installed: Path, tmp_path: Path, shared_cache: Path
) -> None:
    program = (
        "from pathlib import Path\n"
        "import visiontuner\n"
        "from visiontuner.aws.request import JobFile, write_source\n"
        "print(visiontuner.__file__)\n"
        "print(write_source(Path.cwd(), experiment='', job=JobFile(token='0')))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "VISIONTUNER_CACHE": str(shared_cache),
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',  # one worker is enough
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, source = map(Path, done.stdout.splitlines())
    assert package.is_relative_to(installed)
    with tarfile.open(source) as archive:
        packed = {Path(name) for name in archive.getnames()}
    assert {path.relative_to(ROOT / "src") for path in _files(ROOT / "src/visiontuner")} <= packed
    searched = subprocess.run(
        [
            sys.executable,
            "-m",
            "visiontuner",
            "tune",
            "--trials",
            "2",
            "--set",
            "training.epochs=2",
            "--set",
            "data.limit_per_class=10",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert searched.returncode == 0, searched.stderr
    (report,) = tmp_path.glob("searches/*/report.html")
    assert report.stat().st_size > 0


def _files(package: Path) -> set[Path]:
    found = (path for path in package.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}
