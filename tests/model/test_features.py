from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from visiontuner.data import arrays as shards_module
from visiontuner.data.arrays import FeatureSet, decode_batches
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.images import normalise, read_pixels
from visiontuner.errors import BadImageError, DataError, VisiontunerError
from visiontuner.model.backbones import Backbone
from visiontuner.model.features import compute_features, store_folder
from visiontuner.search.plan import read_labels

MakeDataset = Callable[..., ImageDataset]


class MeanEngine:
    """512 features that are easy to foresee: the mean of the input, times the feature's index."""

    description = "means"
    batch_size = 16
    lanes = 1  # it counts

    def __init__(self, fail_after: int | None = None) -> None:
        self.images = 0
        self.fail_after = fail_after

    def features(self, images: np.ndarray) -> np.ndarray:
        if self.fail_after is not None and self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(images)
        means = images.mean(axis=(1, 2, 3), dtype=np.float64)
        return (means[:, None] * np.arange(512)).astype(np.float32)


@pytest.fixture
def compute(resnet: Backbone, tmp_path: Path) -> Callable[..., FeatureSet]:
    def run(
        dataset: ImageDataset,
        engine: object | None = None,
        *,
        make_engine: Callable[[], object] | None = None,
        **options: object,
    ) -> FeatureSet:
        defaults = {
            "backbone": resnet,
            "engine": make_engine or (lambda: engine or MeanEngine()),
            "precision": "fp32",
            "cache": tmp_path / "cache",
            "workers": 0,
        }
        return compute_features(dataset, **(defaults | options))

    return run


def _no_engine() -> MeanEngine:
    raise AssertionError("nothing was to be computed")


def test_features_are_the_networks_answers_in_order(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet], resnet: Backbone
) -> None:
    dataset = make_dataset(train=7, validation=3)
    features = compute(dataset, batch_size=3)
    for split in ("train", "validation"):
        samples = dataset.splits[split]
        part = features.split(split)
        pixels = [read_pixels(dataset.root / s.path, resnet.preprocessing) for s in samples]
        images = normalise(np.stack(pixels), resnet.preprocessing)
        np.testing.assert_array_equal(part.features, MeanEngine().features(images))
        assert part.labels.tolist() == [sample.label for sample in samples]
        assert part.labels.dtype == np.int64
        assert part.paths == [sample.path for sample in samples]
    assert features.class_names == ("a", "b")
    assert (features.feature_dim, features.computed, features.engine) == (512, 10, "means")


def test_an_image_whose_name_is_no_utf8_has_features(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset(train=4, validation=2)
    odd, *others = dataset.splits["train"]
    renamed = replace(odd, path=os.fsdecode(b"train/a/caf\xe9.png"))
    (dataset.root / odd.path).rename(dataset.root / renamed.path)
    features = compute(replace(dataset, splits={**dataset.splits, "train": (renamed, *others)}))
    assert features.split("train").paths == [s.path for s in (renamed, *others)]


def test_second_time_computes_nothing(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset()
    first = compute(dataset)
    second = compute(dataset, make_engine=_no_engine)
    assert (second.folder, second.computed) == (first.folder, 0)
    assert not (first.folder / "shards").exists()
    assert FeatureSet.open(first.folder).split("train").features.shape == (6, 512)


def test_features_are_mapped_copy_on_write(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    features = compute(make_dataset())
    mapped = features.split("train").features
    assert isinstance(mapped, np.memmap)
    before = mapped[0, 1].item()
    mapped[0, 1] = before + 1
    assert features.split("train").features[0, 1] == before


def test_whatever_changes_the_features_is_another_store(
    make_dataset: MakeDataset, resnet: Backbone, tmp_path: Path
) -> None:
    dataset = make_dataset()
    sample = dataset.splits["train"][0]
    relabelled = {**dataset.splits, "train": (replace(sample, label=1),)}
    smaller = replace(resnet, preprocessing=resnet.preprocessing.with_size(32))
    variants = [
        (dataset, resnet, "fp32", ("train",)),
        (dataset, resnet, "bf16", ("train",)),
        (dataset, resnet, "fp32", ("train", "validation")),
        (dataset, smaller, "fp32", ("train",)),
        (dataset, replace(resnet, weights_digest="0"), "fp32", ("train",)),
        (dataset, replace(resnet, name="other"), "fp32", ("train",)),
        (replace(dataset, digest="0"), resnet, "fp32", ("train",)),
        (replace(dataset, splits=relabelled), resnet, "fp32", ("train",)),
    ]
    folders = {store_folder(*variant, tmp_path) for variant in variants}
    assert len(folders) == len(variants)
    moved = replace(dataset, root=tmp_path / "elsewhere")
    assert store_folder(moved, resnet, "fp32", ("train",), tmp_path) in folders


def test_interrupted_computation_goes_on_at_the_last_full_shard(
    make_dataset: MakeDataset,
    compute: Callable[..., FeatureSet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_SIZE", 4)
    dataset = make_dataset(train=11, validation=2)
    expected = compute(dataset, cache=dataset.root.parent / "uninterrupted", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        compute(dataset, MeanEngine(fail_after=6), batch_size=2)
    progress: list[tuple[int, int]] = []
    engine = MeanEngine()
    resumed = compute(
        dataset, engine, batch_size=2, progress=lambda done, total: progress.append((done, total))
    )
    assert engine.images == resumed.computed == 9  # one shard of 4 was whole
    assert progress[0] == (4, 13)
    assert progress[-1] == (13, 13)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(resumed.split(split).features, expected.split(split).features)
        assert resumed.split(split).paths == expected.split(split).paths


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def zero_second_half(path: Path) -> None:
    """As a power cut leaves a file whose name was on the disk before its content."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


@pytest.mark.parametrize("damage", [cut, zero_second_half])
def test_damaged_shard_is_computed_again(
    make_dataset: MakeDataset,
    compute: Callable[..., FeatureSet],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_SIZE", 4)
    dataset = make_dataset(train=8, validation=2)
    with pytest.raises(KeyboardInterrupt):
        compute(dataset, MeanEngine(fail_after=8), batch_size=4)
    (shard, _) = sorted((dataset.root.parent / "cache").rglob("train-*.npy"))
    damage(shard)
    again = compute(dataset)
    assert again.computed == 6
    assert again.split("train").features[:, 1].all()


def test_bad_images_are_left_out_and_listed(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset(train=6, validation=4)
    truncated, deleted = (dataset.splits["train"][i].path for i in (1, 4))
    (dataset.root / truncated).write_bytes((dataset.root / truncated).read_bytes()[:80])
    (dataset.root / deleted).unlink()
    features = compute(dataset, batch_size=4)
    assert len(features.findings) == 2
    assert features.findings[0].evidence == f"Cannot read {truncated}: image file is truncated."
    assert features.findings[1].evidence.startswith(f"Cannot read {deleted}: ")
    part = features.split("train")
    assert part.features.shape == (4, 512)
    assert part.labels.tolist() == [0, 0, 1, 1]
    assert truncated not in part.paths
    assert FeatureSet.open(features.folder).findings == features.findings
    with pytest.raises(BadImageError, match="skip"):
        compute(dataset, on_bad_image="fail")


def test_bad_image_can_be_fatal(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset()
    bad = dataset.root / dataset.splits["train"][2].path
    bad.write_text("no image")
    with pytest.raises(BadImageError, match=bad.name):
        compute(dataset, on_bad_image="fail")


def test_split_without_a_readable_image_is_an_error(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset(train=4, validation=2)
    for sample in dataset.splits["validation"]:
        (dataset.root / sample.path).write_bytes(b"")
    with pytest.raises(DataError, match="None of the validation images can be read"):
        compute(dataset)
    with pytest.raises(DataError, match="no images for test"):
        compute(dataset, splits=("test",))


def test_worker_processes_give_the_same(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset(train=9, validation=2)
    alone = compute(dataset)
    helped = compute(dataset, cache=dataset.root.parent / "other", workers=2, batch_size=2)
    np.testing.assert_array_equal(alone.split("train").features, helped.split("train").features)


def test_killed_worker_ends_in_one_line(make_dataset: MakeDataset, resnet: Backbone) -> None:
    dataset = make_dataset(train=8)
    batches = [[sample.path] for sample in dataset.splits["train"]]
    decoded = decode_batches(dataset.root, batches * 20, resnet.preprocessing, workers=1)
    next(decoded)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(VisiontunerError, match="decodes images died"):
        list(decoded)


@pytest.mark.parametrize(
    "name", ["train.features.npy", "validation.features.npy", "train.labels.npy", "meta.json"]
)
def test_features_that_are_not_what_was_written_are_computed_anew(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet], name: str
) -> None:
    dataset = make_dataset(train=40, validation=8)
    whole = compute(dataset)
    expected = whole.split("train").features.copy(), whole.split("train").labels
    zero_second_half(whole.folder / name)
    said: list[str] = []
    again = compute(dataset, note=said.append)
    assert again.computed == 48
    (line,) = said
    assert "computed anew" in line
    assert str(whole.folder) in line
    np.testing.assert_array_equal(again.split("train").features, expected[0])
    np.testing.assert_array_equal(again.split("train").labels, expected[1])
    assert compute(dataset, make_engine=_no_engine, note=said.append).computed == 0
    assert said == [line]


def test_features_of_an_earlier_version_cannot_be_verified_and_are_computed_anew(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset()
    meta = compute(dataset).folder / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "checksums": None}))
    said: list[str] = []
    assert compute(dataset, note=said.append).computed > 0
    assert "carry no checksums" in said[0]


def test_labels_that_are_not_what_was_written_are_not_read(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    folder = compute(make_dataset(validation=40)).folder
    assert len(read_labels(features=folder).labels) == 40
    zero_second_half(folder / "validation.labels.npy")
    with pytest.raises(DataError, match=r"labels in .* are damaged"):
        read_labels(features=folder)


def test_two_computations_of_one_store_share_the_work(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    dataset = make_dataset(train=12)
    results: list[FeatureSet] = []
    threads = [threading.Thread(target=lambda: results.append(compute(dataset))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.computed for result in results) == [0, 0, 16]


def test_full_disk_ends_in_one_line(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    dataset = make_dataset()
    with pytest.raises(VisiontunerError, match=r"No space left on device.*VISIONTUNER_CACHE"):
        compute(dataset)
    assert not list(dataset.root.parent.rglob("*.tmp"))


def test_store_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete features"):
        FeatureSet.open(tmp_path)


def test_damaged_store_is_named(
    make_dataset: MakeDataset, compute: Callable[..., FeatureSet]
) -> None:
    features = compute(make_dataset())
    path = features.folder / "train.features.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged"):
        features.split("train")
    with pytest.raises(DataError, match="no split 'test'"):
        features.split("test")


def test_trials_read_features_without_torch() -> None:
    code = """
        import sys
        import visiontuner.data.arrays, visiontuner.model.classifier
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
