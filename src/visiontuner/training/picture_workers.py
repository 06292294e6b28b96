"""What worker processes do for `PictureBatches`, and how many there should be.

Workers come from a server process that knows this module and nothing of the training: no Ray, no
CUDA context, none of its memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from visiontuner.data.images import Preprocessing
from visiontuner.data.stored_pictures import PictureStore, StoredPictures
from visiontuner.errors import DataError, TrialFailed, VisiontunerError
from visiontuner.experiment import Augmentation
from visiontuner.training.augment import Augmenter

Key = tuple[int, int]
"""A picture's place in its split, and the seed of its changes."""

PREFETCHED = 2  # batches that each worker is ahead
SHARED_MEMORY = Path("/dev/shm")
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Failed:
    """A mistake that a worker met; it crosses the process's border as a value, in one line."""

    kind: type[VisiontunerError]
    message: str

    def error(self) -> VisiontunerError:
        return self.kind(self.message)


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

    def __getitems__(self, keys: Sequence[Key]) -> Tensor | Failed:
        """uint8, shape (B, 3, S, S), channels last in memory."""
        try:
            if self._pictures is None:
                folder, name = self._where
                self._pictures = PictureStore.open(folder).split(name)
            batch = torch.empty((len(keys), self.size, self.size, 3), dtype=torch.uint8)
            for row, (index, seed) in enumerate(keys):
                batch[row] = self._one(self._pictures, index, seed).permute(1, 2, 0)
            return batch.permute(0, 3, 1, 2)
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


def default_workers(device: torch.device) -> int:
    """By the threads of this process: beside a GPU all but one prepare pictures.

    On a CPU the network itself takes every core; a process more costs speed on few of them.
    """
    threads = torch.get_num_threads()
    wanted = threads // 4 if device.type == "cpu" else max(1, threads - 1)
    return min(_MOST_WORKERS, wanted)


def workers_that_fit(wanted: int, batch_bytes: int) -> tuple[int, str | None]:
    """How many workers the shared memory allows, and a line to say so if these are fewer.

    Batches go through it: where it is full, the system kills a worker that writes to it.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # no such folder: the system shares memory in another way
        return wanted, None
    free = status.f_bavail * status.f_frsize
    # Beside those ahead, each worker makes one batch and this process holds one.
    fitting = max(0, free // batch_bytes - 1) // (PREFETCHED + 1)
    if fitting >= wanted:
        return wanted, None
    return fitting, (
        f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free: {fitting} instead of {wanted} worker "
        "processes prepare pictures; give it more (docker run --shm-size=2g)"
    )


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
    # Ctrl-C reaches the whole process group; the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_died(error: Exception) -> TrialFailed | None:
    """A clear line, if that is what an error of the DataLoader means."""
    # Batches of a dead worker can no longer be fetched: OSError or EOFError.
    if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
        return None
    return TrialFailed(
        "A process that prepares pictures died: killed, out of memory, or /dev/shm is full. Run it "
        "again with fewer of them (training.workers) or with none (training.workers=0)."
    )
