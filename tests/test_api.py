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
from visiontuner.aws.account import ContainerImage
from visiontuner.aws.endpoint import DeploymentPlan
from visiontuner.journal import JournalWriter
from visiontuner.serving.lineage import Lineage
from visiontuner.serving.preflight import Check, PreflightReport
from visiontuner.serving.promotion import Promotion

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


class Begun(Exception):
    """A search would begin with this experiment."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"search.first": None}, None),
        ({"training.freeze_batch_norm": True, "model.train": "last_stage"}, True),
        ({"rules.stop_on": ["not_a_number"]}, ["not_a_number"]),
        ({"search.space.learning_rate": {"values": [1e-5]}}, {"values": [1e-5]}),
        ({"training.weight_decay": 1e-5}, 1e-5),
        ({"name": "null"}, "null"),
        (["name='null'"], "null"),
    ],
)
def test_settings_are_what_they_are_in_python(monkeypatch, settings, expected):
    def begin(experiment, **_):
        raise Begun(experiment)

    monkeypatch.setattr("visiontuner.workflow.tune.run_search", begin)
    with pytest.raises(Begun) as begun:
        vt.tune(settings=settings)
    value = begun.value.args[0].model_dump(mode="json")
    dotted = next(iter(settings)).split("=")[0]
    for part in dotted.split("."):
        value = value[part]
    assert value == expected


def write_search(folder, *, value=0.9):
    """A search of one trial, as its journal tells it; `value` None: a training without one."""
    journal = JournalWriter(folder, "s1")
    journal.append(
        "search_started",
        name=folder.name,
        experiment=vt.Experiment.parse({"name": "photos"}).model_dump(mode="json"),
    )
    configuration = {"learning_rate": 1e-3, "batch_size": 32}
    journal.append("trial_started", trial_id="t0001", attempt=1, configuration=configuration)
    metrics = {"validation_accuracy": 0.9, "validation_loss": 0.3}
    journal.append("epoch", trial_id="t0001", attempt=1, step=1, metrics=metrics)
    ended = {"best_epoch": 1, "best_value": value} if value is not None else {}
    journal.append("trial_ended", trial_id="t0001", attempt=1, state="completed", **ended)
    journal.append("search_ended", state="completed", best_trial="t0001")
    return vt.Search(folder)


def test_prepare_counts_the_images_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))
    draw(tmp_path / "photos", {"train": 4, "valid": 2, "test": 1})
    again = tmp_path / "photos" / "train" / "red" / "again.png"
    again.write_bytes((tmp_path / "photos" / "test" / "red" / "0.png").read_bytes())
    report = vt.prepare(tmp_path / "photos", progress=False)
    assert report.counts.loc["red"].to_dict() == {"train": 5, "validation": 2, "test": 1}
    assert report.counts.sum().to_dict() == {"train": 13, "validation": 6, "test": 3}
    assert list(report.findings.columns) == ["severity", "rule", "evidence", "advice"]
    assert "again.png" in " ".join(report.findings["evidence"])
    assert [path.name for path in report.files("test")] == ["0.png"] * 3
    assert all(path.is_file() for path in report.files("train"))
    assert "13 train, 6 validation, 3 test" in repr(report)
    assert len(repr(report).splitlines()) <= 3


def test_a_search_is_plotted_as_an_image(tmp_path):
    search = write_search(tmp_path / "search")
    for kind in ("curves", "map"):
        image = search.plot(kind)
        assert image.format == "PNG"
        assert (image.width, image.height) == (720, 306)  # 8 x 3.4 inches
    trained = write_search(tmp_path / "training", value=None)
    assert trained.plot().width == 720
    with pytest.raises(vt.VisiontunerError, match="There is no map"):
        trained.plot("map")


def test_what_python_returns_prints_in_three_lines(tmp_path):
    values = "(learning_rate 0.001, batch_size 32)"
    best = f"best t0001: validation_accuracy 0.9000 {values}"
    assert repr(write_search(tmp_path / "search")).splitlines()[1] == best
    plan = DeploymentPlan(
        name="dogs",
        model_uri="models:/dogs/2",
        region="eu-west-1",
        account="123456789012",
        caller="arn:aws:iam::123456789012:user/me",
        role="arn:aws:iam::123456789012:role/endpoints",
        container_image=ContainerImage(url="registry/pyfunc:3", digest="sha256:abc", platform=None),
        bucket="models",
        price_per_hour=0.115,
    )
    promotion = Promotion(
        name="dogs", challenger="2", champion="1", decision="kept", reason="No better beyond noise."
    )
    lineage = Lineage(
        model={"uri": "models:/dogs/2", "class_names": ["a"] * 133},
        trial={"trial_id": "t0003"},
        search={"name": "dogs-20261130"},
        data={"source": "photos", "digest": "ab" * 32},
    )
    preflight = PreflightReport(
        model="models:/dogs/2",
        checks=(
            Check(name="ping", status="ok", detail="4 ms"),
            Check(name="payload", status="error", detail="413"),
        ),
        p50_ms=12.3,
        p95_ms=15.0,
        p99_ms=20.0,
        images_per_second=107.0,
        memory_mb=210.0,
        recommendation="ml.m5.large is enough.",
    )
    assert list(preflight.table.columns) == ["name", "status", "detail"]
    for printed, words in (
        (plan, "1 x ml.m5.large; $0.115 an hour"),
        (promotion, "dogs/2: kept\nNo better"),
        (lineage, "trial t0003 of search dogs-20261130\ndata photos (abababababab), code ?"),
        (preflight, "failed: payload\n12 ms an image"),
        (Lineage(), "no registered model"),
    ):
        assert words in repr(printed)
        assert len(repr(printed).splitlines()) <= 3
        assert len(repr(printed)) < 300


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray", "own_place")
def test_the_examples_of_the_docs_run(tmp_path, repository):
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
    assert isinstance(names["data"], vt.DataReport)
    assert list(result.table.columns) == ["value", "low", "high"]
    assert result.plot("reliability").width == 720
    with pytest.raises(vt.VisiontunerError, match=r"there are: .*reliability"):
        result.plot("nothing")
    for printed in (search, result, search.best, final, vt.lineage(search), names["data"]):
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
