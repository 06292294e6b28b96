"""A frozen backbone over a data set, once.

The features lie in a store named after everything that determines them: images, network,
weights, preprocessing and precision. They are computed in shards of 256 images; a computation
that was killed goes on at the last full shard. Two processes that need the same store take turns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from visiontuner import interrupts
from visiontuner.data.arrays import FOLDER as SHARDS
from visiontuner.data.arrays import (
    SCHEMA_VERSION,
    SHARD_SIZE,
    DecodedBatch,
    FeatureSet,
    Note,
    Precision,
    Progress,
    Shard,
    assemble,
    available_cpus,
    bad_image,
    cut_into_shards,
    decode_batches,
    find_damage,
    make_store,
    refuse_unreadable,
    require_images,
    store_name,
)
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.data.images import DECODING_VERSION, Preprocessing, normalise
from visiontuner.errors import ClassifierError
from visiontuner.experiment.schema import OFFLINE_BACKBONES
from visiontuner.io.files import file_state, locked, write_json
from visiontuner.model.catalogue import package_of_weights

# What features depend on of a network, known without loading it, or torch.


# What decides, with the package of the weights, which tensors a name stands for.
_LIBRARIES = ("torch", "torchvision", "timm", "visiontuner")


@dataclass(frozen=True, kw_only=True)
class BackboneDescription:
    """A network that gives features, by what it does.

    Args:
        name: as in the experiment file.
        feature_dim: D, the length of one feature vector.
        preprocessing: what turns an image into the network's input.
        weights_digest: SHA-256 (hex) over the tensors by name.
        weights_licence: as whoever published the weights states it; None if that is not known.
    """

    name: str
    feature_dim: int
    preprocessing: Preprocessing
    weights_digest: str
    weights_licence: str | None = None


def describe_backbone(
    name: str,
    *,
    weights: str,
    image_size: int | None,
    views: Literal[1, "flip"] = 1,
    cache: Path,
    load: Callable[[], BackboneDescription],
) -> BackboneDescription:
    """The description that an earlier call kept, else the one of the network that `load` gives.

    Kept only where the name, the installed versions and a local file say which weights these are;
    weights behind a URL or a hub are loaded each time.
    """
    identity = _identity(name, weights, image_size)
    if identity is None:
        return load()
    identity += [views] if views != 1 else []
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path = cache / "backbones" / f"{key}.json"
    known = _read(path)
    if known is None:
        known = load()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _to_dict(known))
    return known


def _identity(name: str, weights: str, image_size: int | None) -> list[Any] | None:
    packages = [package_of_weights(name)] if name in OFFLINE_BACKBONES else []
    try:
        versions = [metadata.version(package) for package in (*_LIBRARIES, *packages)]
    except metadata.PackageNotFoundError:
        return None  # loading it says what is missing
    if weights == "none" or (weights == "default" and not name.startswith("timm:")):
        return [name, weights, image_size, versions]
    path = Path(weights).expanduser()
    if weights != "default" and path.is_file():
        place = [str(path.resolve()), *file_state(path.stat())]
        return [name, place, image_size, versions]
    return None


def _to_dict(description: BackboneDescription) -> dict[str, Any]:
    return {
        "name": description.name,
        "feature_dim": description.feature_dim,
        "preprocessing": description.preprocessing.to_dict(),
        "weights_digest": description.weights_digest,
        "weights_licence": description.weights_licence,
    }


def _read(path: Path) -> BackboneDescription | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return BackboneDescription(
            name=raw["name"],
            feature_dim=int(raw["feature_dim"]),
            preprocessing=Preprocessing.from_dict(raw["preprocessing"]),
            weights_digest=raw["weights_digest"],
            weights_licence=raw["weights_licence"],
        )
    except (OSError, ValueError, KeyError, TypeError, ClassifierError):
        return None


# Shards of images -> their features: on this machine, and what others are asked for.


# Starting worker processes takes about as long as decoding so many photographs.
_DECODE_IN_PROCESS_BELOW = 64


class ShardRows(NamedTuple):
    """A computed shard: float32 (N, D) of its readable images, and why others are not there.

    `few_levels` are the positions of images that are nearly black, white or of one shade.
    """

    shard: Shard
    rows: NDArray[np.float32]
    bad: dict[int, str]
    few_levels: Sequence[int] = ()


class Machines(Protocol):
    """Others that compute shards; `description` says what runs the network."""

    description: str

    def compute(self, shards: Sequence[Shard]) -> Iterator[ShardRows]:
        """Every shard once, in any order."""
        ...


def compute_shards(
    shards: Sequence[Shard],
    *,
    root: Path,
    backbone: BackboneDescription,
    engine: Engine,
    workers: int,
    batch_size: int | None = None,
    on_batch: Callable[[DecodedBatch], None] = lambda _: None,
) -> Generator[ShardRows]:
    """Decode the images of some shards and run the network over them, in order.

    Args:
        root: the data set's folder.
        workers: processes that decode, see `decoding_workers`.
        batch_size: images that go through the network at a time; the engine's own if None.
    """
    batch_size = batch_size or engine.batch_size
    batches = [
        [sample.path for sample in shard.samples[start:end]]
        for shard in shards
        for start, end in shard.batches(batch_size)
    ]
    with (
        closing(decode_batches(root, batches, backbone.preprocessing, workers=workers)) as decoded,
        closing(_in_lanes(decoded, backbone, engine)) as computed,
    ):
        for shard in shards:
            parts: list[NDArray[np.float32]] = []
            bad: dict[int, str] = {}
            few: list[int] = []
            for start, _ in shard.batches(batch_size):
                batch, rows = next(computed)
                bad |= {start + position: reason for position, reason in batch.bad.items()}
                few += [start + position for position in batch.few_levels]
                parts.append(rows)
                on_batch(batch)
            yield ShardRows(shard, np.concatenate(parts), bad, few)


# Of images decoded and run through the network to tell how long a pass takes.
_PACE_SECONDS, _PACE_IMAGES = 1.0, 256


def measure_pace(
    samples: Sequence[Sample],
    *,
    root: Path,
    backbone: BackboneDescription,
    engine: Engine,
    seconds: float = _PACE_SECONDS,
) -> float:
    """Images a second of a pass over some images, decoding included, measured on a few of them.

    Args:
        samples: at least one; measured on up to 256, spread over all.
        root: what the samples' paths are relative to.
        seconds: how long to measure, after the first batch of each lane; at least one batch.
    """
    step = max(1, len(samples) // _PACE_IMAGES)
    paths = [sample.path for sample in samples[::step]]
    size = engine.batch_size
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    warm_up = min(engine.lanes + 1, len(batches) - 1)
    done, began = 0, time.perf_counter()
    with (
        closing(decode_batches(root, batches, backbone.preprocessing, workers=0)) as decoded,
        closing(_in_lanes(decoded, backbone, engine)) as computed,
    ):
        for number, (batch, _) in enumerate(computed, start=1):
            done += len(batch.good) + len(batch.bad)
            if number == warm_up:
                done, began = 0, time.perf_counter()
            if number > warm_up and time.perf_counter() - began > seconds:
                break
        return done / (time.perf_counter() - began)


def _in_lanes(
    batches: Iterator[DecodedBatch], backbone: BackboneDescription, engine: Engine
) -> Generator[tuple[DecodedBatch, NDArray[np.float32]]]:
    """Each batch and its features, in order, as many at a time as the engine takes."""

    def compute(batch: DecodedBatch) -> tuple[DecodedBatch, NDArray[np.float32]]:
        if not batch.good:
            return batch, np.empty((0, backbone.feature_dim), np.float32)
        return batch, engine.features(normalise(batch.pixels, backbone.preprocessing))

    executor = ThreadPoolExecutor(engine.lanes, thread_name_prefix="network")
    try:
        # One waits, so that no lane does.
        yield from interrupts.map_ahead(executor, compute, batches, ahead=engine.lanes + 1)
    finally:
        executor.shutdown(cancel_futures=True)


def decoding_workers(images: int, asked: int | None = None) -> int:
    """Processes that decode; 0 is a thread."""
    if asked is not None:
        return asked
    if images < _DECODE_IN_PROCESS_BELOW:
        return 0
    # Two cores are busy with the network: a thread overlaps as well (Pillow lets go of Python's
    # lock), and a process more cost speed: 122 images/s against 76 with a 4.6M-parameter network.
    cores = available_cpus()
    return 0 if cores < 4 else min(16, cores // 2)


# Other machines load and export the network first, as long as a shard or two take.
MIN_SHARDS_TO_DISTRIBUTE = 4


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
        splits: which images are looked at. Test stays out until a model has been chosen.
        on_bad_image: leave unreadable images out and list them as findings, or fail.
        workers: processes that decode; default by the cores, 0 decodes in a thread.
        batch_size: images that go through the network at a time; the engine's own if None.
        progress: called with (images done, images in all).
        note: told in one line why features that are in the cache are not used.
        machines: opens others that compute the shards of a large set instead; gives None where
            there are none.

    Raises:
        DataError: a split has no readable image.
        BadImageError: an image is unreadable and `on_bad_image` is `fail`.
        VisiontunerError: the disk is full, or a decoding process died. What is done is kept.
    """
    require_images(dataset, splits)
    folder = store_folder(dataset, backbone, precision, splits, cache)
    job = _Job(
        dataset=dataset,
        backbone=backbone,
        folder=folder,
        splits=tuple(splits),
        make_engine=engine,
        workers=workers,
        on_bad_image=on_bad_image,
        batch_size=batch_size,
        progress=progress or (lambda *_: None),
        machines=machines,
    )
    computed = make_store(folder, job.run, of="features", made="computed", note=note)
    features = FeatureSet.open(folder)
    refuse_unreadable(features.findings, on_bad_image)
    return replace(features, computed=computed)


def copy_features(
    store: FeatureSet, dataset: ImageDataset, backbone: BackboneDescription, precision: Precision
) -> None:
    """Put the features of some of a store's images where `compute_features` looks for them.

    Args:
        store: complete, of the same splits.
        dataset: holds no image that the store's data set does not hold.
    """
    cache = store.folder.parent.parent
    folder = store_folder(dataset, backbone, precision, store.splits, cache)
    if folder == store.folder or find_damage(folder) is None:
        return
    reasons = {f.evidence.split(": ")[0]: f.evidence for f in store.findings}
    with locked(folder):
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        for split in store.splits:
            rows = {path: row for row, path in enumerate(store.split(split).paths)}
            features = store.split(split).features
            for shard in cut_into_shards(split, dataset.splits[split], folder):
                paths = [sample.path for sample in shard.samples]
                bad = {
                    position: reasons.get(f"Cannot read {path}", f"Cannot read {path}.")
                    for position, path in enumerate(paths)
                    if path not in rows
                }
                shard.write(features[[rows[path] for path in paths if path in rows]], bad)


def store_folder(
    dataset: ImageDataset,
    backbone: BackboneDescription,
    precision: Precision,
    splits: Sequence[str],
    cache: Path,
) -> Path:
    """Where these features are or would be: a name made of all that determines them."""
    identity = {
        "schema": [SCHEMA_VERSION, SHARD_SIZE, DECODING_VERSION],
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "preprocessing": backbone.preprocessing.to_dict(),
        "precision": precision,
    }
    return cache / "features" / store_name(identity, dataset, splits)


@dataclass
class _Job:
    """One computation of one store."""

    dataset: ImageDataset
    backbone: BackboneDescription
    folder: Path
    splits: tuple[str, ...]
    make_engine: Callable[[], Engine]
    workers: int | None
    on_bad_image: Literal["skip", "fail"]
    batch_size: int | None
    progress: Progress
    machines: Callable[[], AbstractContextManager[Machines | None]]

    def run(self) -> int:
        """Compute what is missing and put it together; the number of images computed."""
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
        if len(missing) >= MIN_SHARDS_TO_DISTRIBUTE:
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
            engine = self.make_engine()
            description = engine.description
            started = time.monotonic()
            self._compute(missing, engine, decoding_workers(todo, self.workers), done, total)
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
            raise bad_image(next(iter(bad.values())))

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


Images = NDArray[np.float32]


Features = NDArray[np.float32]


class Engine(Protocol):
    """Maps network input to features."""

    description: str
    """What runs where, for people: `ONNX Runtime fp32 on 2 CPU threads`."""

    batch_size: int
    """Images at a time at which it is fast."""

    lanes: int
    """Threads that may call `features` at the same time, and have to for it to be fast."""

    def features(self, images: Images) -> Features:
        """Feature vectors of a batch.

        Args:
            images: float32, shape (B, 3, size, size), normalised.

        Returns:
            float32, shape (B, feature_dim).
        """
        ...
