"""The forms that a data set comes in, from the files to search, evaluation and lineage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from visiontuner.data.dataset import ImageDataset
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.io.s3 import upload_folder
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
    kept = {
        "data": ("source", "sha256", "limit_per_class", "on_bad_image"),
        "model": ("backbone", "weights", "image_size", "train"),
    }
    raw |= {section: {k: raw[section][k] for k in keys} for section, keys in kept.items()}
    path.write_text(yaml.safe_dump(raw), "utf-8")


# Tables, through everything that knows a data set


def write_table(photos: Path) -> None:
    paths = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    rows = [f"{path},{path.split('/')[-2]}" for path in paths]
    (photos / "labels.csv").write_text("\n".join(["path,label", *rows]), "utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_a_class_map_reaches_search_evaluation_lineage_and_mlflow(
    tmp_path: Path,
    photos: Path,
    fast_search: dict[str, Any],
    new_database: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    write_table(photos)
    (photos / "classes.csv").write_text("class,becomes\nred,warm\n", "utf-8")
    data = {"source": "photos/labels.csv", "classes": "classes.csv"}
    search = run_search(Experiment.parse({**fast_search, "data": data}), output=tmp_path / "search")
    evaluation = evaluate_search(search.folder)
    assert evaluation.report.num_images == 4
    assert search.record.started["data"]["class_names"] == ["blue", "warm"]
    digest = search.record.started["data"]["digest"]
    (dataset_input,) = _runs(search.record.search_id)[0].inputs.dataset_inputs
    assert dataset_input.dataset.name == "photos"
    assert dataset_input.dataset.digest == digest[:36]
    page = write_page(search.folder, figures={}).read_text("utf-8")
    assert "2 classes, classes after classes.csv" in page

    (photos / "classes.csv").write_text("class,becomes\nred,hot\n", "utf-8")
    checks = {check.what: check.state for check in verify(trace(str(search.folder)))}
    assert checks["data digest"] == "differs"
    (photos / "labels.csv").write_text("path,label\nred/0.png,red\nblue/0.png,blue\n", "utf-8")
    with pytest.raises(UserMistake):
        evaluate_search(search.folder)


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


# Each layout, from S3 to lineage


LAYOUTS = {
    "folders": "",
    "ultralytics": "",
    "whole addresses": "/labels.csv",
    "labels.parquet": "/labels.parquet",
    "train.csv": "",
    "metadata.jsonl": "",
    "saved": "",
    "saved splits": "",
}
"""What is given as the source, behind the folder."""
SPLIT = ("ultralytics", "metadata.jsonl", "saved splits")
# These name their files otherwise, so that their digest is another one.
OTHER_NAMES = ("train.csv", "metadata.jsonl")


@pytest.fixture(scope="module")
def fast_search() -> dict[str, Any]:
    return {
        "name": "colours",
        "model": {"backbone": "resnet18", "weights": "none", "image_size": 32},
        "training": {"epochs": 2, "learning_rate": 0.03, "batch_size": 16},
        "search": {
            "trials": 1,
            "algorithm": "random",
            "baselines": False,
            "space": {"learning_rate": {"values": [0.03]}},
        },
    }


# What is known of the images, for each layout the same.
Images = set[tuple[str, str, str]]


def images_of(dataset: ImageDataset) -> Images:
    """Content, class and split of each."""
    return {
        (sample.digest, dataset.class_names[sample.label], split)
        for split, samples in dataset.splits.items()
        for sample in samples
    }


@pytest.fixture(scope="module")
def expected() -> dict[bool, tuple[Images, str]]:
    """Images and digest of class folders, by whether they are split: first of each."""
    return {}


@pytest.fixture
def on_s3(
    tmp_path: Path,
    photos: Path,
    moto: tuple[str, int],
    use_aws: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], tuple[str, ImageDataset]]:
    """Brings a layout to S3; gives the source there, and the data set that was looked at."""

    def bring(layout: str) -> tuple[str, ImageDataset]:
        bucket = layout.replace(" ", "-")
        boto3.client("s3").create_bucket(Bucket=bucket)
        uri = f"s3://{bucket}/{tmp_path.name}"
        rearrange(photos, layout, uri)
        source = f"{uri}{LAYOUTS[layout]}"
        if layout == "whole addresses":  # no paths here
            upload_folder(photos, uri)
            prepared = prepare(Experiment.parse({"data": {"source": source}}))
        else:
            here = Experiment.parse({"data": {"source": f"{photos}{LAYOUTS[layout]}"}})
            prepared = prepare(here, upload=uri)
        assert [f for f in prepared.dataset.findings if f.severity != "info"] == []
        return source, prepared.dataset

    monkeypatch.chdir(tmp_path)
    use_aws(f"http://{moto[0]}:{moto[1]}")
    return bring


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_the_same_images_here_and_on_s3(
    layout: str,
    on_s3: Callable[[str], tuple[str, ImageDataset]],
    expected: dict[bool, tuple[Images, str]],
) -> None:
    source, here = on_s3(layout)
    there = load_data(Experiment.parse({"data": {"source": source}}), Silent())
    assert there.digest == here.digest
    assert images_of(there) == images_of(here)
    images, digest = expected.setdefault(layout in SPLIT, (images_of(here), here.digest))
    assert images_of(here) == images
    assert (here.digest == digest) == (layout not in OTHER_NAMES)


@pytest.mark.usefixtures("running_ray")
@pytest.mark.parametrize("layout", ["folders", "saved splits"])
def test_a_layout_on_s3_is_searched_evaluated_and_verified(
    layout: str,
    on_s3: Callable[[str], tuple[str, ImageDataset]],
    fast_search: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    source, prepared = on_s3(layout)
    there = Experiment.parse({**fast_search, "data": {"source": source}})
    search = run_search(there, output=Path("search").absolute())
    evaluation = evaluate_search(search.folder)
    started = search.record.started["data"]
    assert started["digest"] == prepared.digest
    assert started["counts"] == {"train": 32, "validation": 4, "test": 4}
    assert evaluation.report.num_images == 4
    checks = {check.what: check.state for check in verify(trace(str(search.folder)))}
    assert checks["data digest"] == checks["reference images"] == "ok"


def rearrange(photos: Path, layout: str, uri: str) -> None:
    """The forty images as a layout has them; from class folders `red` and `blue`."""
    if layout == "folders":
        return
    rows = [
        (path.relative_to(photos).as_posix(), path.parent.name)
        for path in sorted(photos.glob("*/*.png"))
    ]
    if layout == "whole addresses":
        lines = [f"{uri}/{path},{label}" for path, label in rows]
        (photos / "labels.csv").write_text("\n".join(["path,label", *lines]), "utf-8")
    elif layout == "labels.parquet":
        columns = dict(zip(("path", "label"), map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), photos / "labels.parquet")
    elif layout == "saved":
        save_rows(photos, photos, rows)
        remove_classes(photos)
    else:
        rearrange_splits(photos, layout, rows)


def remove_classes(photos: Path) -> None:
    for name in ("red", "blue"):
        shutil.rmtree(photos / name)


def rearrange_splits(photos: Path, layout: str, rows: list[tuple[str, str]]) -> None:
    splits: dict[str, list[tuple[str, str]]] = {}
    for path, label in rows:
        number = int(Path(path).stem)
        split = "train" if layout == "train.csv" or number < 16 else ("val", "test")[number % 2]
        splits.setdefault(split, []).append((path, label))
    if layout == "saved splits":
        for split, part in splits.items():
            save_rows(photos / split, photos, part)
        (photos / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for split, part in splits.items():
        for path, _ in part if layout != "saved splits" else ():
            name = path if layout == "ultralytics" else path.replace("/", "-")
            target = photos / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / path, target)
        if layout in ("train.csv", "metadata.jsonl"):
            write_split_table(photos, layout, split, part)
    remove_classes(photos)


def write_split_table(photos: Path, layout: str, split: str, part: list[tuple[str, str]]) -> None:
    named = [(path.replace("/", "-"), label) for path, label in part]
    if layout == "train.csv":
        lines = ["id,label", *(f"{name.removesuffix('.png')},{label}" for name, label in named)]
        (photos / "train.csv").write_text("\n".join(lines), "utf-8")
    else:
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in named]
        (photos / split / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def save_rows(folder: Path, photos: Path, rows: list[tuple[str, str]]) -> None:
    """As `datasets` saves images and labels."""
    folder.mkdir(exist_ok=True)
    names = ["blue", "red"]
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = [{"bytes": (photos / path).read_bytes(), "path": Path(path).name} for path, _ in rows]
    labels = [names.index(label) for _, label in rows]
    table = pyarrow.table({"image": pyarrow.array(images, image), "label": labels})
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
