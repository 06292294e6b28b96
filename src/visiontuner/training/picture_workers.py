"""What worker processes do for `PictureBatches`, and how many there should be.

Workers come from a server process that knows this module and nothing of the training: no Ray, no
CUDA context, none of its memory.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from visiontuner.data.cores import available_cpus, initialise_worker
from visiontuner.data.images import Preprocessing
from visiontuner.data.stored_pictures import PictureStore, StoredPictures
from visiontuner.errors import DataError, TrialFailed, VisiontunerError
from visiontuner.experiment import Augmentation
from visiontuner.training.augment import Augmenter

Key = tuple[int, int]
"""A picture's place in its split, and the seed of its changes."""

PREFETCHED = 2  # batches that each worker is ahead
SHARED_MEMORY = Path("/dev/shm")
_QUEUES_BYTES = 1_000_000  # 17 queues of 4 locks, a page of 4 kB each, are 280 kB
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Failed:
    """A mistake that a worker met; it crosses the process's border as a value, in one line."""

    kind: type[VisiontunerError]
    message: str

    def error(self) -> VisiontunerError:
        return self.kind(self.message)


Batch = Tensor | NDArray[np.uint8] | Failed
"""Pixels, uint8 (B, 3, S, S); an array where the shared memory was full."""


class Views(Dataset[Tensor]):
    """Training pictures by key, decoded and changed at random; a worker maps the store itself."""

    def __init__(
        self, pictures: StoredPictures, augmentation: Augmentation, preprocessing: Preprocessing
    ) -> None:
        self._pictures: StoredPictures | None = pictures
        self._where = pictures.folder, pictures.name
        self._augment = Augmenter(augmentation, preprocessing)
        self.size = preprocessing.size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pictures": None}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """uint8, shape (B, 3, S, S), channels last in memory."""
        try:
            if self._pictures is None:
                folder, name = self._where
                self._pictures = PictureStore.open(folder).split(name)
            batch = torch.empty((len(keys), self.size, self.size, 3), dtype=torch.uint8)
            for row, (index, seed) in enumerate(keys):
                batch[row] = self._one(self._pictures, index, seed).permute(1, 2, 0)
            return _shared(batch.permute(0, 3, 1, 2))
        except VisiontunerError as error:
            return Failed(type(error), str(error))

    def _one(self, pictures: StoredPictures, index: int, seed: int) -> Tensor:
        try:
            return self._augment(pictures.view(index), seed)
        except (OSError, SyntaxError):  # what Pillow says of damaged JPEG and PNG files
            raise DataError(
                f"{pictures.paths[index]} is damaged in {pictures.folder}. Delete that folder and "
                "start again."
            ) from None


def choose_workers(asked: int | None, device: torch.device) -> int:
    """How many workers; where nobody says, beside a GPU all threads of this process but one.

    On a CPU the network itself uses every thread, and a picture costs a fiftieth of what the
    network does with it: one worker for four threads. More than there are cores help nobody.
    """
    threads = torch.get_num_threads()
    by_threads = threads // 4 if device.type == "cpu" else max(1, threads - 1)
    wanted = by_threads if asked is None else asked
    return min(wanted, _MOST_WORKERS, available_cpus())


def _shared(batch: Tensor) -> Tensor | NDArray[np.uint8]:
    """A batch in shared memory, so that it is not copied; else one that goes through a pipe.

    Left to torch, this happens where an error is lost, and the training would wait forever.
    """
    if get_worker_info() is None:
        return batch
    try:
        batch.share_memory_()  # type: ignore[no-untyped-call]
        return batch
    except RuntimeError:  # it is full: 64 MB is what a container has by default
        array: NDArray[np.uint8] = batch.numpy()
        return array


def room_for_queues() -> bool:
    """Whether workers can be talked to at all: each queue's locks take pages of shared memory."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # no such folder: the system shares memory in another way
        return True
    return status.f_bavail * status.f_frsize >= _QUEUES_BYTES


@contextmanager
def clean_workers() -> Iterator[None]:
    """Start workers that do not import the caller's script again, and Ray with it."""
    multiprocessing.set_forkserver_preload([__name__])
    main = sys.modules["__main__"]
    missing = object()
    kept = {name: main.__dict__.get(name, missing) for name in ("__file__", "__spec__")}
    main.__dict__.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is missing:
                del main.__dict__[name]
            else:
                main.__dict__[name] = value


def start_worker(_number: int) -> None:
    """torch watches the server that started the worker; the training may have been killed alone."""
    initialise_worker()


def worker_died(error: Exception) -> TrialFailed | None:
    """A clear line, if that is what an error of the DataLoader means."""
    # Batches of a dead worker can no longer be fetched: OSError or EOFError.
    if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
        return None
    return TrialFailed(
        "A process that prepares pictures died (killed, or out of memory). Run the same again, "
        "with fewer of them (training.workers) or with none (training.workers=0)."
    )
