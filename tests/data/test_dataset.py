"""Folders of images and what becomes of them."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontuner.data import dataset as layout
from visiontuner.data.dataset import SPLITS, load_dataset
from visiontuner.data.images import image_extensions
from visiontuner.errors import DataError
from visiontuner.io import files as digests
from visiontuner.io.s3 import files_in


def draw(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path, "PNG")
    return path


def draw_splits(root: Path, counts: dict[str, dict[str, int]]) -> Path:
    seed = 0
    for split, classes in counts.items():
        for name, number in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(number):
                draw(root / split / name / f"{index}.png", seed := seed + 1)
    return root


def draw_classes(root: Path, number: int, classes: str = "ab") -> Path:
    for label, name in enumerate(classes):
        for index in range(number):
            draw(root / name / f"{index}.png", label * 100_000 + index)
    return root


def rules(dataset) -> dict[str, str]:
    return {finding.rule: finding.evidence for finding in dataset.findings}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("validation", "test"),
    [
        ("valid", "test"),
        ("val", "Testing"),
        ("validation", "test_set"),
        ("Valid", "seg_test"),
        ("dev", "Test Data"),
    ],
)
def test_split_folders_are_read(root, cache, validation, test):
    draw_splits(
        root, {"train": {"b": 3, "a": 2}, validation: {"b": 1, "a": 1}, test: {"a": 1, "b": 2}}
    )
    dataset = load_dataset(root, cache=cache)
    assert dataset.class_names == ("a", "b")
    assert {split: dataset.counts(split) for split in SPLITS} == {
        "train": [2, 3],
        "validation": [1, 1],
        "test": [1, 2],
    }
    assert dataset.splits["train"][0].path == "train/a/0.png"
    assert dataset.splits["train"][0].digest == digests.file_digest(root / "train/a/0.png")
    assert dataset.findings == ()


@pytest.mark.parametrize(
    "train", ["Training", "training_set", "Train-Data", "seg_train", "trainset"]
)
def test_train_has_many_names(root, cache, train):
    draw_splits(root, {train: {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    dataset = load_dataset(root, cache=cache)
    assert dataset.class_names == ("a", "b")
    assert dataset.counts("train") == [2, 2]


def test_a_split_folder_that_holds_itself_once_more_is_seen_through(root, cache):
    draw_splits(root, {"training_set/training_set": {"a": 40, "b": 40}})
    draw_splits(root, {"test_set/test_set": {"a": 1, "b": 1}})
    dataset = load_dataset(root, cache=cache)
    assert dataset.class_names == ("a", "b")
    assert dataset.counts("test") == [1, 1]


def test_a_folder_of_images_beside_the_splits_is_a_warning_other_ones_are_not(root, cache):
    draw_splits(root, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    draw_splits(root, {"holdout": {"a": 1, "b": 1}})
    (root / "papers").mkdir()
    (root / "papers" / "about.pdf").write_text("x")
    found = {finding.rule: finding for finding in load_dataset(root, cache=cache).findings}
    assert found["folders_beside_splits"].severity == "warning"
    assert found["folders_beside_splits"].evidence.startswith("1 (holdout: 2 images): left out")
    assert found["ignored_files"].evidence.startswith("1 (papers)")


def test_the_same_folders_in_every_class_may_be_the_classes(root, cache):
    draw_splits(root, {"spring": {"cat": 40, "dog": 40}, "autumn": {"cat": 40, "dog": 40}})
    dataset = load_dataset(root, cache=cache)
    assert dataset.class_names == ("autumn", "spring")
    assert rules(dataset) == {
        "same_subfolders_in_every_class": "every class folder (autumn, spring) holds the same "
        "folders (cat, dog), whose images are taken together"
    }


def test_folders_that_are_merged_into_one_class_are_a_warning(root, cache):
    draw_classes(root, 60, classes="a")
    draw_splits(root, {"animals": {"cats": 40, "dogs": 40}})
    (finding,) = load_dataset(root, cache=cache).findings
    assert (finding.rule, finding.severity) == ("merged_subfolders", "warning")
    assert finding.evidence.startswith("1 (animals: cats, dogs)")


def test_one_folder_in_each_class_is_nothing_to_warn_of(root, cache):
    draw_splits(root, {"a": {"images": 60}, "b": {"images": 60}})
    assert load_dataset(root, cache=cache).findings == ()


def write_what_commands_leave(folder: Path) -> None:
    """Images among it, as in a real search, a range test, an MLflow store and the cache."""
    draw(folder / "searches" / "photos-1" / "evaluation" / "confusion.png", 1)
    (folder / "searches" / "photos-1" / "journal.jsonl").write_text("")
    draw(folder / "lr-find" / "photos-1" / "range_test.png", 2)
    (folder / "lr-find" / "photos-1" / "range_test.json").write_text("{}")
    draw(folder / "mlruns" / "1" / "models" / "m-1" / "artifacts" / "example.png", 3)
    draw(folder / "my-search" / "evaluation" / "confusion.png", 4)
    (folder / "my-search" / "journal.jsonl").write_text("")
    draw(folder / "my-cache" / "archives" / "flowers" / "a" / "0.png", 5)
    (folder / "my-cache" / ".writable").touch()
    (folder / "mlflow.db").write_bytes(b"")


def test_what_commands_leave_in_a_folder_of_classes_is_no_class(root, cache):
    before = load_dataset(draw_classes(root, 60), cache=cache)
    write_what_commands_leave(root)
    after = load_dataset(root, cache=cache)
    assert after.class_names == ("a", "b")
    assert after.digest == before.digest
    assert after.findings == ()
    assert all(name.startswith(("a/", "b/")) for name in files_in(root))


def test_what_commands_leave_beside_splits_or_a_wrapped_set_changes_nothing(root, cache):
    draw_splits(root / "photos", {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    before = load_dataset(root, cache=cache)
    write_what_commands_leave(root)
    write_what_commands_leave(root / "photos")
    write_what_commands_leave(root / "photos" / "train")
    after = load_dataset(root, cache=cache)
    assert (after.root, after.digest) == (before.root, before.digest)
    assert "folders_beside_splits" not in rules(after)


def test_a_class_may_be_called_searches(root, cache):
    draw_classes(root, 40)
    (root / "a").rename(root / "searches")
    assert load_dataset(root, cache=cache).class_names == ("b", "searches")


def test_classes_are_matched_by_name_never_by_position(root, cache):
    draw_splits(root, {"train": {"a": 2, "b": 2, "c": 2}, "valid": {"b": 1, "c": 1}})
    dataset = load_dataset(root, cache=cache)
    assert [(s.path, s.label) for s in dataset.splits["validation"]] == [
        ("valid/b/0.png", 1),
        ("valid/c/0.png", 2),
    ]
    assert rules(dataset) == {"missing_classes": "1 (a): no images in validation"}


def test_the_same_accented_name_in_two_encodings_is_one_class(root, cache):
    draw_splits(root, {"train": {"caf\u00e9": 2, "b": 2}, "valid": {"cafe\u0301": 1, "b": 1}})
    assert load_dataset(root, cache=cache).class_names == ("b", "caf\u00e9")


@pytest.mark.parametrize(
    ("number", "share"),
    [(2, 0), (4, 0), (5, 1), (8, 1), (12, 1), (14, 1), (20, 2), (30, 3), (70, 7)],
)
def test_each_class_has_its_share_of_validation_and_test(root, cache, number, share):
    draw_classes(root, number)
    for index in range(40):  # enough for a data set of its own
        draw(root / "c" / f"{index}.png", 700_000 + index)
    dataset = load_dataset(root, cache=cache)
    for split, counts in (
        ("train", [number - 2 * share, number - 2 * share, 32]),
        ("validation", [share, share, 4]),
        ("test", [share, share, 4]),
    ):
        assert dataset.counts(split) == counts


def test_an_added_image_moves_at_most_one_into_or_out_of_validation_and_one_of_test(root, cache):
    draw_classes(root, 60)
    before = load_dataset(root, cache=cache)
    for number in range(20):
        draw(root / "a" / f"more {number}.png", 900_000 + number)
        after = load_dataset(root, cache=cache)
        for split in ("validation", "test"):
            then = {sample.path for sample in before.splits[split]}
            now = {sample.path for sample in after.splits[split]}
            assert {p for p in then if p[0] == "b"} == {p for p in now if p[0] == "b"}
            assert len(then - now) <= 1
            assert len((now - then) & {s.path for s in before.splits["train"]}) <= 1
        assert before.digest != after.digest
        before = after


def test_no_image_moves_between_validation_and_test(root, cache):
    draw_classes(root, 12)
    places: dict[str, set[str]] = {}
    for number in range(12, 40):
        draw_classes(root, number)
        for split, samples in load_dataset(root, cache=cache).splits.items():
            for sample in samples:
                places.setdefault(sample.path, set()).add(split)
    assert not [path for path, seen in places.items() if {"validation", "test"} <= seen]


def test_hashed_splits_are_those_of_version_0_1_and_adding_an_image_moves_none(root, cache):
    before = load_dataset(draw_classes(root, 60), split="hashed", cache=cache)
    for split, low, high in (("train", 0, 0.8), ("validation", 0.8, 0.9), ("test", 0.9, 1)):
        assert before.splits[split]
        for sample in before.splits[split]:
            assert low <= int(sample.digest[:8], 16) / 2**32 < high
    draw(root / "a" / "0000 first.png", 999_999)
    after = load_dataset(root, split="hashed", cache=cache)
    for split in SPLITS:
        assert set(before.splits[split]) <= set(after.splits[split])


def test_identical_images_never_land_in_two_splits(root, cache):
    draw_classes(root, 60)
    for path in list(root.glob("a/*.png")):
        shutil.copy(path, root / "b" / f"copy {path.name}")
    dataset = load_dataset(root, cache=cache)
    seen = {split: {s.digest for s in dataset.splits[split]} for split in SPLITS}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_without_validation_a_tenth_of_train_is_used(root, cache):
    draw_splits(root, {"train": {"a": 150, "b": 150}, "test": {"a": 5, "b": 5}})
    dataset = load_dataset(root, cache=cache)
    assert dataset.counts("validation") == [15, 15]
    assert dataset.counts("train") == [135, 135]
    assert len(dataset.splits["test"]) == 10
    assert "no_validation_folder" in rules(dataset)


def test_a_wrapping_folder_and_what_zip_programs_leave_are_seen_through(root, cache):
    draw_splits(root / "dogImages", {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    draw(root / "__MACOSX" / "dogImages" / "train" / "a" / "._0.png")
    draw(root / "dogImages" / "train" / "a" / ".hidden.png")
    (root / "README.txt").write_text("about")
    (root / "dogImages" / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    dataset = load_dataset(root, cache=cache)
    assert dataset.root == root / "dogImages"
    assert dataset.counts("train") == [2, 2]
    assert dataset.findings == ()


def test_images_deeper_in_a_class_folder_count(root, cache):
    draw_splits(root, {"train": {"a": 1, "b": 2}, "valid": {"a": 1, "b": 1}})
    draw(root / "train" / "a" / "2024" / "may" / "x.PNG", 77)
    dataset = load_dataset(root, cache=cache)
    assert "train/a/2024/may/x.PNG" in [s.path for s in dataset.splits["train"]]


def test_a_class_may_be_called_train_in_the_layout_that_says_so(root, cache):
    draw_classes(root, 40, classes="cx")
    for index in range(40):
        draw(root / "train" / f"{index}.png", 777_000 + index)
    with pytest.raises(DataError, match="If train is a class, put the folders of all classes into"):
        load_dataset(root, cache=cache)
    (root / "all").mkdir()
    for name in ("c", "x", "train"):
        (root / name).rename(root / "all" / name)
    (root / "all").rename(root / "train")
    assert load_dataset(root, cache=cache).class_names == ("c", "train", "x")


def _flat_splits_beside_a_folder(root: Path) -> None:
    for name in ("train", "test", "masks"):
        draw(root / name / "0.png")


def _splits_beside_a_folder_without_train(root: Path) -> None:
    draw_splits(root, {"valid": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}, "docs": {"x": 1}})


def _a_flat_test_folder_among_classes(root: Path) -> None:
    draw_classes(root, 3)
    draw(root / "test" / "0.png")


def _splits_one_folder_down_beside_another(root: Path) -> None:
    draw_splits(root / "data", {"train": {"a": 3, "b": 3}})
    draw(root / "docs" / "figure.jpg")


def _splits_below_the_classes(root: Path) -> None:
    draw_splits(root, {"cat": {"train": 3, "test": 1}, "dog": {"train": 3, "test": 1}})


def _splits_in_a_folder_called_train(root: Path) -> None:
    draw_splits(root / "train", {"train": {"a": 1, "b": 1}, "valid": {"a": 1, "b": 1}})
    draw_splits(root, {"test": {"a": 1, "b": 1}})


@pytest.mark.parametrize(
    ("build", "what", "works"),
    [
        (_flat_splits_beside_a_folder, "train holds no class folders", "one folder per class in"),
        (_splits_beside_a_folder_without_train, "has test, valid but no train", "folder train"),
        (_a_flat_test_folder_among_classes, "has test but no train", "If test is a class, put"),
        (_splits_one_folder_down_beside_another, "beside it lies docs", "Give .*/data as"),
        (_splits_below_the_classes, "holds test, train", "test/cat/… and not cat/test/…"),
        (_splits_in_a_folder_called_train, "holds train, valid, which", "give .*/train as"),
    ],
)
def test_a_splits_word_that_names_a_class_is_refused(root, cache, build, what, works):
    build(root)
    with pytest.raises(DataError, match=f"{what}.*{works}") as caught:
        load_dataset(root, cache=cache)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_split_without_class_folders_is_said(root, cache, name):
    draw_splits(root, {"train": {"a": 60, "b": 60}})
    for index in range(3):
        draw(root / name / f"{index}.png", 500 + index)
    dataset = load_dataset(root, cache=cache)
    found = {f.rule: (f.severity, f.evidence) for f in dataset.findings}
    assert found["images_outside_classes"] == (
        "warning",
        f"3 ({name}/0.png, …): images left out: 3 PNG, in no class folder",
    )
    severity, evidence = found["split_without_classes"]
    assert severity == "warning"
    assert evidence.startswith(f"{name} holds no images in class folders")
    assert ("10 % of train" in evidence) == (name == "val")
    assert ("no_validation_folder" in found) == (name == "test")


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_images_in_formats_that_are_not_read_are_counted_and_their_class_is_named(root, cache):
    draw_splits(root, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    for index in range(3):
        write_bytes(root / "train" / "c" / f"{index}.JXL", b"\xff\x0a")
    write_bytes(root / "train" / "a" / "x.nef", b"raw")
    write_bytes(root / "valid" / "b" / "notes.txt", b"no image")
    dataset = load_dataset(root, cache=cache)
    assert [(f.rule, f.severity, f.evidence) for f in dataset.findings] == [
        ("ignored_files", "info", "1 (valid/b/notes.txt): left out: no image in a class folder"),
        (
            "formats_not_read",
            "warning",
            "4 (train/a/x.nef, …): images left out: 3 JPEG XL, 1 camera RAW, not read here",
        ),
        (
            "classes_left_out",
            "error",
            "1 (train/c): all images of these classes were left out, so that the classes are "
            "missing",
        ),
    ]


def test_heic_names_the_package_that_reads_it(root, cache, monkeypatch):
    read = image_extensions()
    monkeypatch.setattr(
        layout, "image_extensions", lambda: {e: f for e, f in read.items() if e[:3] != ".he"}
    )
    draw_splits(root, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    write_bytes(root / "train" / "a" / "1.heic", b"\0\0\0\x18ftypheic\0\0\0\0")
    (finding,) = load_dataset(root, cache=cache).findings
    assert finding.evidence.endswith("1 HEIC, not read here (HEIC needs the package pillow-heif)")
    shutil.rmtree(root / "train" / "b")
    shutil.rmtree(root / "valid" / "b")
    with pytest.raises(DataError, match=r"only one class, a;.* Left out: 1 HEIC, .*pillow-heif"):
        load_dataset(root, cache=cache)


def test_images_that_are_called_like_none_or_lie_above_are_counted(root, cache):
    draw_splits(root / "photos", {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    for name in ("IMG_0001", "x.png~", "y.jpg_large"):
        draw(root / "photos" / "train" / "a" / name)
    draw(root / "cover.png")
    (root / "photos" / "train" / "a" / "LICENSE").write_text("BM, all rights reserved")
    os.mkfifo(root / "photos" / "train" / "a" / "pipe")
    assert rules(load_dataset(root, cache=cache)) == {
        "ignored_files": "2 (train/a/LICENSE, …): left out: no image in a class folder",
        "images_without_ending": "3 (train/a/IMG_0001, …): images left out: 3 PNG, called like "
        "no image",
        "images_outside_classes": "1 (../cover.png): images left out: 1 PNG, in no class folder",
    }


def test_other_files_are_listed(root, cache):
    draw_splits(root, {"train": {"a": 2, "b": 2, "empty": 0}, "valid": {"a": 1, "b": 1}})
    (root / "train" / "a" / "labels.csv").write_text("x")
    draw(root / "train" / "loose.png")
    os.mkfifo(root / "train" / "b" / "pipe.png")
    (root / "train" / "b" / "gone.png").symlink_to(root / "nowhere.png")
    dataset = load_dataset(root, cache=cache)
    assert dataset.class_names == ("a", "b")
    assert rules(dataset) == {
        "ignored_files": "2 (train/a/labels.csv, …): left out: no image in a class folder",
        "images_outside_classes": "1 (train/loose.png): images left out: 1 PNG, in no class folder",
        "broken_links": "1 (train/b/gone.png): left out: the link's target is gone",
        "empty_class_folders": "1 (train/empty): no images in the folder",
    }


def test_classes_with_too_few_images_are_found(root, cache):
    draw_splits(root, {"train": {"a": 2, "b": 1}, "valid": {"a": 1, "b": 1, "c": 1}})
    dataset = load_dataset(root, cache=cache)
    severity = {f.rule: (f.severity, f.evidence[:6]) for f in dataset.findings}
    assert severity == {
        "classes_without_training_images": ("error", "1 (c):"),
        "classes_with_one_training_image": ("warning", "1 (b):"),
    }


def test_a_limit_takes_the_same_images_of_every_class(root, cache):
    draw_splits(root, {"train": {"a": 9, "b": 3}, "valid": {"a": 5, "b": 1}})
    small, large = (load_dataset(root, cache=cache, limit_per_class=n) for n in (2, 4))
    assert (small.counts("train"), small.counts("validation")) == ([2, 2], [2, 1])
    assert (large.counts("train"), large.counts("validation")) == ([4, 3], [4, 1])
    assert set(small.splits["train"]) < set(large.splits["train"])
    kept = {s.digest for s in small.splits["train"] if s.label == 0}
    every = [s.digest for s in load_dataset(root, cache=cache).splits["train"] if s.label == 0]
    assert kept == set(sorted(every)[:2])


def test_the_digest_covers_names_labels_contents_and_splits(root, cache, tmp_path):
    draw_splits(root, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    original = load_dataset(root, cache=cache).digest
    assert load_dataset(shutil.copytree(root, tmp_path / "copy"), cache=cache).digest == original

    def changed(change) -> str:
        copy = shutil.copytree(root, tmp_path / "changed")
        change(copy)
        digest = load_dataset(copy, cache=cache).digest
        shutil.rmtree(copy)
        return digest

    found = {
        original,
        changed(lambda r: (r / "train/a/0.png").rename(r / "train/a/renamed.png")),
        changed(lambda r: (r / "train/a/0.png").rename(r / "train/b/9.png")),
        changed(lambda r: (r / "train/a/0.png").rename(r / "valid/a/9.png")),
        changed(lambda r: draw(r / "train/a/0.png", seed=12345)),
        changed(lambda r: [(r / s / "a").rename(r / s / "aa") for s in ("train", "valid")]),
    }
    assert len(found) == 6


def test_a_second_look_reads_no_image(root, cache, monkeypatch):
    draw_splits(root, {"train": {"a": 3, "b": 3}, "valid": {"a": 1, "b": 1}})
    seen: list[tuple[int, int]] = []
    first = load_dataset(root, cache=cache, progress=lambda *x: seen.append(x))
    assert seen[-1] == (8, 8)

    read: list[str] = []
    real = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda p: read.append(p.name) or real(p))
    assert load_dataset(root, cache=cache) == first
    assert read == []
    draw(root / "train" / "a" / "new.png", 5000)
    draw(root / "train" / "a" / "0.png", 5001)
    assert load_dataset(root, cache=cache).digest != first.digest
    assert sorted(read) == ["0.png", "new.png"]


def test_images_that_change_places_are_noticed_whatever_their_times_say(root, cache):
    draw_splits(root, {"train": {"a": 3, "b": 3}, "valid": {"a": 1, "b": 1}})
    one, other = root / "train/a/0.png", root / "train/b/0.png"
    size = max(one.stat().st_size, other.stat().st_size)
    for path in (one, other):  # PNG readers stop at its end
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    first = load_dataset(root, cache=cache)
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)
    second = load_dataset(root, cache=cache)
    assert second.digest != first.digest
    assert second == load_dataset(root, cache=root.parent / "fresh cache")


def test_digests_that_an_earlier_version_remembered_are_not_trusted(root, cache):
    draw_splits(root, {"train": {"a": 3, "b": 3}, "valid": {"a": 1, "b": 1}})
    first = load_dataset(root, cache=cache)
    (store,) = (cache / "digests").iterdir()
    rows = json.loads(store.read_text())
    store.write_text(json.dumps({path: [*row[:2], "0" * 64] for path, row in rows.items()}))
    assert load_dataset(root, cache=cache) == first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train/a/0.png": 3}', "\0\0"])
def test_damaged_caches_are_read_over(root, cache, content):
    draw_splits(root, {"train": {"a": 3, "b": 3}, "valid": {"a": 1, "b": 1}})
    first = load_dataset(root, cache=cache)
    (store,) = (cache / "digests").iterdir()
    store.write_text(content)
    assert load_dataset(root, cache=cache) == first


def test_an_unwritable_cache_is_no_error(root, tmp_path):
    draw_splits(root, {"train": {"a": 3, "b": 3}, "valid": {"a": 1, "b": 1}})
    (tmp_path / "file").write_text("in the way")
    assert load_dataset(root, cache=tmp_path / "file").counts("train") == [3, 3]


def test_unreadable_images_are_left_out_and_listed(root, cache, monkeypatch):
    draw_splits(root, {"train": {"a": 3, "b": 3}, "valid": {"a": 1, "b": 1}})
    real = digests.file_digest

    def refuse(path: Path) -> str:
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(digests, "file_digest", refuse)
    dataset = load_dataset(root, cache=cache)
    assert dataset.counts("train") == [2, 2]
    assert rules(dataset)["unreadable_files"].startswith("2 (train/a/1.png, …)")


def _no_folder(root: Path) -> None:
    del root


def _file(root: Path) -> None:
    root.write_text("x")


def _empty(root: Path) -> None:
    root.mkdir()


def _one_class(root: Path) -> None:
    draw_classes(root, 3, classes="a")


def _loose(root: Path) -> None:
    draw(root / "a.png")


def _no_images(root: Path) -> None:
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    (root / "a" / "notes.txt").write_text("x")


def _no_train(root: Path) -> None:
    draw_splits(root, {"valid": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})


def _no_classes_in_splits(root: Path) -> None:
    draw(root / "train" / "0.png")
    draw(root / "valid" / "0.png")


def _two_validations(root: Path) -> None:
    draw_splits(root, {"train": {"a": 1, "b": 1}, "val": {"a": 1}, "valid": {"a": 1}})


def _nothing_to_validate(root: Path) -> None:
    draw(root / "a" / "0.png", 1)
    shutil.copytree(root / "a", root / "b")


def _loop(root: Path) -> None:
    draw_classes(root, 3)
    (root / "a" / "again").symlink_to(root / "a")


def _loop_at_the_top(root: Path) -> None:
    root.mkdir()
    (root / "again").symlink_to(root)


def _link_to_itself(root: Path) -> None:
    draw_classes(root, 3)
    (root / "a" / "x.png").symlink_to(root / "a" / "x.png")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_no_folder, "There is no folder"),
        (_file, "is a file, not a folder"),
        (_empty, "holds no images in class folders"),
        (_one_class, "has only one class, a"),
        (_loose, r"holds no images in class folders \(it holds files such as a.png\)"),
        (_no_images, r"such as a/notes.txt"),
        (_no_train, "has test, valid but no train folder"),
        (_no_classes_in_splits, "train holds no class folders"),
        (_two_validations, "val and valid, which mean the same split"),
        (_nothing_to_validate, "none of them is for"),
        (_loop, "again is a link to a folder above it"),
        (_loop_at_the_top, "Too many levels of symbolic links|link to itself"),
        (_link_to_itself, "x.png is a link to itself"),
    ],
)
def test_what_is_no_data_set_is_one_clear_line(root, cache, build, message):
    build(root)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(root, cache=cache)
    assert "\n" not in str(caught.value)


def test_an_unreadable_class_folder_is_one_clear_line(root, cache, monkeypatch):
    draw_classes(root, 3)
    real = os.scandir

    def refuse(folder):
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(layout.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"Cannot read the folder .*/b: Permission denied"):
        load_dataset(root, cache=cache)


def test_a_class_name_that_cannot_be_printed_is_refused(root, cache):
    draw_classes(root, 2)
    draw(root / "line\nbreak" / "0.png")
    with pytest.raises(DataError, match=r"line\\nbreak has an unreadable name"):
        load_dataset(root, cache=cache)


def test_links_to_images_elsewhere_are_followed(root, cache, tmp_path):
    draw_splits(tmp_path / "store", {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "store" / "train")
    (root / "valid" / "a").mkdir(parents=True)
    (root / "valid" / "a" / "0.png").symlink_to(tmp_path / "store/valid/a/0.png")
    dataset = load_dataset(root, cache=cache)
    assert Counter(s.label for s in dataset.splits["train"]) == {0: 2, 1: 2}
    assert len(dataset.splits["validation"]) == 1
