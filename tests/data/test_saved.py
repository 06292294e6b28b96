"""Data sets that Hugging Face's `datasets` saved: the data set of the same images in class folders.

The folders here are written by pyarrow as `datasets` 5.2 writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image

from visiontuner.data.dataset import load_dataset
from visiontuner.errors import DataError

NAMES = ("cat", "cow", "dog")
IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders cat, cow and dog with twenty images each."""
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(6)
    for name in NAMES:
        (root / name).mkdir()
        for number in range(20):
            levels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / name / f"{number:02}.png")
    return root


def rows_of(folders: Path, keep: Callable[[int], bool] = lambda _: True) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "label": NAMES.index(path.parent.name),
        }
        for path in sorted(folders.glob("*/*.png"))
        if keep(int(path.stem))
    ]


FEATURES: dict[str, Any] = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": list(NAMES)},
}


def save(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    features: Mapping[str, Any] = FEATURES,
    image: pyarrow.DataType = IMAGE,
    shards: int = 2,
) -> Path:
    """Write rows as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    fields = [("image", image), *((name, None) for name in rows[0] if name != "image")]
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
    size = -(-len(rows) // shards)
    for number, name in enumerate(names):
        part = rows[number * size : (number + 1) * size]
        arrays = [pyarrow.array([row[key] for row in part], kind) for key, kind in fields]
        table = pyarrow.table(arrays, names=[key for key, _ in fields])
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}), "utf-8")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
    return folder


def rules(dataset: Any) -> dict[str, str]:
    return {finding.rule: finding.evidence for finding in dataset.findings}


def test_a_saved_data_set_is_that_of_the_same_images_in_class_folders(tmp_path, folders, cache):
    saved = save(tmp_path / "photos", rows_of(folders)[::-1])
    dataset, same = (load_dataset(root, cache=cache) for root in (saved, folders))
    assert dataset.digest == same.digest
    assert dataset.splits == same.splits
    assert dataset.findings == ()
    assert dataset.saved_in == saved
    assert dataset.described == ("photos: 60 images, 3 classes, saved by Hugging Face's datasets")
    # Extracted once: a second look writes nothing.
    files = {path: path.stat() for path in dataset.root.rglob("*")}
    assert load_dataset(saved, cache=cache).root == dataset.root
    assert files == {path: path.stat() for path in dataset.root.rglob("*")}


def test_a_saved_dictionary_of_splits_is_that_of_split_folders(tmp_path, folders, cache):
    parts = {"train": range(14), "validation": range(14, 17), "test": range(17, 20)}
    split_folders = tmp_path / "split"
    for split, numbers in parts.items():
        save(tmp_path / "wrapped" / "photos" / split, rows_of(folders, numbers.__contains__))
        for name in NAMES:
            (split_folders / split / name).mkdir(parents=True)
            for number in numbers:
                there = split_folders / split / name / f"{number:02}.png"
                there.hardlink_to(folders / name / f"{number:02}.png")
    listed = json.dumps({"splits": list(parts)})
    (tmp_path / "wrapped" / "photos" / "dataset_dict.json").write_text(listed)
    dataset = load_dataset(tmp_path / "wrapped", cache=cache)
    assert dataset.counts("test") == [3, 3, 3]
    assert dataset.own_validation
    assert dataset.digest == load_dataset(split_folders, cache=cache).digest


def test_other_columns_are_labels_groups_and_images(tmp_path, folders, cache):
    rows = [
        {
            "image": None,
            "photo": row["image"],
            "breed": f" {NAMES[row['label']]} ",
            "path": "elsewhere",
            "animal": number // 2,
            "boxes": [1, 2],
        }
        for number, row in enumerate(rows_of(folders))
    ]
    features = {"image": {"_type": "Image"}, "photo": {"_type": "Image"}}
    saved = save(tmp_path / "photos", rows, features=features)
    with pytest.raises(DataError, match=r"no column 'label', only .*data\.columns\.label"):
        load_dataset(saved, cache=cache)
    columns = {"path": "photo", "label": "breed", "group": "animal"}
    dataset = load_dataset(saved, columns=columns, cache=cache)
    assert dataset.class_names == NAMES
    assert rules(dataset)["groups"].startswith("60 of 60 images share a group with others: 30")


def test_images_without_names_with_one_name_or_beside_the_rows_get_files(tmp_path, folders, cache):
    rows = rows_of(folders)
    beside = tmp_path / "photos" / "files" / "07.png"
    for number, row in enumerate(rows):
        row["image"]["path"] = None if number % 2 else "../../x/photo.png"
    rows[6]["image"] = {"bytes": None, "path": "files/07.png"}
    saved = save(tmp_path / "photos", rows)
    beside.parent.mkdir()
    beside.write_bytes((folders / "cat" / "06.png").read_bytes())
    dataset, same = (load_dataset(root, cache=cache) for root in (saved, folders))
    paths = {sample.path for samples in dataset.splits.values() for sample in samples}
    assert {"cat/photo.png", "cat/00000001.png", "cat/photo-00000002.png", "cat/07.png"} <= paths
    assert contents(dataset) == contents(same)


def contents(dataset: Any) -> dict[str, set[tuple[str, int]]]:
    return {split: {(s.digest, s.label) for s in found} for split, found in dataset.splits.items()}


def test_classes_that_can_be_no_folders_are_classes_all_the_same(tmp_path, folders, cache):
    names = ["train/../x", ".hidden", "long" * 100]
    features = {**FEATURES, "label": {"_type": "ClassLabel", "names": names}}
    dataset = load_dataset(save(tmp_path / "p", rows_of(folders), features=features), cache=cache)
    assert dataset.class_names == tuple(sorted(names))
    assert all((dataset.root / s.path).is_file() for s in dataset.splits["train"])


def test_rows_without_image_or_label_are_listed(tmp_path, folders, cache):
    rows = rows_of(folders)
    rows[0]["image"] = None
    rows[1]["label"] = -1
    rows[2]["image"] = {"bytes": None, "path": "/etc/hostname.png"}
    rows[3]["image"]["bytes"] = b"text"
    rows[3]["image"]["path"] = None
    dataset = load_dataset(save(tmp_path / "photos", rows), cache=cache)
    found = rules(dataset)
    assert found.keys() == {
        "rows_without_path",
        "rows_without_label",
        "rows_without_file",
        "rows_without_image",
    }
    assert found["rows_without_file"].startswith("1 (line 3: cat/hostname.png)")
    assert sum(map(len, dataset.splits.values())) == 56


def _cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _state(state: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "state.json").write_text(json.dumps(state))


FIRST = "data-00000-of-00002.arrow"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut("state.json", 9), "state.json is no JSON"),
        (_cut("dataset_info.json", 9), "dataset_info.json is no JSON"),
        (_cut(FIRST, 100), "arrow is damaged: "),
        (_cut(FIRST, 0), "arrow is damaged: "),
        (lambda folder: (folder / FIRST).unlink(), "is missing, and state.json names it"),
        (_state([]), "is no JSON object"),
        (_state({"_data_files": []}), "names no data files"),
        (_state({"_data_files": [{"filename": "../x.arrow"}]}), "names no data files"),
        (
            _state({"_data_files": [{"filename": FIRST}], "_indices_files": [{}]}),
            "keeps its rows by an index",
        ),
        (
            lambda folder: (folder / "dataset_dict.json").write_text('{"splits": "train"}'),
            "names no splits",
        ),
    ],
)
def test_a_damaged_saved_data_set_is_one_clear_line(tmp_path, folders, cache, damage, message):
    saved = save(tmp_path / "photos", rows_of(folders))
    damage(saved)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(saved, cache=cache)
    assert "\n" not in str(caught.value)
    assert not (cache / "saved").exists() or not list((cache / "saved").iterdir())
