"""Every file in experiments/ loads, and teaches: a question first, a comment in every section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from visiontuner.experiment.schema import Experiment

FILES = sorted((Path(__file__).resolve().parent.parent / "experiments").glob("*.yaml"))


def test_the_four_experiments_are_there():
    names = {file.stem for file in FILES}
    assert names >= {"quickstart", "dog_breeds", "stanford_dogs", "flowers"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_loads_and_reads_back_the_same(file, tmp_path):
    experiment = Experiment.load(file)
    copy = tmp_path / "experiment.yaml"
    copy.write_text(experiment.to_yaml(), encoding="utf-8")
    assert Experiment.load(copy) == experiment


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_opens_with_its_question(file):
    comment = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))
    assert comment is not None
    assert "?" in comment[0].splitlines()[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_section_has_a_comment(file):
    text = file.read_text(encoding="utf-8")
    for name, body in re.findall(r"^(\w+):\n((?:[ \t]+.*\n)+)", text, flags=re.MULTILINE):
        assert "#" in body, name


def test_names_are_different():
    names = [Experiment.load(file).name for file in FILES]
    assert len(set(names)) == len(names)


def test_quickstart_needs_no_download(repository):
    quickstart = Experiment.load(repository / "experiments" / "quickstart.yaml")
    assert quickstart.data.source == "digits"
    assert quickstart.model.backbone == "efficientnet_lite0"
    assert (quickstart.search.trials, quickstart.training.epochs) == (16, 20)


def test_dog_breeds_starts_from_the_published_best(repository):
    dogs = Experiment.load(repository / "experiments" / "dog_breeds.yaml")
    assert dogs.search.first[0] == {"learning_rate": 0.003, "batch_size": 128}
    assert dogs.model.backbone == "resnet50"


def test_flowers_tries_every_combination(repository):
    flowers = Experiment.load(repository / "experiments" / "flowers.yaml")
    sizes = [len(domain.values) for domain in flowers.search.space.values()]
    assert flowers.search.algorithm == "grid"
    assert sizes[0] * sizes[1] == flowers.search.trials
