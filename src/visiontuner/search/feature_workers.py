"""Features from all GPUs of a cluster: each machine takes shards of pictures until none is left.

A machine takes part with each of its GPUs, or as a whole if it has none. It reads the pictures
from its own disk, at the path where the driver has them; one that has none there computes none.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from visiontuner.experiment import Model
from visiontuner.model.computing import ShardRows, compute_shards, decoding_workers
from visiontuner.model.shards import Shard
from visiontuner.model.store import Precision

# To fetch a network's weights and write it as ONNX; a machine that others keep busy stays out.
_READY_SECONDS = 300.0


@contextmanager
def feature_workers(
    root: Path, model: Model, precision: Precision
) -> Iterator[FeatureWorkers | None]:
    """The cluster's machines, ready to compute; None where there is one and it has at most one GPU.

    Args:
        root: the data set's folder, the same on every machine.
    """
    shares = _shares()
    workers: list[Any] = []
    if len(shares) > 1:
        maker = ray.remote(_FeatureWorker)
        workers = [
            maker.options(**share).remote(root, model.model_dump(mode="json"), precision)
            for share in shares
        ]
    try:
        ready = _ready(workers)
        yield FeatureWorkers(ready) if len(ready) > 1 else None
    finally:
        for worker in workers:
            ray.kill(worker)


class FeatureWorkers:
    """Computes shards on several machines; one that dies leaves its shard to the others."""

    def __init__(self, ready: dict[Any, str]) -> None:
        self._workers = list(ready)
        kinds = sorted(set(ready.values()))
        self.description = f"{len(ready)} machines or GPUs, each by {' or '.join(kinds)}"

    def compute(self, shards: Sequence[Shard]) -> Iterator[ShardRows]:
        """Every shard once, as they are done; those that no machine could compute are left out."""
        waiting, idle = deque(shards), list(self._workers)
        running: dict[Any, tuple[Any, Shard]] = {}
        while waiting or running:
            while waiting and idle:
                worker, shard = idle.pop(), waiting.popleft()
                running[worker.compute.remote(shard)] = worker, shard
            if not running:
                return
            (done,), _ = ray.wait(list(running))
            worker, shard = running.pop(done)
            try:
                computed: ShardRows = ray.get(done)
            except RayError:
                waiting.appendleft(shard)
                continue
            idle.append(worker)
            yield computed


class _FeatureWorker:
    """One machine's network, or that of one of its GPUs."""

    def __init__(self, root: Path, model: dict[str, Any], precision: Precision) -> None:
        from visiontuner.model.backbone import load_backbone
        from visiontuner.model.engine import make_engine

        if not root.is_dir():
            raise FileNotFoundError(root)
        settings = Model.model_validate(model)
        own = os.environ.get("VISIONTUNER_CACHE")
        cache = Path(own) if own else Path(tempfile.gettempdir()) / "visiontuner"
        self._root = root
        self._backbone = load_backbone(
            settings.backbone,
            weights=settings.weights,
            image_size=settings.image_size,
            cache=cache,
        )
        self._engine = make_engine(self._backbone, precision=precision, cache=cache)

    def describe(self) -> str:
        return self._engine.description

    def compute(self, shard: Shard) -> ShardRows:
        (computed,) = compute_shards(
            [shard],
            root=self._root,
            backbone=self._backbone,
            engine=self._engine,
            workers=decoding_workers(len(shard.samples)),
        )
        return computed


def _shares() -> list[dict[str, Any]]:
    """What each worker is made with: a GPU, or all cores of a machine without one."""
    shares = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
        if gpus:
            shares += [{"num_gpus": 1, "num_cpus": 0, "scheduling_strategy": here}] * gpus
        elif cpus:
            shares.append({"num_cpus": cpus, "scheduling_strategy": here})
    return shares


def _ready(workers: Sequence[Any]) -> dict[Any, str]:
    """Those that could load the network and see the pictures, with what runs it there."""
    asked = {worker: worker.describe.remote() for worker in workers}
    ready: dict[Any, str] = {}
    if not asked:
        return ready
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_READY_SECONDS)
    for worker, answer in asked.items():
        try:
            if answer in answered:
                ready[worker] = str(ray.get(answer))
        except RayError:
            continue
    return ready
