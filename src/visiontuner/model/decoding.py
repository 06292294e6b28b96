"""Pictures -> pixels in worker processes, in order and with a bounded number in flight.

No torch here: a worker starts in a fraction of a second and takes little memory.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontuner import interrupts
from visiontuner.data.cores import initialise_worker
from visiontuner.data.images import Preprocessing, has_few_levels, read_pixels
from visiontuner.errors import BadImageError, VisiontunerError


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Pixels of the pictures that could be read, and why the others could not.

    Args:
        pixels: uint8, shape (number of good pictures, size, size, 3).
        good: their positions in the batch.
        bad: position -> reason.
        few_levels: positions of pictures that are nearly black, white or of one shade.
    """

    pixels: NDArray[np.uint8]
    good: list[int]
    bad: dict[int, str]
    few_levels: list[int]


def decode_batches(
    root: Path, batches: Sequence[Sequence[str]], preprocessing: Preprocessing, *, workers: int
) -> Generator[DecodedBatch]:
    """Decode batches of paths, ahead of whoever takes them.

    Args:
        root: what the paths are relative to.
        workers: processes; 0 decodes in a thread of this process.

    Raises:
        VisiontunerError: a worker process died.
    """
    executor = _executor(workers)
    waiting: deque[Future[DecodedBatch]] = deque()
    remaining = iter(batches)
    try:
        for _ in range(len(batches)):
            # Two batches ahead of each worker hide its start and a slow picture.
            while len(waiting) < 2 * max(workers, 1) + 1:
                paths = next(remaining, None)
                if paths is None:
                    break
                waiting.append(executor.submit(decode_batch, root, paths, preprocessing))
            yield interrupts.result(waiting.popleft())
    except BrokenProcessPool:
        raise VisiontunerError(
            "A process that decodes pictures died (killed, or out of memory). Run the same again: "
            "it goes on where it stopped. A script needs `if __name__ == '__main__':`."
        ) from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def decode_batch(root: Path, paths: Sequence[str], preprocessing: Preprocessing) -> DecodedBatch:
    """Decode some pictures, one after the other."""
    pixels: list[NDArray[np.uint8]] = []
    good: list[int] = []
    bad: dict[int, str] = {}
    for position, path in enumerate(paths):
        try:
            pixels.append(read_pixels(root / path, preprocessing))
            good.append(position)
        except BadImageError as error:
            bad[position] = str(error)
    size = preprocessing.size
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    few = [i for i, picture in zip(good, pixels, strict=True) if has_few_levels(picture)]
    return DecodedBatch(pixels=stacked, good=good, bad=bad, few_levels=few)


def _executor(workers: int) -> Executor:
    if workers == 0:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
    # spawn: a fork would copy the locks of torch's and ONNX Runtime's threads.
    return ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=initialise_worker,
    )
