"""What has become of a search's images: by content, from the file in its folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.data.manifest import (
    MANIFEST_FILE,
    compare_images,
    describe_classes,
    read_manifest,
    write_manifest,
)


def dataset(**splits: list[Sample]) -> ImageDataset:
    whole = {name: tuple(splits.get(name, ())) for name in ("train", "validation", "test")}
    return ImageDataset(
        root=Path("photos"), class_names=("cat", "dog"), splits=whole, digest="d", findings=()
    )


def image(path: str, label: int, content: str) -> Sample:
    return Sample(path, label, content * 64)


CAT_A, CAT_B, DOG_C, DOG_D = (
    image("cat/1.png", 0, "a"),
    image("cat/2.png", 0, "b"),
    image("dog/\udcff.png", 1, "c"),  # a name that is no UTF-8
    image("dog/4.png", 1, "d"),
)
NEW_E, NEW_F = image("n.png", 0, "e"), image("m.png", 0, "f")
OLD = dataset(train=[CAT_A, CAT_B, DOG_C], validation=[DOG_D])
RENAMED = image("cat/9.png", 0, "a")
RELABELLED = image("dog/1.png", 1, "a")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (OLD, "The images are the same."),
        (
            dataset(train=[CAT_B, DOG_C, RENAMED], validation=[DOG_D]),
            "The images are the same.",
        ),
        (
            dataset(train=[RELABELLED, CAT_B, NEW_E, NEW_F], validation=[DOG_D]),
            "2 new images, 1 relabelled since, 1 gone.",
        ),
        (
            dataset(train=[CAT_A, CAT_B, DOG_C], test=[DOG_D, NEW_E]),
            "1 new image, 1 in another split.",
        ),
    ],
)
def test_changes_are_counted_by_content(tmp_path, now, said):
    write_manifest(tmp_path, OLD)
    listed = read_manifest(tmp_path)
    assert listed is not None
    assert compare_images(listed, now).describe() == said


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x1f\x8b\x08 torn"])
def test_a_manifest_that_is_not_there_or_damaged_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / MANIFEST_FILE).write_bytes(content)
    assert read_manifest(tmp_path) is None


def test_the_same_images_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, replace(OLD))
    first, second = ((tmp_path / name / MANIFEST_FILE).read_bytes() for name in ("a", "b"))
    assert first == second


def test_classes_that_came_and_went_are_named():
    assert describe_classes(["cat", "dog"], ["dog", "cat"]) is None
    assert describe_classes(["cat", "dog"], ["dog", "emu", "owl"]) == (
        "Other classes: 2 new (emu, owl), 1 gone (cat)."
    )
