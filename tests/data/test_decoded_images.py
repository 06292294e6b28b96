from __future__ import annotations

import hashlib
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontuner.data.arrays import (
    DecodedImages,
    StoredImages,
    make_view,
    prepare_images,
    store_folder,
    view_side,
)
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.data.images import Preprocessing, read_pixels
from visiontuner.errors import BadImageError, DataError, VisiontunerError

SMALL = Preprocessing(
    resize=36, size=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear"
)
Prepare = Callable[..., DecodedImages]
MakeSet = Callable[..., ImageDataset]


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes in many colours, as large as asked."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Images of two classes; `bad` files of train hold no image."""

    def make(train: int = 5, validation: int = 3, bad: tuple[int, ...] = ()) -> ImageDataset:
        root = tmp_path / "images"
        splits: dict[str, tuple[Sample, ...]] = {"test": ()}
        for split, count in {"train": train, "validation": validation}.items():
            samples = []
            for number in range(count):
                path = root / split / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph(80, 60, seed=number + len(split)).save(path)
                if split == "train" and number in bad:
                    path.write_bytes(b"no image")
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                samples.append(Sample(f"{split}/{path.name}", number % 2, digest))
            splits[split] = tuple(samples)
        return ImageDataset(
            root=root, class_names=("a", "b"), splits=splits, digest="0" * 64, findings=()
        )

    return make


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def run(dataset: ImageDataset, **options: object) -> DecodedImages:
        defaults = {"preprocessing": SMALL, "cache": tmp_path / "cache", "augmented": False}
        return prepare_images(dataset, **(defaults | options))

    return run


def expected(dataset: ImageDataset, split: str) -> list[np.ndarray]:
    return [read_pixels(dataset.root / s.path, SMALL) for s in dataset.splits[split]]


def content(images: StoredImages) -> bytes:
    return (images.folder / f"{images.name}.{images.form}").read_bytes()


def test_pixels_are_exactly_what_evaluation_reads(make_set: MakeSet, prepare: Prepare) -> None:
    dataset = make_set()
    store = prepare(dataset)
    assert (store.computed, store.splits, store.class_names) == (
        8,
        ("train", "validation"),
        ("a", "b"),
    )
    for split in store.splits:
        images = store.split(split)
        for index, pixels in enumerate(expected(dataset, split)):
            np.testing.assert_array_equal(images.pixels(index), pixels)
        assert images.labels.tolist() == [s.label for s in dataset.splits[split]]
        assert images.labels.dtype == np.int64
        assert images.paths == tuple(s.path for s in dataset.splits[split])
        assert isinstance(images.pixels(0), np.memmap)


def test_an_image_whose_name_is_no_utf8_is_decoded(make_set: MakeSet, prepare: Prepare) -> None:
    dataset = make_set()
    odd, *others = dataset.splits["train"]
    renamed = replace(odd, path=os.fsdecode(b"train/caf\xe9.png"))
    (dataset.root / odd.path).rename(dataset.root / renamed.path)
    store = prepare(replace(dataset, splits={**dataset.splits, "train": (renamed, *others)}))
    assert store.split("train").paths == tuple(s.path for s in (renamed, *others))


def test_augmentation_gets_views_for_training_and_pixels_for_validation(
    make_set: MakeSet, prepare: Prepare
) -> None:
    dataset = make_set()
    store = prepare(dataset, augmented=True)
    train, validation = store.split("train"), store.split("validation")
    view = train.view(4)
    assert (view.mode, view.size) == ("RGB", (80, 60))
    with Image.open(dataset.root / train.paths[4]) as original:
        np.testing.assert_array_equal(np.asarray(view), np.asarray(original))
    np.testing.assert_array_equal(validation.pixels(2), expected(dataset, "validation")[2])
    with pytest.raises(DataError, match="kept for cropping"):
        train.pixels(0)
    with pytest.raises(DataError, match="cropped already"):
        validation.view(0)


@pytest.mark.parametrize(("size", "shown"), [((900, 600), (108, 72)), ((150, 300), (72, 144))])
def test_view_is_as_small_as_its_crops_allow(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    # A fifth of a square of 32 / sqrt(0.2) = 71.6 pixels a side is a square of 32.
    assert view_side(SMALL) == 72
    photograph(*size).save(tmp_path / "a.png")
    (tmp_path / "view").write_bytes(make_view(tmp_path / "a.png", SMALL))
    with Image.open(tmp_path / "view") as view:
        assert (view.format, view.mode, view.size) == ("JPEG", "RGB", shown)
        exact = photograph(*size).resize(shown, Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(view, np.int16) - np.asarray(exact, np.int16))
    assert difference.mean() < 4


def test_view_never_enlarges_an_image_and_keeps_a_tiny_one_without_loss(tmp_path: Path) -> None:
    network = SMALL.with_size(224)
    for size, kind in {(8, 8): "PNG", (300, 200): "JPEG"}.items():
        photograph(*size).save(tmp_path / "a.png")
        (tmp_path / "view").write_bytes(make_view(tmp_path / "a.png", network))
        with Image.open(tmp_path / "view") as view:
            assert (view.format, view.size) == (kind, size)


@pytest.mark.parametrize("size", [(1, 3000), (70_000, 3)])
def test_view_of_a_very_long_image_is_its_middle(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    (tmp_path / "view").write_bytes(make_view(tmp_path / "a.png", SMALL))
    with Image.open(tmp_path / "view") as view:
        assert max(view.size) == 8 * min(view.size)


def test_second_time_decodes_nothing(make_set: MakeSet, prepare: Prepare) -> None:
    dataset = make_set()
    first = prepare(dataset)
    shutil.rmtree(dataset.root)
    second = prepare(dataset)
    assert (second.folder, second.computed) == (first.folder, 0)
    assert second.seconds == first.seconds
    names = {path.name.split(".", 1)[1] for path in first.folder.iterdir()}
    assert names == {"json", "pixels", "labels.npy", "samples.json"}


def test_whatever_changes_the_images_is_another_store(make_set: MakeSet, tmp_path: Path) -> None:
    dataset = make_set()
    relabelled = replace(dataset.splits["train"][0], label=1)
    other = {**dataset.splits, "train": (relabelled, *dataset.splits["train"][1:])}
    folders = {
        store_folder(dataset, SMALL, tmp_path, augmented=False),
        store_folder(dataset, SMALL, tmp_path, augmented=True),
        store_folder(dataset, SMALL.with_size(64), tmp_path, augmented=False),
        store_folder(replace(dataset, digest="1"), SMALL, tmp_path, augmented=False),
        store_folder(replace(dataset, splits=other), SMALL, tmp_path, augmented=False),
    }
    assert len(folders) == 5
    moved = replace(dataset, root=tmp_path / "elsewhere")
    assert store_folder(moved, SMALL, tmp_path, augmented=False) in folders


@pytest.mark.parametrize("augmented", [False, True])
def test_unreadable_image_is_left_out_and_listed(
    make_set: MakeSet, prepare: Prepare, augmented: bool
) -> None:
    dataset = make_set(train=5, bad=(1,))
    store = prepare(dataset, augmented=augmented)
    train = store.split("train")
    assert train.paths == tuple(f"train/{number:03d}.png" for number in (0, 2, 3, 4))
    assert train.labels.tolist() == [0, 0, 1, 0]
    finding = store.findings[0]
    assert len(store.findings) == 1
    assert finding.rule == "unreadable_image"
    assert finding.evidence == ("Cannot read train/001.png: it is not an image that Pillow knows.")
    last = np.asarray(train.view(3)) if augmented else train.pixels(3)
    original = Image.open(dataset.root / "train/004.png")
    np.testing.assert_array_equal(
        last, np.asarray(original) if augmented else expected_of(dataset, 4)
    )
    original.close()


def expected_of(dataset: ImageDataset, number: int) -> np.ndarray:
    return read_pixels(dataset.root / dataset.splits["train"][number].path, SMALL)


def test_findings_are_those_of_the_features(
    make_set: MakeSet, prepare: Prepare, tmp_path: Path
) -> None:
    from visiontuner.model.features import BackboneDescription, compute_features

    class Zeros:
        description = "zeros"
        batch_size = 16
        lanes = 1

        def features(self, images: np.ndarray) -> np.ndarray:
            return np.zeros((len(images), 4), np.float32)

    backbone = BackboneDescription(
        name="none", feature_dim=4, preprocessing=SMALL, weights_digest="0"
    )
    dataset = make_set(bad=(0, 3))
    dark = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    for split, number in (("train", 1), ("validation", 0)):
        Image.fromarray(dark).save(dataset.root / dataset.splits[split][number].path)
    features = compute_features(
        dataset, backbone=backbone, engine=Zeros, precision="fp32", cache=tmp_path, workers=0
    )
    store = prepare(dataset)
    assert store.findings == features.findings == prepare(dataset, augmented=True).findings
    assert [finding.rule for finding in store.findings][-2:] == ["unreadable_image", "few_levels"]
    assert store.findings[-1].evidence.startswith("2 (train/001.png, …): nearly black")
    assert prepare(dataset).findings == store.findings  # from the store
    assert store.split("train").paths == tuple(features.split("train").paths)


def test_unreadable_image_can_fail_the_preparation(make_set: MakeSet, prepare: Prepare) -> None:
    dataset = make_set(bad=(1,))
    rule = r"train/001.png.*set `data.on_bad_image: skip`"
    with pytest.raises(BadImageError, match=rule):
        prepare(dataset, on_bad_image="fail")
    prepare(dataset)
    with pytest.raises(BadImageError, match=rule):  # the store that is there has left one out
        prepare(dataset, on_bad_image="fail")


def test_split_without_a_readable_image_is_a_data_error(
    make_set: MakeSet, prepare: Prepare
) -> None:
    with pytest.raises(DataError, match=r"None of the train images .*train/001.png"):
        prepare(make_set(train=2, bad=(0, 1)))
    with pytest.raises(DataError, match="no images for validation"):
        prepare(make_set(validation=0))


def stop_after(images: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done >= images:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("augmented", [False, True])
def test_interrupted_preparation_goes_on_where_it_stopped(
    make_set: MakeSet, prepare: Prepare, tmp_path: Path, augmented: bool
) -> None:
    dataset = make_set(train=70, bad=(3, 40))
    whole = prepare(dataset, cache=tmp_path / "uninterrupted", augmented=augmented)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset, augmented=augmented, progress=stop_after(64))
    folder = store_folder(dataset, SMALL, tmp_path / "cache", augmented=augmented)
    with pytest.raises(DataError, match="Start again"):
        DecodedImages.open(folder)
    # What a kill leaves: pixels without their line, and half a line.
    with (folder / f"train.{'views' if augmented else 'pixels'}").open("ab") as data:
        data.write(b"half an image")
    with (folder / "train.progress.jsonl").open("a") as lines:
        lines.write('{"lengths": [1')
    seen: list[tuple[int, int]] = []
    resumed = prepare(dataset, augmented=augmented, progress=lambda *now: seen.append(now))
    assert seen[0] == (64, 73)
    assert resumed.computed == 9
    for split in ("train", "validation"):
        assert content(resumed.split(split)) == content(whole.split(split))
        assert resumed.split(split).paths == whole.split(split).paths
    assert resumed.findings == whole.findings


def test_progress_that_the_data_belie_is_not_believed(
    make_set: MakeSet, prepare: Prepare, tmp_path: Path
) -> None:
    dataset = make_set(train=40)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset, progress=stop_after(32))
    folder = store_folder(dataset, SMALL, tmp_path / "cache", augmented=False)
    with (folder / "train.pixels").open("r+b") as data:
        data.truncate(100)
    store = prepare(dataset)
    assert store.computed == 43
    np.testing.assert_array_equal(store.split("train").pixels(39), expected_of(dataset, 39))


def zero_second_half(path: Path) -> None:
    """As a power cut leaves a file whose name was on the disk before its content."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def test_interrupted_preparation_takes_up_only_what_was_written(
    make_set: MakeSet, prepare: Prepare, tmp_path: Path
) -> None:
    dataset = make_set(train=70)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset, progress=stop_after(64))
    zero_second_half(
        store_folder(dataset, SMALL, tmp_path / "cache", augmented=False) / "train.pixels"
    )
    store = prepare(dataset)
    assert store.computed == 73 - 32  # the first line's images are as they were
    for index in (0, 31, 32, 69):
        np.testing.assert_array_equal(
            store.split("train").pixels(index), expected_of(dataset, index)
        )


@pytest.mark.parametrize(
    ("augmented", "name"),
    [
        (False, "train.pixels"),
        (True, "train.views"),
        (True, "train.ends.npy"),
        (True, "validation.labels.npy"),
        (False, "validation.samples.json"),
    ],
)
def test_images_that_are_not_what_was_written_are_decoded_anew(
    make_set: MakeSet, prepare: Prepare, augmented: bool, name: str
) -> None:
    dataset = make_set(train=40)
    whole = prepare(dataset, augmented=augmented)
    expected, mapped = content(whole.split("train")), whole.split("train")
    zero_second_half(whole.folder / name)
    said: list[str] = []
    again = prepare(dataset, augmented=augmented, note=said.append)
    assert again.computed == 43
    assert len(said) == 1
    assert "decoded anew" in said[0]
    assert content(again.split("train")) == expected
    assert len(content(mapped)) == len(expected)  # who has the old files open keeps them
    assert prepare(dataset, augmented=augmented, note=said.append).computed == 0
    assert len(said) == 1


def test_two_at_once_decode_each_image_once(make_set: MakeSet, prepare: Prepare) -> None:
    dataset = make_set(train=20)
    computed: list[int] = []
    threads = [
        threading.Thread(target=lambda: computed.append(prepare(dataset).computed))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computed) == [0, 0, 23]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_line_and_what_is_done_is_kept(
    make_set: MakeSet, prepare: Prepare
) -> None:
    dataset = make_set(train=70)
    with files_of_at_most(32 * 32 * 32 * 3 + 1000), pytest.raises(VisiontunerError) as failure:
        prepare(dataset)
    assert "Cannot write images to" in str(failure.value)
    assert "VISIONTUNER_CACHE" in str(failure.value)
    assert "\n" not in str(failure.value)
    store = prepare(dataset)
    assert store.computed == 73 - 32
    np.testing.assert_array_equal(store.split("train").pixels(69), expected_of(dataset, 69))


def test_missing_or_damaged_store_is_a_data_error(
    make_set: MakeSet, prepare: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds no decoded images"):
        DecodedImages.open(tmp_path / "nowhere")
    store = prepare(make_set())
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        store.split("test")
    with (store.folder / "train.pixels").open("r+b") as data:
        data.truncate(100)
    with pytest.raises(DataError, match="are damaged"):
        store.split("train")
    (store.folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match="holds no decoded images"):
        DecodedImages.open(store.folder)


def test_store_deleted_in_mid_use_stays_readable_where_it_is_open(
    make_set: MakeSet, prepare: Prepare
) -> None:
    dataset = make_set()
    images = prepare(dataset).split("train")
    shutil.rmtree(images.folder)
    np.testing.assert_array_equal(images.pixels(3), expected_of(dataset, 3))
    with pytest.raises(DataError, match="Start again"):
        DecodedImages.open(images.folder)


def test_split_is_small_when_it_goes_to_another_process(
    make_set: MakeSet, prepare: Prepare
) -> None:
    images = prepare(make_set(train=40)).split("train")
    pickled = pickle.dumps(images)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).pixels(7), images.pixels(7))


def test_class_with_one_image_is_like_any_other(make_set: MakeSet, prepare: Prepare) -> None:
    dataset = make_set(train=3)
    assert [s.label for s in dataset.splits["train"]].count(1) == 1
    assert prepare(dataset).split("train").labels.tolist() == [0, 1, 0]
