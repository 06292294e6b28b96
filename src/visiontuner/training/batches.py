"""Batches of inputs and labels, from features or from images, whole or in pieces."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, get_worker_info

from visiontuner.data.arrays import DecodedImages, StoredImages, available_cpus, initialise_worker
from visiontuner.data.images import Preprocessing
from visiontuner.errors import DataError, TrialFailed, VisiontunerError
from visiontuner.experiment.schema import Augmentation
from visiontuner.training.augment import Augmenter, mix
from visiontuner.training.callbacks import TrainingCallback
from visiontuner.workarounds.python import clean_workers

# What a training runs on: batches of inputs and labels, from features or from images.


# Rows of logits computed at a time in evaluation: bounds memory, whatever the split's size.
EVALUATION_BATCH = 4096


class Batches(Protocol):
    """What `fit` trains or evaluates on."""

    @property
    def labels(self) -> Tensor:
        """int64, shape (num_samples,), in the order that `in_order` yields."""

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of (inputs, labels) batches in random order; every sample once.

        Labels are int64 (B,), or float32 (B, num_classes) with rows that sum to 1 where images
        are mixed. What is random follows from `generator` alone, or from torch's global generator.
        """

    def in_order(self) -> Iterator[Tensor]:
        """One pass over the inputs alone, in their fixed order."""


class FeatureBatches:
    """Batches of rows of a feature matrix, which may be memory-mapped.

    Args:
        features: float32, shape (num_samples, feature_dim).
        labels: int64, shape (num_samples,).
    """

    def __init__(self, features: Tensor, labels: Tensor, *, batch_size: int) -> None:
        self.features = features
        self.labels = labels
        self.batch_size = batch_size

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for rows in torch.split(order, self.batch_size):
            yield self.features.index_select(0, rows), self.labels.index_select(0, rows)

    def in_order(self) -> Iterator[Tensor]:
        yield from torch.split(self.features, EVALUATION_BATCH)


def needs_joining(network: nn.Module, *, samples: int, batch_size: int) -> bool:
    """Whether the last batch has one sample, and the network a layer that cannot learn from one."""
    return learns_from_batches(network) and samples > batch_size > 1 and samples % batch_size == 1


def learns_from_batches(network: nn.Module) -> bool:
    """Whether it has batch normalisation that learns: one sample has no variance."""
    network.train()
    return any(isinstance(m, _BatchNorm) and m.training for m in network.modules())


def join_last_single(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; a last one of a single sample becomes part of the one before it.

    Batch normalisation cannot learn from one image: it has no variance.
    """
    held: tuple[Tensor, Tensor] | None = None
    for inputs, labels in batches:
        if held is not None and len(labels) == 1:
            held = torch.cat([held[0], inputs]), torch.cat([held[1], labels])
            continue
        if held is not None:
            yield held
        held = inputs, labels
    if held is not None:
        yield held


# A batch in pieces that fit into memory; out of memory halves them and goes on.


Answer = TypeVar("Answer")

# How torch and the libraries below it say that memory ran out, where they have no class for it.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # the driver's, where other processes hold the memory
    "unable to find an engine",  # cuDNN's, when no algorithm's workspace fits
)


class MicroBatches:
    """How many samples go through the network at a time.

    Args:
        size: at most so many; None for a whole batch.
        where: "training" or "evaluation", for messages.
        fewest: what a piece must hold to be of use; one may be larger by as many as it takes.
    """

    def __init__(self, size: int | None, *, where: str, fewest: int = 1) -> None:
        self.size = size
        self.where = where
        self.fewest = fewest
        self._notes: list[str] = []

    def limit(self, size: int | None) -> None:
        """At most `size` from now on, or fewer if that is what holds already; None for any."""
        if size is not None and (self.size is None or size < self.size):
            self.size = size

    def sizes(self, count: int) -> list[int]:
        """`count` in as few pieces as fit, of even sizes: 65 by 32 at most is 22, 22 and 21.

        Where the fewest are two, 5 by 2 at most is 3 and 2: no single sample is left. A size below
        the fewest was asked for, or is all that memory holds; it stays.
        """
        if self.size is None or count <= self.size:
            return [count]
        pieces = math.ceil(count / self.size)
        if self.size >= self.fewest:
            pieces = max(1, min(pieces, count // self.fewest))
        small, larger = divmod(count, pieces)
        return [small + 1] * larger + [small] * (pieces - larger)

    def run(self, count: int, attempt: Callable[[list[int]], Answer]) -> Answer:
        """`attempt` with the sizes of the pieces, again with halved ones while memory runs out.

        Raises:
            TrialFailed: one sample at a time is still too much.
        """
        while True:
            sizes = self.sizes(count)
            try:
                return attempt(sizes)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Not within the handler: the error's frames hold what the attempt allocated.
            self._halve(max(sizes))

    def take_notes(self) -> list[str]:
        """One line for every time that memory ran out since this was last asked."""
        notes, self._notes = self._notes, []
        return notes

    def _halve(self, tried: int) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise TrialFailed(
                f"Out of memory in {self.where} with one image at a time; choose a smaller "
                "model.image_size or backbone, train less of it (model.train), or run fewer "
                "trials side by side (search.gpus_per_trial, search.cpus_per_trial)."
            )
        self.size = tried // 2
        self._notes.append(
            f"out of memory in {self.where} at {tried} images, going on with {self.size} at a time"
        )


@contextmanager
def failing_out_of_memory(batch_size: int) -> Iterator[None]:
    """Memory that runs out where no smaller pieces help, in an optimizer's state, fails a trial.

    Raises:
        TrialFailed: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrialFailed(
            f"Out of memory at batch size {batch_size} outside the network's own passes; choose a "
            "smaller batch_size or backbone."
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's or the machine's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


# What worker processes do for `ImageBatches`, and how many there should be.
#
# Workers come from a server process that knows this module and nothing of the training: no Ray, no
# CUDA context, none of its memory.


Key = tuple[int, int]
"""An image's place in its split, and the seed of its changes."""

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
    """Training images by key, decoded and changed at random; a worker maps the store itself."""

    def __init__(
        self, images: StoredImages, augmentation: Augmentation, preprocessing: Preprocessing
    ) -> None:
        self._images: StoredImages | None = images
        self._where = images.folder, images.name
        self._augment = Augmenter(augmentation, preprocessing)
        self.size = preprocessing.size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """uint8, shape (B, 3, S, S), channels last in memory."""
        try:
            if self._images is None:
                folder, name = self._where
                self._images = DecodedImages.open(folder).split(name)
            batch = torch.empty((len(keys), self.size, self.size, 3), dtype=torch.uint8)
            for row, (index, seed) in enumerate(keys):
                batch[row] = self._one(self._images, index, seed).permute(1, 2, 0)
            return _shared(batch.permute(0, 3, 1, 2))
        except VisiontunerError as error:
            return Failed(type(error), str(error))

    def _one(self, images: StoredImages, index: int, seed: int) -> Tensor:
        try:
            return self._augment(images.view(index), seed)
        except (OSError, SyntaxError):  # what Pillow says of damaged JPEG and PNG files
            raise DataError(
                f"{images.paths[index]} is damaged in {images.folder}. Delete that folder and "
                "start again."
            ) from None


def choose_workers(asked: int | None, device: torch.device) -> int:
    """How many workers; where nobody says, beside a GPU all threads of this process but one.

    On a CPU the network itself uses every thread, and an image costs a fiftieth of what the
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


def start_worker(_number: int) -> None:
    """torch watches the server that started the worker; the training may have been killed alone."""
    initialise_worker()


def worker_died(error: Exception) -> TrialFailed | None:
    """A clear line, if that is what an error of the DataLoader means."""
    # Batches of a dead worker can no longer be fetched: OSError or EOFError.
    if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
        return None
    return TrialFailed(
        "A process that prepares images died (killed, or out of memory). Run the same again, "
        "with fewer of them (training.workers) or with none (training.workers=0)."
    )


# Batches of decoded images for `fit`, prepared in worker processes where that helps.
#
# Pixels that are only read (evaluation's, and training's without augmentation) are gathered in
# this process. Views are decoded, cropped and changed at random by torch's DataLoader.


class ImageBatches:
    """Batches of the images of one split; implements `fit.Batches`.

    Every random number follows from one number that `shuffled` draws for an epoch and from the
    image's place in the split, so that the batches are the same with any number of workers.

    Args:
        augmentation: how training images are changed; `in_order` never changes one.
        workers: processes that prepare images, at most one a core; by default so many as suit
            the device and the threads of this process. 0 prepares them in this process.
        device: where the batches are handed over.
    """

    def __init__(
        self,
        images: StoredImages,
        *,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        num_classes: int,
        batch_size: int,
        workers: int | None = None,
        device: torch.device,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.device = device
        self.labels = torch.from_numpy(images.labels).to(device)
        self.callback = TrainingCallback()
        """Told when the pixels of a training batch are there, and when they are on the device."""
        self._notes: dict[str, bool] = {}  # what is other than asked for -> it was told
        self._augmentation = augmentation
        self._num_classes = num_classes
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).reshape(1, 3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._views = Views(images, augmentation, preprocessing)
        self._workers = choose_workers(workers, device)
        self._keys: list[list[Key]] = []
        self._loader: DataLoader[Tensor] | None = None

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, every image once.

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
            DataError: the store holds views of these images, for random crops.
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
        """Processes that prepare training images; 0 where this one does."""
        return 0 if self._augmentation.is_off else self._workers

    def _handed_over(self, pixels: Tensor) -> Tensor:
        self.callback.spent_on("data")
        inputs = self._normalised(pixels)
        self.callback.spent_on("to_device")
        return inputs

    def _gather(self, rows: Tensor) -> Tensor:
        """uint8, shape (B, 3, S, S), channels last in memory; pinned where it goes to a GPU."""
        pixels = torch.from_numpy(self.images.all_pixels)
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
            self._note("this process prepares the images, without worker processes")
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
        # Workers come from a server process that knows this module and nothing of the training.
        multiprocessing.set_forkserver_preload([__name__])
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
    """A 32-bit seed from an epoch's number and an image's; torch's generator takes no more."""
    return int(np.random.SeedSequence((epoch, number)).generate_state(1)[0])


def _as_it_is(batch: Any) -> Any:
    """`Views` makes whole batches; there is nothing to collate."""
    return batch
