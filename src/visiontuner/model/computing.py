"""Shards of pictures -> their features: on this machine, and what others are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from visiontuner import interrupts
from visiontuner.data.cores import available_cpus
from visiontuner.data.images import normalise
from visiontuner.model.decoding import DecodedBatch, decode_batches
from visiontuner.model.description import BackboneDescription
from visiontuner.model.shards import Shard

if TYPE_CHECKING:
    from visiontuner.model.engine import Engine

# Starting worker processes takes about as long as decoding so many photographs.
_DECODE_IN_PROCESS_BELOW = 64


class ShardRows(NamedTuple):
    """A computed shard: float32 (N, D) of its readable pictures, and why others are not there.

    `few_levels` are the positions of pictures that are nearly black, white or of one shade.
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
    """Decode the pictures of some shards and run the network over them, in order.

    Args:
        root: the data set's folder.
        workers: processes that decode, see `decoding_workers`.
        batch_size: pictures that go through the network at a time; the engine's own if None.
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


def _in_lanes(
    batches: Iterator[DecodedBatch], backbone: BackboneDescription, engine: Engine
) -> Generator[tuple[DecodedBatch, NDArray[np.float32]]]:
    """Each batch and its features, in order, as many at a time as the engine takes."""
    executor = ThreadPoolExecutor(engine.lanes, thread_name_prefix="network")
    waiting: deque[tuple[DecodedBatch, Future[NDArray[np.float32]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, executor.submit(_features, batch, backbone, engine)))
            if len(waiting) > engine.lanes + 1:  # one waits, so that no lane does
                done, features = waiting.popleft()
                yield done, interrupts.result(features)
        while waiting:
            done, features = waiting.popleft()
            yield done, interrupts.result(features)
    finally:
        executor.shutdown(cancel_futures=True)


def _features(
    batch: DecodedBatch, backbone: BackboneDescription, engine: Engine
) -> NDArray[np.float32]:
    if not batch.good:
        return np.empty((0, backbone.feature_dim), np.float32)
    return engine.features(normalise(batch.pixels, backbone.preprocessing))


def decoding_workers(pictures: int, asked: int | None = None) -> int:
    """Processes that decode; 0 is a thread."""
    if asked is not None:
        return asked
    if pictures < _DECODE_IN_PROCESS_BELOW:
        return 0
    # Two cores are busy with the network: a thread overlaps as well (Pillow lets go of Python's
    # lock), and a process more cost speed: 122 pictures/s against 76 with a 4.6M-parameter network.
    cores = available_cpus()
    return 0 if cores < 4 else min(16, cores // 2)
