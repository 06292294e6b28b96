"""What is wrong with the images, as a search or a training says it before anything is trained."""

import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontuner.data.dataset import ImageDataset, load_dataset
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord, read_events
from visiontuner.tracking.page import write_page
from visiontuner.workflow.diagnose import diagnose
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.run import open_journal, read_record


class Notes(Silent):
    """Remembers what a person would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    """Two classes, spelt in two ways: four classes, two of which cannot be learned."""
    root, seeds = tmp_path / "my photos", count()
    for split, names in {"train": ("Cat", "dog"), "valid": ("cat", "Dog")}.items():
        for name in names:
            for number in range(3):
                draw(root / split / name / f"{number}.png", seed=next(seeds))
    return load_dataset(root, cache=tmp_path / "cache")


@pytest.fixture
def experiment(dataset: ImageDataset) -> Experiment:
    return Experiment.parse(
        {"name": "pets", "data": {"source": str(dataset.root)}, "training": {"epochs": 40}}
    )


UNLEARNABLE = "error: 2 (Dog, …): classes that cannot be learned."


def begin(folder: Path, experiment: Experiment, dataset: ImageDataset) -> list[str]:
    observer = Notes()
    record = read_record(folder, dataset)
    open_journal(folder, experiment, dataset, record, observer).close()
    return observer.notes


def test_a_search_says_what_will_spoil_it_errors_first(
    tmp_path: Path, experiment: Experiment, dataset: ImageDataset
) -> None:
    said = begin(tmp_path / "s", experiment, dataset)
    assert said[1:] == [
        UNLEARNABLE,
        "warning: 2 (Cat, …): no images in validation.",
        "warning: 2 (Cat and cat, …): names that differ in capitals, blanks or invisible "
        "characters alone are classes of their own.",
        f"All findings, and what to do: visiontuner prepare --data '{tmp_path / 'my photos'}'",
    ]


def test_an_image_that_is_tested_on_and_trained_on_is_said(
    tmp_path: Path, dataset: ImageDataset, experiment: Experiment
) -> None:
    shutil.copy(dataset.root / "train/Cat/1.png", dataset.root / "valid/cat/copy.png")
    changed = load_dataset(dataset.root, cache=tmp_path / "cache")
    assert any(
        "the same image in two splits" in note
        for note in begin(tmp_path / "s", experiment, changed)
    )


def test_images_that_are_left_out_are_said_journalled_and_reported(
    tmp_path: Path, dataset: ImageDataset, experiment: Experiment
) -> None:
    for number in range(3):
        draw(dataset.root / "test" / f"{number}.png", seed=900 + number)
    (dataset.root / "train" / "dog" / "x.jxl").write_bytes(b"\xff\x0a")
    changed = load_dataset(dataset.root, cache=tmp_path / "cache")
    expected = [
        "1 (train/dog/x.jxl): images left out: 1 JPEG XL, not read here",
        "3 (test/0.png, …): images left out: 3 PNG, in no class folder",
        "test holds no images in class folders: there is nothing to test on",
    ]
    said = begin(tmp_path / "s", experiment, changed)
    assert [f"warning: {text}." for text in expected] == said[2:5]
    kept = [e["evidence"] for e in read_events(tmp_path / "s").events if e["event"] == "finding"]
    assert [text for text in kept if text in expected] == expected
    page = write_page(tmp_path / "s", figures={}).read_text(encoding="utf-8")
    assert all(text in page for text in expected)


def test_trainings_of_few_steps_are_said_journalled_and_reported(
    tmp_path: Path, dataset: ImageDataset
) -> None:
    raw = {"data": {"source": str(dataset.root)}, "search": {"space": {"dropout": {"values": [0]}}}}
    said = begin(tmp_path / "s", Experiment.parse(raw), dataset)
    assert said[-1] == (
        "warning: with batch size 128 an epoch of 6 training images is 1 step, and a training 20. "
        "Search smaller batches, or set training.epochs to 40 or more."
    )
    kept = [e["rule"] for e in read_events(tmp_path / "s").events if e["event"] == "finding"]
    assert kept[-1] == "few_steps"
    page = write_page(tmp_path / "s", figures={}).read_text(encoding="utf-8")
    assert "an epoch of 6 training images is 1 step" in page


def test_a_resumed_search_says_it_again_and_journals_it_once(
    tmp_path: Path, experiment: Experiment, dataset: ImageDataset
) -> None:
    begin(tmp_path / "s", experiment, dataset)
    assert UNLEARNABLE in begin(tmp_path / "s", experiment, dataset)
    kept = [e["rule"] for e in read_events(tmp_path / "s").events if e["event"] == "finding"]
    assert kept == ["classes_without_training_images", "missing_classes", "class_names_alike"]


def test_report_and_diagnosis_say_it(
    tmp_path: Path, experiment: Experiment, dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    begin(tmp_path / "s", experiment, dataset)
    page = write_page(tmp_path / "s", figures={}).read_text(encoding="utf-8")
    assert "classes that cannot be learned" in page
    diagnosis = diagnose(str(tmp_path / "s"))
    assert [finding.severity for finding in diagnosis.data] == ["error", "warning", "warning"]
    assert SearchRecord.load(tmp_path / "s").trials == {}
