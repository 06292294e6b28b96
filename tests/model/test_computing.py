"""Shards computed by other machines, and stores of which only a part came back."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visiontuner.data import arrays as shards_module
from visiontuner.data.arrays import META, FeatureSet, Shard, array_path
from visiontuner.data.dataset import ImageDataset
from visiontuner.errors import BadImageError
from visiontuner.model import features as features_module
from visiontuner.model.backbones import Backbone
from visiontuner.model.features import ShardRows, compute_features, compute_shards


class Means:
    """512 features of an image: its mean, times the feature's index."""

    description = "means"
    batch_size = 16
    lanes = 2

    def features(self, images: np.ndarray) -> np.ndarray:
        means = images.mean(axis=(1, 2, 3), dtype=np.float64)
        return (means[:, None] * np.arange(512)).astype(np.float32)


class Others:
    """Compute shards last to first, and give up after some."""

    description = "2 machines"

    def __init__(self, dataset: ImageDataset, backbone: Backbone, lives: int = 1000) -> None:
        self._known = {"root": dataset.root, "backbone": backbone, "engine": Means(), "workers": 0}
        self._lives = lives

    def compute(self, shards: Sequence[Shard]) -> Iterator[ShardRows]:
        for shard in list(reversed(shards))[: self._lives]:
            yield from compute_shards([shard], **self._known)  # type: ignore[arg-type]


Compute = Callable[..., FeatureSet]


@pytest.fixture
def compute(resnet: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compute:
    """Features of a data set in shards of 4 images; sharing is worth it from 2 of them."""
    monkeypatch.setattr(shards_module, "SHARD_SIZE", 4)
    monkeypatch.setattr(features_module, "MIN_SHARDS_TO_DISTRIBUTE", 2)

    def run(
        dataset: ImageDataset,
        others: Others | None = None,
        *,
        engine: Callable[[], Any] = Means,
        cache: str = "cache",
        **options: Any,
    ) -> FeatureSet:
        def machines() -> AbstractContextManager[Any]:
            return nullcontext(others)

        return compute_features(
            dataset,
            backbone=resnet,  # type: ignore[arg-type]
            engine=engine,
            precision="fp32",
            cache=tmp_path / cache,
            workers=0,
            machines=machines,
            **options,
        )

    return run


def no_engine() -> Means:
    raise AssertionError("nothing was to be computed here")


def assert_equal(one: FeatureSet, other: FeatureSet) -> None:
    for split in ("train", "validation"):
        np.testing.assert_array_equal(one.split(split).features, other.split(split).features)
        assert one.split(split).paths == other.split(split).paths


def test_other_machines_compute_the_same_features(
    make_dataset: Any, compute: Compute, resnet: Backbone
) -> None:
    dataset = make_dataset(train=14, validation=6)
    seen: list[tuple[int, int]] = []
    shared = compute(
        dataset,
        Others(dataset, resnet),
        engine=no_engine,
        cache="shared",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_equal(shared, compute(dataset))
    assert (shared.engine, shared.computed) == ("2 machines", 20)
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_others_leave_is_computed_here(
    make_dataset: Any, compute: Compute, resnet: Backbone
) -> None:
    dataset = make_dataset(train=14, validation=6)
    shared = compute(dataset, Others(dataset, resnet, lives=2), cache="shared")
    assert_equal(shared, compute(dataset))


def test_a_bad_image_elsewhere_counts_as_one_here(
    make_dataset: Any, compute: Compute, resnet: Backbone
) -> None:
    dataset = make_dataset(train=14, validation=6)
    bad = dataset.splits["train"][5].path
    (dataset.root / bad).write_bytes(b"no image")
    with pytest.raises(BadImageError, match=bad):
        compute(dataset, Others(dataset, resnet), on_bad_image="fail")
    skipped = compute(dataset, Others(dataset, resnet), engine=no_engine)
    assert len(skipped.split("train").features) == 13
    assert bad in skipped.findings[0].evidence


@pytest.mark.parametrize("lost", ["features", "labels"])
def test_a_store_that_came_back_in_part_is_computed_again(
    make_dataset: Any, compute: Compute, lost: str
) -> None:
    dataset = make_dataset(train=6, validation=6)
    before = compute(dataset)
    whole = before.split("train").features.copy()
    path = array_path(before.folder, "train", lost)
    path.write_bytes(path.read_bytes()[:-8])
    assert (before.folder / META).is_file()
    again = compute(dataset)
    assert again.computed == 12
    np.testing.assert_array_equal(again.split("train").features, whole)


class Lanes:
    """Features of an image: its mean; the third batch is done first. Counts who is inside."""

    description = "lanes"
    batch_size = 2
    lanes = 3

    def __init__(self) -> None:
        self.inside, self.most, self.calls = 0, 0, 0
        self.lock = threading.Lock()
        self.all_inside = threading.Barrier(self.lanes)
        self.third_is_done = threading.Event()

    def features(self, images: np.ndarray) -> np.ndarray:
        with self.lock:
            self.inside += 1
            self.calls += 1
            call = self.calls
        if call <= self.lanes:
            self.all_inside.wait()
        if call < self.lanes:
            self.third_is_done.wait()
        rows = Means().features(images)
        if call == self.lanes:
            self.third_is_done.set()
        with self.lock:
            self.most = max(self.most, self.inside)
            self.inside -= 1
        return rows


def test_an_engine_is_called_from_as_many_threads_as_it_takes_and_rows_stay_in_order(
    make_dataset: Any, compute: Compute
) -> None:
    dataset, engine = make_dataset(train=14, validation=6), Lanes()
    assert_equal(compute(dataset, engine=lambda: engine), compute(dataset, cache="other"))
    assert engine.most == 3
    assert engine.inside == 0


def test_an_engine_that_fails_in_a_thread_fails_as_here(
    make_dataset: Any, compute: Compute
) -> None:
    class Fails(Lanes):
        def features(self, images: np.ndarray) -> np.ndarray:
            raise MemoryError

    with pytest.raises(MemoryError):
        compute(make_dataset(train=14, validation=6), engine=Fails)
