"""A batch in pieces that fit into memory; out of memory halves them and goes on."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from visiontuner.errors import TrialFailed

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
                f"Out of memory in {self.where} with one picture at a time; choose a smaller "
                "model.image_size or backbone, train less of it (model.train), or run fewer "
                "trials side by side (search.gpus_per_trial, search.cpus_per_trial)."
            )
        self.size = tried // 2
        self._notes.append(
            f"out of memory in {self.where} at {tried} pictures, "
            f"going on with {self.size} at a time"
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
