"""The serving image is built as SageMaker takes it; a program stands for the Docker engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from visiontuner.errors import ServingError
from visiontuner.serving.preflight import build_container_image

ENGINE = """#!/bin/sh
case "$1 $2" in
  "buildx version") exit $(test -e {folder}/buildx && echo 0 || echo 1);;
  "images --quiet") grep -l -- "--tag $3" {folder}/builds 2>/dev/null; exit 0;;
esac
for context; do :; done
echo "$BUILDX_NO_DEFAULT_ATTESTATIONS" "$@" >> {folder}/builds
cp "$context/Dockerfile" {folder}/Dockerfile
test -e {folder}/fails && echo 'ERROR: no such base image' && exit 1
exit 0
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the engine looks for `buildx` and `fails`, and leaves what it was told."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(ENGINE.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def builds(engine: Path) -> list[str]:
    return (engine / "builds").read_text().splitlines()


def test_buildx_makes_neither_oci_manifest_nor_attestation_and_logs_are_links(
    engine: Path, colour_model: Path
) -> None:
    (engine / "buildx").touch()
    notes: list[str] = []
    image = build_container_image(colour_model, note=notes.append)
    (build,) = builds(engine)
    assert " buildx build --provenance=false --sbom=false " in build
    assert "--output type=docker,oci-mediatypes=false --platform linux/amd64" in build
    assert f"--tag {image} " in build
    steps = (engine / "Dockerfile").read_text().splitlines()
    installs = next(n for n, step in enumerate(steps) if "nginx" in step and "apt-get" in step)
    (links,) = (n for n, step in enumerate(steps) if "/var/log/nginx/access.log" in step)
    assert installs < links
    assert "ln -sf /dev/stdout /var/log/nginx/access.log" in steps[links]
    assert "ln -sf /dev/stderr /var/log/nginx/error.log" in steps[links]

    assert build_container_image(colour_model, note=notes.append) == image
    assert len(builds(engine)) == len(notes) == 1  # kept for the next time


def test_without_buildx_the_engine_builds_without_attestations(
    engine: Path, colour_model: Path
) -> None:
    assert build_container_image(colour_model, "dogs-serving:3") == "dogs-serving:3"
    assert builds(engine)[0].startswith("1 build --platform linux/amd64 --tag dogs-serving:3 ")


def test_a_build_that_fails_is_said_in_one_line(engine: Path, colour_model: Path) -> None:
    (engine / "fails").touch()
    with pytest.raises(ServingError, match="dogs:3 cannot be built: ERROR: no such base image"):
        build_container_image(colour_model, "dogs:3")
