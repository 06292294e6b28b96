"""The forms that a data set comes in, from the files to search, evaluation and lineage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.paths import EXPERIMENT_FILE
from visiontuner.tracking.page import write_page
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.inputs import Silent, load_data, with_absolute_paths
from visiontuner.workflow.lineage import trace, verify
from visiontuner.workflow.prepare import prepare
from visiontuner.workflow.run import open_journal, read_record
from visiontuner.workflow.submit import check_source
from visiontuner.workflow.tune import run_search


@pytest.fixture(autouse=True)
def _cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))


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


# Tables, through everything that knows a data set


def write_table(photos: Path) -> None:
    paths = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    rows = [f"{path},{path.split('/')[-2]}" for path in paths]
    (photos / "labels.csv").write_text("\n".join(["path,label", *rows]), "utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_a_table_gives_the_search_and_the_test_that_its_folders_give(
    tmp_path: Path,
    photos: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    write_table(photos)
    (photos / "classes.csv").write_text("class,becomes\nred,warm\n", "utf-8")
    small = {**small_search, "search": {**small_search["search"], "trials": 1}}
    found = {}
    for source in ("photos", "photos/labels.csv"):
        data = {"source": source, "classes": "classes.csv"}
        experiment = Experiment.parse({**small, "data": data})
        prepared = prepare(experiment)
        search = run_search(experiment, output=tmp_path / f"search{len(found)}")
        evaluation = evaluate_search(search.folder)
        assert evaluation.report.num_images == 4
        checks = {check.what: check.state for check in verify(trace(str(search.folder)))}
        assert checks["data digest"] == "ok"
        found[source] = (
            prepared.dataset.digest,
            prepared.dataset.class_names,
            {name: trial.best_value for name, trial in search.record.trials.items()},
            evaluation.report.metrics["nll"].value,
        )
        (dataset_input,) = _runs(search.record.search_id)[0].inputs.dataset_inputs
        assert dataset_input.dataset.name == "photos"
        assert dataset_input.dataset.digest == prepared.dataset.digest[:36]
        assert "2 classes, classes after classes.csv" in write_page(
            search.folder, figures={}
        ).read_text("utf-8")
    assert found["photos"] == found["photos/labels.csv"]
    assert found["photos"][1] == ("blue", "warm")

    (photos / "labels.csv").write_text("path,label\nred/0.png,red\nblue/0.png,blue\n", "utf-8")
    with pytest.raises(UserMistake):
        evaluate_search(tmp_path / "search1")


def _runs(search_id: str) -> list[Run]:
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"tags.`visiontuner.search_id` = '{search_id}' and tags.`visiontuner.kind` = 'search'"
    return list(client.search_runs(experiments, wanted))


def test_labels_are_found_in_the_folder_of_the_images_and_else_where_the_command_runs(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fix.csv").write_text("path,label\nred/0.png,\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.parse({"data": {"source": "photos", "labels": "fix.csv"}})
    assert len(_paths(experiment)) == 39
    resumable = with_absolute_paths(experiment)
    (photos / "fix.csv").write_text("path,label\nred/0.png,\nred/1.png,\n", "utf-8")
    assert len(_paths(experiment)) == 38
    assert with_absolute_paths(experiment).data.labels == "fix.csv"
    monkeypatch.chdir(photos)
    assert len(_paths(resumable)) == 39


def _paths(experiment: Experiment) -> list[str]:
    splits = load_data(experiment, Silent()).splits
    return [sample.path for samples in splits.values() for sample in samples]


def test_a_job_finds_its_table_in_the_channel(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(photos)
    monkeypatch.setenv("VISIONTUNER_CHANNEL", f"s3://bucket/photos/={photos}")
    found = [
        load_data(Experiment.parse({"data": {"source": source}}), Silent()).digest
        for source in ("s3://bucket/photos/labels.csv", "s3://bucket/photos/")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        ({"labels": "fix.csv"}, None),
        ({"source": "photos/labels.csv", "classes": "fix.csv"}, None),
        ({"source": "s3://bucket/photos", "labels": "fix.csv"}, None),
        ({"labels": "other.csv"}, "data.labels is other.csv, which a job cannot read"),
        ({"source": "s3://bucket/photos", "classes": "/x/fix.csv"}, "data.classes is /x/fix.csv"),
    ],
)
def test_a_job_is_refused_labels_that_do_not_lie_beside_its_images(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, str],
    refused: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(photos)
    for path in (photos / "fix.csv", tmp_path / "other.csv"):
        path.write_text("path,label\n", "utf-8")
    experiment = Experiment.parse({"data": {"source": "photos", **data}})
    upload = None if "s3:" in data.get("source", "") else "s3://bucket/photos"
    if refused is None:
        check_source(experiment, upload)
    else:
        with pytest.raises(UserMistake, match=refused):
            check_source(experiment, upload)


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
@pytest.mark.parametrize("layout", ["train.csv", "metadata.jsonl", "ultralytics"])
def test_each_layout_is_searched_evaluated_and_verified(
    tmp_path: Path,
    photos: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    rearrange(photos, layout)
    small = {**small_search, "search": {**small_search["search"], "trials": 1}}
    raw = {**small, "data": {"source": str(photos)}}
    result = run_search(Experiment.parse(raw), output=tmp_path / "search")
    assert result.record.started["data"]["counts"] == {"train": 32, "validation": 4, "test": 4}
    assert evaluate_search(result.folder).report.num_images == 4
    checks = {check.what: check.state for check in verify(trace(str(result.folder)))}
    assert checks["data digest"] == "ok"


def rearrange(photos: Path, layout: str) -> None:
    """The forty images as a layout has them."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(photos.glob("*/*.png")):
        label, number = path.parent.name, int(path.stem)
        split = "train" if layout == "train.csv" or number < 16 else ("val", "test")[number % 2]
        folder = photos / split / (label if layout == "ultralytics" else "")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"{label}{number}.png")
        rows.setdefault(split, []).append((f"{label}{number}.png", label))
    for name in ("red", "blue"):
        (photos / name).rmdir()
    if layout == "train.csv":
        lines = [f"{name.removesuffix('.png')},{label}" for name, label in rows["train"]]
        (photos / "train.csv").write_text("\n".join(["id,label", *lines]), "utf-8")
    if layout == "metadata.jsonl":
        for split, images in rows.items():
            lines = [json.dumps({"file_name": name, "label": label}) for name, label in images]
            (photos / split / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
