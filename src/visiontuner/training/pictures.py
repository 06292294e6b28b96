"""Batches of decoded pictures for `fit`, prepared in worker processes where that helps.

Pixels that are only read (evaluation's, and training's without augmentation) are gathered in this
process. Views are decoded, cropped and changed at random by torch's DataLoader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visiontuner.data.images import Preprocessing
from visiontuner.data.stored_pictures import StoredPictures
from visiontuner.experiment import Augmentation
from visiontuner.training.augment import mix
from visiontuner.training.picture_workers import (
    PREFETCHED,
    Batch,
    Failed,
    Key,
    Views,
    choose_workers,
    clean_workers,
    room_for_queues,
    start_worker,
    worker_died,
)
from visiontuner.training.watch import Watch


class PictureBatches:
    """Batches of the pictures of one split; implements `fit.Batches`.

    Every random number follows from one number that `shuffled` draws for an epoch and from the
    picture's place in the split, so that the batches are the same with any number of workers.

    Args:
        augmentation: how training pictures are changed; `in_order` never changes one.
        workers: processes that prepare pictures, at most one a core; by default so many as suit
            the device and the threads of this process. 0 prepares them in this process.
        device: where the batches are handed over.
    """

    def __init__(
        self,
        pictures: StoredPictures,
        *,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        num_classes: int,
        batch_size: int,
        workers: int | None = None,
        device: torch.device,
    ) -> None:
        self.pictures = pictures
        self.batch_size = batch_size
        self.device = device
        self.labels = torch.from_numpy(pictures.labels).to(device)
        self.watch = Watch()
        """Told when the pixels of a training batch are there, and when they are on the device."""
        self._notes: dict[str, bool] = {}  # what is other than asked for -> it was told
        self._augmentation = augmentation
        self._num_classes = num_classes
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).reshape(1, 3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._views = Views(pictures, augmentation, preprocessing)
        self._workers = choose_workers(workers, device)
        self._keys: list[list[Key]] = []
        self._loader: DataLoader[Tensor] | None = None

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, every picture once.

        Yields:
            Inputs, float32 (B, 3, S, S), normalised; and labels, int64 (B,), or float32
            (B, num_classes) with MixUp or CutMix.

        Raises:
            TrialFailed: a worker process died.
            DataError: the store is gone.
        """
        order = torch.randperm(len(self.labels), generator=generator)
        batches = torch.split(order, self.batch_size)
        # At once for the epoch: rows that go to a GPU in every step would make each step wait.
        labels_of = torch.split(self.labels[order.to(self.device)], self.batch_size)
        if self._augmentation.is_off:
            for rows, labels in zip(batches, labels_of, strict=True):
                yield self._handed_over(self._gather(rows)), labels
            return
        epoch = int(torch.randint(2**62, (), generator=generator))
        keys = [[(int(row), _seed(epoch, int(row))) for row in rows] for rows in batches]
        prepared = zip(self._prepared(keys), labels_of, strict=True)
        for number, (pixels, labels) in enumerate(prepared, start=len(self.labels)):
            yield self._mixed(self._handed_over(pixels), labels, _seed(epoch, number))

    def in_order(self) -> Iterator[Tensor]:
        """One pass over the inputs, float32 (B, 3, S, S), as evaluation reads them.

        Raises:
            DataError: the store holds views of these pictures, for random crops.
        """
        for rows in torch.split(torch.arange(len(self.labels)), self.batch_size):
            yield self._normalised(self._gather(rows))

    def take_notes(self) -> list[str]:
        """What is other than asked for, a line each; every line is given once."""
        notes = [note for note, told in self._notes.items() if not told]
        self._notes.update(dict.fromkeys(notes, True))
        return notes

    def close(self) -> None:
        """End the worker processes; another epoch would start new ones."""
        self._loader = None

    @property
    def workers(self) -> int:
        """Processes that prepare training pictures; 0 where this one does."""
        return 0 if self._augmentation.is_off else self._workers

    def _handed_over(self, pixels: Tensor) -> Tensor:
        self.watch.spent_on("data")
        inputs = self._normalised(pixels)
        self.watch.spent_on("to_device")
        return inputs

    def _gather(self, rows: Tensor) -> Tensor:
        """uint8, shape (B, 3, S, S), channels last in memory; pinned where it goes to a GPU."""
        pixels = torch.from_numpy(self.pictures.all_pixels)
        size = (len(rows), *pixels.shape[1:])
        gathered = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return torch.index_select(pixels, 0, rows, out=gathered).permute(0, 3, 1, 2)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """As `data.images.normalise`, on the device; the memory format stays."""
        images = pixels.to(self.device, non_blocking=True).float()
        return images.div_(255).sub_(self._mean).div_(self._std)

    def _mixed(self, inputs: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if self._augmentation.mixup == 0 and self._augmentation.cutmix == 0:
            return inputs, labels
        generator = torch.Generator().manual_seed(seed)
        return mix(
            inputs,
            labels,
            self._augmentation,
            num_classes=self._num_classes,
            generator=generator,
        )

    def _prepared(self, keys: list[list[Key]]) -> Iterator[Tensor]:
        """uint8 (B, 3, S, S) for each list of keys."""
        if self._workers and self._loader is None and not room_for_queues():
            self._note("this process prepares the pictures, without worker processes")
            self._workers = 0
        in_process = map(self._views.__getitems__, keys)
        for batch in self._by_workers(keys) if self._workers else in_process:
            if isinstance(batch, Failed):
                self.close()
                raise batch.error()
            if isinstance(batch, np.ndarray):
                self._note("batches take the slower way through a pipe")
                batch = torch.from_numpy(batch)
            yield batch

    def _by_workers(self, keys: list[list[Key]]) -> Iterator[Batch]:
        self._keys[:] = keys
        try:
            yield from self._started()
            return
        except (RuntimeError, OSError, EOFError) as error:
            failure = worker_died(error) or error
        # Not within the handler: the error's frames would keep the other workers alive.
        self.close()
        raise failure

    def _started(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._make_loader()
        with clean_workers():  # the first time, this starts them
            return iter(self._loader)

    def _note(self, what: str) -> None:
        note = f"/dev/shm is full: {what}; give it more memory (docker run --shm-size=2g)"
        self._notes.setdefault(note, False)

    def _make_loader(self) -> DataLoader[Tensor]:
        return DataLoader(
            self._views,
            batch_sampler=self._keys,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            worker_init_fn=start_worker,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCHED,
            multiprocessing_context="forkserver",
            generator=torch.Generator(),  # else it would draw from the one that dropout uses
        )


def _seed(epoch: int, number: int) -> int:
    """A 32-bit seed from an epoch's number and a picture's; torch's generator takes no more."""
    return int(np.random.SeedSequence((epoch, number)).generate_state(1)[0])


def _as_it_is(batch: Any) -> Any:
    """`Views` makes whole batches; there is nothing to collate."""
    return batch
