"""What Python calls: the public names, and the examples of docs/python.md as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import visiontuner as vt

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def draw(root: Path, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 60, (32, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def test_every_public_name_is_there():
    for name in vt.__all__:
        assert getattr(vt, name) is not None
    assert set(vt.__all__) <= set(dir(vt))
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        vt.tunes  # noqa: B018


def test_the_import_alone_brings_nothing_else():
    code = (
        "import json, sys, visiontuner; print(json.dumps([n.split('.')[0] for n in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "click", "pydantic"} & set(json.loads(run.stdout))


def test_a_mistake_is_one_line_of_a_public_error(tmp_path):
    with pytest.raises(vt.VisiontunerError, match="nowhere"):
        vt.tune(tmp_path / "nowhere", progress=False)
    with pytest.raises(vt.VisiontunerError, match=r"Experiment\.load"):
        vt.tune("dogs.yaml")
    with pytest.raises(vt.VisiontunerError, match="no search folder"):
        vt.Search(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_of_the_docs_run(tmp_path, monkeypatch, repository, shared_cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    # MLflow keeps a store for each URI: a relative one would be another test's.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    draw(Path("photos"), {"train": 10, "valid": 6, "test": 6})
    for name in ("a.jpg", "b.jpg"):
        Image.open("photos/test/red/0.png").save(name)
    text = (repository / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)

    search, result, final = names["search"], names["result"], names["final"]
    assert isinstance(search, vt.Search)
    assert isinstance(result, vt.Evaluation)
    assert isinstance(final, vt.Search)
    assert len(search.trials) == len(search.record.trials) == 4
    assert isinstance(search.trials, pd.DataFrame)
    assert 0 <= result.interval[0] <= result.accuracy <= result.interval[1] <= 1
    for printed in (search, result, search.best, final):
        assert len(repr(printed).splitlines()) <= 3
        assert len(repr(printed)) < 600
    assert vt.Search(search.folder).best == search.best

    path = tmp_path / "photos" / "test" / "blue" / "0.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        ways = [path, str(path), path.read_bytes(), image, pixels]
        answers = search.classifier.predict(ways)
    assert len({answer.probability for answer in answers}) == 1
    assert {answer.label for answer in answers} == {"blue"}
    assert answers[0].confident is not None
