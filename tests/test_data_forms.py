"""The forms that a data set comes in, from the files to search, evaluation and lineage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.paths import EXPERIMENT_FILE
from visiontuner.workflow.inputs import Silent, load_data
from visiontuner.workflow.run import open_journal, read_record


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of twenty noisy images, reddish and bluish, in class folders."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(1)
    for name, colour in {"red": (200, 40, 40), "blue": (40, 40, 200)}.items():
        (root / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(rng.normal(colour, 30, (32, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_search_of_version_0_1_goes_on_with_its_split(tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "search"
    began = Experiment.parse({"data": {"source": str(photos), "split": "hashed"}})
    before = load_data(began, Silent())
    open_journal(folder, began, before, SearchRecord(), Silent()).close()
    _forget_split(folder / EXPERIMENT_FILE)

    experiment = Experiment.load(folder / EXPERIMENT_FILE)
    dataset = load_data(experiment, Silent())
    assert dataset.splits == before.splits
    assert read_record(folder, dataset).started["data"]["digest"] == before.digest
    now = load_data(Experiment.parse({"data": {"source": str(photos)}}), Silent())
    with pytest.raises(UserMistake, match="not those this search began with"):
        read_record(folder, now)


def _forget_split(path: Path) -> None:
    """The experiment file as version 0.1 wrote it."""
    raw = yaml.safe_load(path.read_text("utf-8"))
    raw["data"] = {
        k: raw["data"][k] for k in ("source", "sha256", "limit_per_class", "on_bad_image")
    }
    path.write_text(yaml.safe_dump(raw), "utf-8")
