"""Rules that are to stop trials and have nothing to look at."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visiontuner.data.dataset import load_dataset
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.run import open_journal


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("sections", "blind"),
    [
        ({"rules": {"stop_on": ["overfit", "all_zero", "dead_relu"]}}, "all_zero, dead_relu"),
        ({"rules": {"stop_on": ["overfit"]}}, None),
        ({"rules": {"stop_on": ["all_zero"]}, "training": {"record_every_steps": 5}}, None),
        ({"rules": {"stop_on": ["all_zero"]}, "model": {"train": "all"}}, None),
        (
            {
                "rules": {"stop_on": ["all_zero"]},
                "model": {"train": "all"},
                "training": {"record_every_steps": 0},
            },
            "all_zero",
        ),
    ],
    ids=["a head", "on curves", "a recorded head", "a network", "one that is not recorded"],
)
def test_a_search_says_which_rules_will_stop_nothing(
    tmp_path: Path, sections: dict[str, Any], blind: str | None
) -> None:
    for split, name in [(s, n) for s in ("train", "valid") for n in "ab"]:
        path = tmp_path / "images" / split / name / f"{split}{name}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4), (len(split), ord(name), 0)).save(path)
    dataset = load_dataset(tmp_path / "images", cache=tmp_path / "cache")
    experiment = Experiment.parse({"name": "x", "data": {"source": str(dataset.root)}, **sections})
    observer = Notes()
    open_journal(tmp_path / "search", experiment, dataset, SearchRecord(), observer).close()
    said = [note for note in observer.notes if "stop_on" in note]
    if blind is None:
        assert said == []
    else:
        (note,) = said
        assert note.startswith(f"warning: rules.stop_on: {blind} will stop no trial")
