"""A frozen backbone over a data set, once.

The features lie in a store named after everything that determines them: pictures, network,
weights, preprocessing and precision. They are computed in shards of 256 pictures; a computation
that was killed goes on at the last full shard. Two processes that need the same store take turns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visiontuner.data.arrays import META, find_damage
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.files import locked
from visiontuner.data.images import DECODING_VERSION
from visiontuner.errors import BadImageError, DataError
from visiontuner.model.computing import (
    Machines,
    ShardRows,
    compute_shards,
    decoding_workers,
)
from visiontuner.model.decoding import DecodedBatch
from visiontuner.model.description import BackboneDescription
from visiontuner.model.shards import FOLDER as SHARDS
from visiontuner.model.shards import SHARD_SIZE, Shard, assemble, cut_into_shards
from visiontuner.model.store import SCHEMA_VERSION, FeatureSet, Precision, SplitFeatures

if TYPE_CHECKING:  # features that are there already are found without torch
    from visiontuner.model.engine import Engine

__all__ = ["FeatureSet", "SplitFeatures", "compute_features", "store_folder"]

# Other machines load and export the network first, as long as a shard or two take.
SHARDS_WORTH_SHARING = 4

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


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
    batch_size: int | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    machines: Callable[[], AbstractContextManager[Machines | None]] = nullcontext,
) -> FeatureSet:
    """The features of a data set, from the store or computed.

    Args:
        engine: makes what runs the network; called only if something has to be computed.
        splits: which pictures are looked at. Test stays out until a model has been chosen.
        on_bad_image: leave unreadable pictures out and list them as findings, or fail.
        workers: processes that decode; default by the cores, 0 decodes in a thread.
        batch_size: pictures that go through the network at a time; the engine's own if None.
        progress: called with (pictures done, pictures in all).
        note: told in one line why features that are in the cache are not used.
        machines: opens others that compute the shards of a large set instead; gives None where
            there are none.

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
    if find_damage(folder) is not None:
        with locked(folder):
            damage = find_damage(folder)
            if damage is not None:  # else another process has done it meanwhile
                if (folder / META).exists() and note is not None:
                    note(f"The features in {folder} {damage}: they are computed anew.")
                (folder / META).unlink(missing_ok=True)
                job = _Job(
                    dataset=dataset,
                    backbone=backbone,
                    folder=folder,
                    splits=tuple(splits),
                    on_bad_image=on_bad_image,
                    batch_size=batch_size,
                    progress=progress or (lambda _done, _total: None),
                    machines=machines,
                )
                computed = job.run(engine, workers)
    features = FeatureSet.open(folder)
    unreadable = [one for one in features.findings if one.rule == "unreadable_picture"]
    if on_bad_image == "fail" and unreadable:
        raise _bad_image(unreadable[0].evidence)
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
        "schema": [SCHEMA_VERSION, SHARD_SIZE, DECODING_VERSION],
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
            row = f"{sample.digest} {sample.label} {sample.path}\n"
            digest.update(row.encode(errors="surrogateescape"))  # a name need not be UTF-8
    return cache / "features" / digest.hexdigest()[:32]


@dataclass
class _Job:
    """One computation of one store."""

    dataset: ImageDataset
    backbone: BackboneDescription
    folder: Path
    splits: tuple[str, ...]
    on_bad_image: Literal["skip", "fail"]
    batch_size: int | None
    progress: Progress
    machines: Callable[[], AbstractContextManager[Machines | None]]

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
        done = total - todo
        if len(missing) >= SHARDS_WORTH_SHARING:
            with self.machines() as machines:
                if machines is not None:
                    description = machines.description
                    started = time.monotonic()
                    for computed in machines.compute(missing):
                        self._keep(computed)
                        done += len(computed.shard.samples)
                        self.progress(done, total)
        missing = [shard for shard in missing if not shard.is_done()]
        if missing:
            engine = make_engine()
            description = engine.description
            started = time.monotonic()
            self._compute(missing, engine, decoding_workers(todo, workers), done, total)
        assemble(shards, self._description(description, time.monotonic() - started))
        return todo

    def _compute(
        self, missing: Sequence[Shard], engine: Engine, workers: int, done: int, total: int
    ) -> None:
        def on_batch(batch: DecodedBatch) -> None:
            nonlocal done
            self._check(batch.bad)
            done += len(batch.good) + len(batch.bad)
            self.progress(done, total)

        computed = compute_shards(
            missing,
            root=self.dataset.root,
            backbone=self.backbone,
            engine=engine,
            workers=workers,
            batch_size=self.batch_size,
            on_batch=on_batch,
        )
        with closing(computed):
            for shard in computed:
                self._keep(shard)

    def _keep(self, computed: ShardRows) -> None:
        self._check(computed.bad)
        computed.shard.write(computed.rows, computed.bad, computed.few_levels)

    def _check(self, bad: Mapping[int, str]) -> None:
        if bad and self.on_bad_image == "fail":
            raise _bad_image(next(iter(bad.values())))

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


def _bad_image(reason: str) -> BadImageError:
    return BadImageError(f"{reason} Repair or delete it, or set `data.on_bad_image: skip`.")
