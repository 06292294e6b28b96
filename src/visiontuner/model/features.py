"""A frozen backbone over a data set, once.

The features lie in a store named after everything that determines them: pictures, network,
weights, preprocessing and precision. They are computed in shards of 256 pictures; a computation
that was killed goes on at the last full shard. Two processes that need the same store take turns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.cores import available_cpus
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.files import locked
from visiontuner.data.images import normalise
from visiontuner.errors import BadImageError, DataError
from visiontuner.model.decoding import DecodedBatch, decode_batches
from visiontuner.model.description import BackboneDescription
from visiontuner.model.shards import FOLDER as SHARDS
from visiontuner.model.shards import SHARD_SIZE, Shard, assemble, cut_into_shards
from visiontuner.model.store import META, SCHEMA_VERSION, FeatureSet, Precision, SplitFeatures

if TYPE_CHECKING:  # features that are there already are found without torch
    from visiontuner.model.engine import Engine

__all__ = ["FeatureSet", "SplitFeatures", "compute_features", "store_folder"]

# Starting worker processes takes about as long as decoding so many photographs.
_DECODE_IN_PROCESS_BELOW = 64

Progress = Callable[[int, int], None]


def compute_features(
    dataset: ImageDataset,
    *,
    backbone: BackboneDescription,
    engine: Callable[[], Engine],
    precision: Precision,
    cache: Path,
    splits: Sequence[str] = ("train", "validation"),
    on_bad_image: Literal["skip", "fail"] = "skip",
    workers: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> FeatureSet:
    """The features of a data set, from the store or computed.

    Args:
        engine: makes what runs the network; called only if something has to be computed.
        splits: which pictures are looked at. Test stays out until a model has been chosen.
        on_bad_image: leave unreadable pictures out and list them as findings, or fail.
        workers: processes that decode; default by the cores, 0 decodes in a thread.
        batch_size: pictures that go through the network at a time.
        progress: called with (pictures done, pictures in all).

    Raises:
        DataError: a split has no readable picture.
        BadImageError: a picture is unreadable and `on_bad_image` is `fail`.
        VisiontunerError: the disk is full, or a decoding process died. What is done is kept.
    """
    for split in splits:
        if not dataset.splits[split]:
            raise DataError(f"{dataset.root} has no pictures for {split}. Add some.")
    folder = store_folder(dataset, backbone, precision, splits, cache)
    computed = 0
    if not (folder / META).is_file():
        with locked(folder):
            if not (folder / META).is_file():  # another process may have done it meanwhile
                job = _Job(
                    dataset=dataset,
                    backbone=backbone,
                    folder=folder,
                    splits=tuple(splits),
                    on_bad_image=on_bad_image,
                    batch_size=batch_size,
                    progress=progress or (lambda _done, _total: None),
                )
                computed = job.run(engine, workers)
    features = FeatureSet.open(folder)
    if on_bad_image == "fail" and features.findings:
        raise _bad_image(features.findings[0].evidence)
    return replace(features, computed=computed)


def store_folder(
    dataset: ImageDataset,
    backbone: BackboneDescription,
    precision: Precision,
    splits: Sequence[str],
    cache: Path,
) -> Path:
    """Where these features are or would be: a name made of all that determines them."""
    digest = hashlib.sha256()
    identity = {
        "schema": [SCHEMA_VERSION, SHARD_SIZE],
        "data": dataset.digest,
        "class_names": dataset.class_names,
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "preprocessing": backbone.preprocessing.to_dict(),
        "precision": precision,
    }
    digest.update(json.dumps(identity, sort_keys=True).encode())
    for split in splits:
        digest.update(f"\n{split}\n".encode())
        for sample in dataset.splits[split]:
            digest.update(f"{sample.digest} {sample.label} {sample.path}\n".encode())
    return cache / "features" / digest.hexdigest()[:32]


@dataclass
class _Job:
    """One computation of one store."""

    dataset: ImageDataset
    backbone: BackboneDescription
    folder: Path
    splits: tuple[str, ...]
    on_bad_image: Literal["skip", "fail"]
    batch_size: int
    progress: Progress

    def run(self, make_engine: Callable[[], Engine], workers: int | None) -> int:
        """Compute what is missing and put it together; the number of pictures computed."""
        started = time.monotonic()
        shards = [
            shard
            for split in self.splits
            for shard in cut_into_shards(split, self.dataset.splits[split], self.folder)
        ]
        missing = [shard for shard in shards if not shard.is_done()]
        todo, total = _count(missing), _count(shards)
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self.progress(total - todo, total)
        description = "unknown"
        if missing:
            engine = make_engine()
            description = engine.description
            started = time.monotonic()
            self._compute(missing, engine, _workers(workers, todo), total)
        assemble(shards, self._description(description, time.monotonic() - started))
        return todo

    def _compute(self, missing: Sequence[Shard], engine: Engine, workers: int, total: int) -> None:
        batches = [
            [sample.path for sample in shard.samples[start:end]]
            for shard in missing
            for start, end in shard.batches(self.batch_size)
        ]
        done = total - _count(missing)
        preprocessing = self.backbone.preprocessing
        decoded = decode_batches(self.dataset.root, batches, preprocessing, workers=workers)
        with closing(decoded):
            for shard in missing:
                parts: list[NDArray[np.float32]] = []
                bad: dict[int, str] = {}
                for start, end in shard.batches(self.batch_size):
                    batch = next(decoded)
                    self._check(batch)
                    bad |= {start + position: reason for position, reason in batch.bad.items()}
                    parts.append(self._features(batch, engine))
                    done += end - start
                    self.progress(done, total)
                shard.write(np.concatenate(parts), bad)

    def _check(self, batch: DecodedBatch) -> None:
        if batch.bad and self.on_bad_image == "fail":
            raise _bad_image(next(iter(batch.bad.values())))

    def _features(self, batch: DecodedBatch, engine: Engine) -> NDArray[np.float32]:
        if not batch.good:
            return np.empty((0, self.backbone.feature_dim), np.float32)
        return engine.features(normalise(batch.pixels, self.backbone.preprocessing))

    def _description(self, engine: str, seconds: float) -> FeatureSet:
        return FeatureSet(
            folder=self.folder,
            class_names=self.dataset.class_names,
            feature_dim=self.backbone.feature_dim,
            splits=self.splits,
            findings=(),
            engine=engine,
            seconds=round(seconds, 3),
        )


def _count(shards: Sequence[Shard]) -> int:
    return sum(len(shard.samples) for shard in shards)


def _workers(asked: int | None, pictures: int) -> int:
    if asked is not None:
        return asked
    if pictures < _DECODE_IN_PROCESS_BELOW:
        return 0
    # Two cores are busy with the network: a thread overlaps as well (Pillow lets go of Python's
    # lock), and a process more cost speed: 122 pictures/s against 76 with a 4.6M-parameter network.
    cores = available_cpus()
    return 0 if cores < 4 else min(16, cores // 2)


def _bad_image(reason: str) -> BadImageError:
    return BadImageError(f"{reason} Repair or delete it, or set `data.on_bad_image: skip`.")
