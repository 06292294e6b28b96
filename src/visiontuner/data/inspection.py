"""Decode every picture once, in worker processes, and remember what it turned out to be."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from pathlib import Path

from visiontuner.data.cores import available_cpus, initialise_worker
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.digests import write_json
from visiontuner.data.images import (
    DECODING_VERSION,
    decode_image,
    has_few_levels,
    open_image,
)
from visiontuner.errors import BadImageError, VisiontunerError

# 16 x 16 bits of perceptual hash. Measured: a photograph saved again, smaller or brighter is at
# most 16 bits away, two different photographs at least 90, two handwritten digits at least 26.
HASH_SIDE = 16
_BATCH = 32  # pictures in one message to a worker
_VERSION = 2


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What decoding one picture showed; `error` alone is set where it cannot be decoded."""

    format: str = ""  # Pillow's name
    width: int = 0  # pixels, as stored
    height: int = 0
    perceptual_hash: str = ""  # hexadecimal, HASH_SIDE ** 2 bits
    error: str = ""
    few_levels: bool = False


def inspect_pictures(
    dataset: ImageDataset,
    *,
    workers: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, PictureFacts]:
    """Facts by content digest; only pictures that no earlier call has seen are decoded.

    Args:
        workers: processes that decode; one for each core by default.
        progress: called with (pictures done, pictures to decode).

    Raises:
        VisiontunerError: a worker died. What was decoded until then is remembered.
    """
    store = facts_file(dataset, cache)
    facts = read_facts(store)
    paths = {s.digest: s.path for samples in dataset.splits.values() for s in samples}
    unknown = [(digest, dataset.root / path) for digest, path in paths.items()]
    unknown = [(digest, path) for digest, path in unknown if digest not in facts]
    if unknown:
        try:
            for done, (digest, found) in enumerate(_decode_all(unknown, workers), 1):
                facts[digest] = found
                if progress is not None:
                    progress(done, len(unknown))
        finally:
            write_json(store, {digest: astuple(found) for digest, found in facts.items()})
    return {digest: facts[digest] for digest in paths}


def facts_file(dataset: ImageDataset, cache: Path) -> Path:
    """Where the facts about a data set's pictures are remembered."""
    key = hashlib.sha256(os.fsencode(dataset.root.resolve())).hexdigest()[:24]
    return cache / "inspections" / f"{key}-{_VERSION}-{DECODING_VERSION}.json"


def read_facts(store: Path) -> dict[str, PictureFacts]:
    """Remembered facts by content digest; none if there is no such file or it is damaged."""
    try:
        raw = json.loads(store.read_text(encoding="utf-8"))
        return {digest: PictureFacts(*row) for digest, row in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def read_header(path: Path) -> tuple[str, int, int]:
    """Format, width and height from a picture's header.

    Raises:
        BadImageError: the header cannot be read.
    """
    with open_image(path) as image:
        return image.format or "", image.width, image.height


def _decode_all(
    pictures: Sequence[tuple[str, Path]], workers: int | None
) -> Iterator[tuple[str, PictureFacts]]:
    batches = [list(pictures[i : i + _BATCH]) for i in range(0, len(pictures), _BATCH)]
    processes = min(workers or available_cpus(), len(batches))
    # fork is unsafe in a process with threads, and torch and Ray start some.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=initialise_worker)
    try:
        for batch, found in zip(batches, pool.map(_decode_batch, _paths(batches)), strict=True):
            yield from zip([digest for digest, _ in batch], found, strict=True)
    except BrokenProcessPool:
        raise VisiontunerError(
            "A worker process that decodes pictures was killed, perhaps for its memory. "
            "Run the same command again; it goes on where it stopped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _paths(batches: Iterable[list[tuple[str, Path]]]) -> list[list[Path]]:
    return [[path for _, path in batch] for batch in batches]


def _decode_batch(paths: list[Path]) -> list[PictureFacts]:
    return [_decode(path) for path in paths]


def _decode(path: Path) -> PictureFacts:
    import imagehash  # in the workers only

    try:
        # The hash looks at 64 x 64 pixels: a photograph is decoded at an eighth of its size.
        image = decode_image(path, target=4 * HASH_SIDE)
        name, width, height = read_header(path)
    except BadImageError as error:
        return PictureFacts(error=str(error).removeprefix(f"Cannot read {path}: "))
    return PictureFacts(
        format=name,
        width=width,
        height=height,
        perceptual_hash=str(imagehash.phash(image, hash_size=HASH_SIDE)),
        few_levels=has_few_levels(image),
    )
