"""Names that earlier versions wrote, where this one says "image": they are still read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from visiontuner.data.arrays import store_folder
from visiontuner.data.dataset import fetch_source, load_dataset
from visiontuner.data.images import Preprocessing
from visiontuner.diagnostics.history import Recording, StepRecord
from visiontuner.evaluation.report import EvaluationReport, evaluate_predictions, image_count
from visiontuner.journal import Finding, JournalWriter, SearchRecord, read_events
from visiontuner.model.classifier import reference_entries


def test_a_journal_with_pictures_ready_and_a_rule_on_pictures(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, "s")
    writer.append("pictures_ready", seconds=2.5, folder="f")
    writer.append("finding", rule="unreadable_pictures", severity="info", evidence="", advice="")
    writer.close()
    ready, finding = read_events(tmp_path).events
    assert (ready["event"], finding["rule"]) == ("images_ready", "unreadable_images")
    assert SearchRecord.load(tmp_path).preparation_seconds == 2.5


def test_a_finding_in_the_store_of_an_old_cache() -> None:
    raw = {"rule": "unreadable_picture", "severity": "warning", "evidence": "", "advice": ""}
    assert Finding(**raw).rule == "unreadable_image"  # type: ignore[arg-type]


def test_an_evaluation_with_num_pictures() -> None:
    logits, labels = np.eye(2, dtype=np.float32), np.arange(2)
    report = evaluate_predictions(
        logits=logits, labels=labels, class_names=("a", "b"), temperature=1.0, threshold=None
    )
    raw = report.to_dict()
    raw["num_pictures"] = raw.pop("num_images")
    assert image_count(raw) == 2
    assert EvaluationReport.from_dict(raw).num_images == 2


def test_a_recording_with_pictures(tmp_path: Path) -> None:
    numbers = np.array([1, 2])
    steps = StepRecord(
        steps=numbers,
        seconds=np.ones((2, 6), np.float32),
        images=np.array([8, 4]),
        startup_seconds=1.0,
        device="cpu",
        workers=0,
    )
    path = tmp_path / "recording.npz"
    Recording(steps=steps).save(path)
    with np.load(path) as held:
        arrays = {name.replace("image", "picture"): held[name] for name in held.files}
    np.savez(path, **arrays)
    assert "steps/pictures" in arrays
    loaded = Recording.load(path).steps
    assert loaded is not None
    assert loaded.images.tolist() == [8, 4]


def test_a_reference_with_pictures() -> None:
    entry = {"image": "…", "probabilities": [1.0]}
    assert reference_entries(json.loads(json.dumps({"pictures": [entry]}))) == [entry]


def test_images_that_an_earlier_version_decoded_are_not_decoded_again(
    tmp_path: Path, preprocessing: Preprocessing
) -> None:
    dataset = load_dataset(fetch_source("digits", cache=tmp_path), cache=tmp_path)
    place = store_folder(dataset, preprocessing, tmp_path, augmented=False)
    assert place.parent == tmp_path / "images"
    before = tmp_path / "pictures" / place.name
    before.mkdir(parents=True)
    assert store_folder(dataset, preprocessing, tmp_path, augmented=False) == before


@pytest.fixture
def preprocessing() -> Preprocessing:
    return Preprocessing(
        resize=8, size=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"
    )
