"""Trials and features on other machines than the search's own."""

from __future__ import annotations

import fcntl
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from visiontuner.data.arrays import Precision, Shard, find_damage, has_checksums
from visiontuner.experiment.schema import Model
from visiontuner.io.files import temporary_folder
from visiontuner.model.backbones import load_backbone
from visiontuner.model.features import ShardRows, compute_shards, decoding_workers
from visiontuner.model.onnx import make_engine
from visiontuner.search.plan import CHECKPOINT_FOLDER, DriverNode, TrialTask

# Trials on other machines than the search's own.
#
# A search has its folder and its features on the driver node. A worker elsewhere
# sees neither: it first fetches the files it lacks, once for all trials of its machine, and what a
# trial writes is uploaded to the driver before its report. One small actor on the driver reads and
# writes for all.


# A chunk is in memory twice, on the driver and on the worker.
_CHUNK_BYTES = 16 * 1024**2
_PAUSE_PER_UPLOAD = 19
"""Pause between two uploads of a checkpoint, over the last one's seconds: uploads take 1 / 20."""


@contextmanager
def driver_node(search_folder: Path, stores: Sequence[Path]) -> Iterator[DriverNode | None]:
    """Serve the driver's files while trials run; yields None where the cluster is one machine.

    Args:
        search_folder: what trials write goes below it, and heads that they begin with are read.
        stores: features and images that workers read.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(alive) < 2:
        yield None
        return
    node_id = ray.get_runtime_context().get_node_id()
    actor = ray.remote(_Files).options(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
    )
    files: Any = actor.remote(search_folder.resolve(), [store.resolve() for store in stores])
    try:
        yield DriverNode(node_id=node_id, files=files, search=uuid.uuid4().hex)
    finally:
        ray.kill(files)


@contextmanager
def local_copy(task: TrialTask, trial_id: str) -> Iterator[TrialTask]:
    """The task with local copies of its files; what the trial writes there is deleted after it."""
    driver = task.driver
    if driver is None or driver.is_here:
        yield task
        return
    cache = _cache(task)
    with temporary_folder() as folder:
        start = task.start_heads.get(trial_id)
        features, images = (
            store and fetch_folder(driver, store, cache)
            for store in (task.features_folder, task.images_folder)
        )
        if task.checkpoints:
            _fetch_checkpoint(driver, task.trial_folder(trial_id), Path(folder, "trials", trial_id))
        yield replace(
            task,
            search_folder=Path(folder),
            features_folder=features,
            images_folder=images,
            cache=cache,
            start_heads={trial_id: _fetch_file(driver, start, Path(folder))} if start else {},
        )


def upload_to_driver(task: TrialTask, trial_id: str, *, only: str | None = None) -> None:
    """Upload a trial's files to the search folder, if that is on another machine.

    Args:
        only: name of the one file that is sent, if it is there; default: all.
    """
    if task.driver is None or task.driver.is_here:
        return
    for path in task.trial_folder(trial_id).iterdir():
        if path.is_file() and path.suffix != ".part" and only in (None, path.name):
            _send(task.driver, path, f"trials/{trial_id}/{path.name}")


class CheckpointUpload:
    """Uploads a running trial's checkpoints to the driver: a lost machine costs no whole training.

    A checkpoint is three times its network, and training waits while it travels: the next one goes
    when that costs a twentieth of the time at most.
    """

    def __init__(self, task: TrialTask, trial_id: str, *, clock: Callable[[], float]) -> None:
        self._driver = None if task.driver is None or task.driver.is_here else task.driver
        self._folder = task.trial_folder(trial_id) / CHECKPOINT_FOLDER
        self._name = f"trials/{trial_id}/{CHECKPOINT_FOLDER}"
        self._clock = clock
        self._next = clock()

    def send(self) -> None:
        """What is on the disk now, unless the last time is too near."""
        began = self._clock()
        if self._driver is None or began < self._next:
            return
        for path in self._folder.iterdir():
            if path.suffix != ".part":
                _send(self._driver, path, f"{self._name}/{path.name}")
        ended = self._clock()
        self._next = ended + _PAUSE_PER_UPLOAD * (ended - began)


def _send(driver: DriverNode, path: Path, name: str) -> None:
    """One file in chunks; on the driver it replaces the old one once it is complete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset in range(0, max(size, 1), _CHUNK_BYTES):
            content = file.read(_CHUNK_BYTES)
            whole = offset + len(content) >= size
            ray.get(driver.files.write.remote(name, content, offset=offset, whole=whole))


_FETCHED: dict[Path, Path] = {}


def fetch_folder(driver: DriverNode, folder: Path, cache: Path) -> Path:
    """A local copy of a folder of the driver; the folder itself where the machines share it.

    A copy lies in the cache under the same name. Files that are there already, by name and size,
    are not fetched again: what the folders hold is named after all that determines it. The first
    worker of a search on a machine verifies what is there; what is damaged is fetched again.
    """
    if folder not in _FETCHED:
        sizes: dict[str, int] = ray.get(driver.files.sizes.remote(folder))
        copy = cache / folder.parent.name / folder.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            target = copy if _lacks(folder, sizes) else folder
            verified = copy.with_suffix(".verified")
            for name in _lacks(target, sizes):
                _fetch(driver, folder / name, target / name, sizes[name])
                verified.unlink(missing_ok=True)
            if not verified.is_file() or verified.read_text() != driver.search:
                if has_checksums(target) and find_damage(target) is not None:
                    for name, size in sizes.items():
                        _fetch(driver, folder / name, copy / name, size)
                    target = copy
                verified.write_text(driver.search)
        _FETCHED[folder] = target
    return _FETCHED[folder]


def _lacks(folder: Path, sizes: dict[str, int]) -> list[str]:
    return [name for name, size in sizes.items() if _size(folder / name) != size]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _fetch_file(driver: DriverNode, path: Path, folder: Path) -> Path:
    target = folder / "start" / path.name
    _fetch(driver, path, target, ray.get(driver.files.size.remote(path)))
    return target


def _fetch_checkpoint(driver: DriverNode, trial: Path, here: Path) -> None:
    """The trial's checkpoint that a lost machine had uploaded, if there is one."""
    sizes: dict[str, int] = ray.get(driver.files.sizes.remote(trial / CHECKPOINT_FOLDER))
    for name, size in sizes.items():
        _fetch(driver, trial / CHECKPOINT_FOLDER / name, here / CHECKPOINT_FOLDER / name, size)


def _fetch(driver: DriverNode, path: Path, target: Path, size: int) -> None:
    """One file in chunks; whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            for offset in range(0, size, _CHUNK_BYTES):
                file.write(ray.get(driver.files.read.remote(path, offset, _CHUNK_BYTES)))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _cache(task: TrialTask) -> Path:
    """Of this machine: its own setting, else where the driver's is."""
    own = os.environ.get("VISIONTUNER_CACHE")
    if own:
        return Path(own)
    return task.cache or Path(tempfile.gettempdir()) / "visiontuner"


class _Files:
    """Reads and writes on the driver, only below the folders that the search named."""

    def __init__(self, search_folder: Path, stores: Sequence[Path]) -> None:
        self._search = search_folder
        self._readable = (search_folder, *stores)

    def sizes(self, folder: Path) -> dict[str, int]:
        """Bytes of each file below a folder, by relative path."""
        return {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(self._allowed(folder).rglob("*"))
            if path.is_file() and path.suffix not in (".tmp", ".part")
        }

    def size(self, path: Path) -> int:
        return self._allowed(path).stat().st_size

    def read(self, path: Path, offset: int, length: int) -> bytes:
        with self._allowed(path).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, name: str, content: bytes, *, offset: int = 0, whole: bool = True) -> None:
        """A part of a file, in order; the file is there with the last one."""
        path = (self._search / name).resolve()
        if not path.is_relative_to(self._search):
            raise PermissionError(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(content)
        if whole:
            part.replace(path)

    def _allowed(self, path: Path) -> Path:
        resolved = path.resolve()
        if not any(resolved.is_relative_to(folder) for folder in self._readable):
            raise PermissionError(str(path))
        return resolved


# Features from all GPUs of a cluster: each machine takes shards of images until none is left.
#
# A machine takes part with each of its GPUs, or as a whole if it has none. It reads the images
# from its own disk, at the path where the driver has them; one that has none there computes none.


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
            views=settings.views,
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
    """Those that could load the network and see the images, with what runs it there."""
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
