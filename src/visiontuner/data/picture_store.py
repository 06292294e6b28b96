"""A data set's pictures, decoded once: a training never decodes a photograph twice.

A store is named after everything that determines it: pictures, labels, preprocessing and what it is
for. Pixels for evaluation are kept as they are. A training picture that is changed at random in
every epoch is kept whole, but small.

Pictures are appended to one file a split, with a line in a progress file for every few of them, so
that a computation that was killed goes on where it stopped. Two processes that need the same store
take turns.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from visiontuner import interrupts
from visiontuner.data.arrays import META, find_damage
from visiontuner.data.cores import available_cpus
from visiontuner.data.dataset import ImageDataset, few_levels
from visiontuner.data.files import locked
from visiontuner.data.images import (
    DECODING_VERSION,
    Preprocessing,
    crop_pixels,
    decode_image,
    has_few_levels,
)
from visiontuner.data.picture_file import DecodedPicture, SplitFile
from visiontuner.data.stored_pictures import (
    SCHEMA_VERSION,
    Form,
    PictureStore,
    StoredPictures,
)
from visiontuner.errors import BadImageError, DataError
from visiontuner.journal import Finding

__all__ = ["PictureStore", "StoredPictures", "make_view", "prepare_pictures", "store_folder"]

SPLITS = ("train", "validation")

# A crop of a fifth of a view's area, as small as strong augmentation takes them, still has the
# network's input size.
_SMALLEST_CROP = 0.2
# Beyond it a random crop of usual shape cannot reach more of the picture's length.
_MAX_ASPECT_RATIO = 8
# A view of so few pixels is kept without loss: small letters and digits suffer most from JPEG.
_LOSSLESS_PIXELS = 128 * 128
_JPEG_QUALITY = 90
_MOST_THREADS = 32
_GROUP = 32  # pictures in a line of the progress file

Progress = Callable[[int, int], None]
Note = Callable[[str], None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prepare_pictures(
    dataset: ImageDataset,
    *,
    preprocessing: Preprocessing,
    cache: Path,
    augmented: bool,
    on_bad_image: Literal["skip", "fail"] = "skip",
    workers: int | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> PictureStore:
    """The decoded pictures for training and validation, from the store or made now.

    Args:
        augmented: keep training pictures whole, for random crops, instead of cropped as in
            evaluation.
        on_bad_image: leave unreadable pictures out and list them as findings, or fail.
        workers: threads that decode; by default one a core.
        progress: called with (pictures done, pictures in all).

    Raises:
        DataError: a split has no readable picture.
        BadImageError: a picture is unreadable and `on_bad_image` is `fail`.
        VisiontunerError: the disk is full. What is done is kept.
    """
    for split in SPLITS:
        if not dataset.splits[split]:
            raise DataError(f"{dataset.root} has no pictures for {split}. Add some.")
    folder = store_folder(dataset, preprocessing, cache, augmented=augmented)
    computed = 0
    if find_damage(folder) is not None:
        with locked(folder):
            damage = find_damage(folder)
            if damage is not None:  # else another process has done it meanwhile
                if (folder / META).exists() and note is not None:
                    note(f"The decoded pictures in {folder} {damage}: they are decoded anew.")
                (folder / META).unlink(missing_ok=True)
                computed = _Job(
                    dataset=dataset,
                    preprocessing=preprocessing,
                    folder=folder,
                    forms={"train": "views" if augmented else "pixels", "validation": "pixels"},
                    on_bad_image=on_bad_image,
                    workers=workers or min(_MOST_THREADS, available_cpus()),
                    progress=progress or (lambda _done, _total: None),
                ).run()
    store = PictureStore.open(folder)
    unreadable = [one for one in store.findings if one.rule == "unreadable_picture"]
    if on_bad_image == "fail" and unreadable:
        raise _bad_image(unreadable[0].evidence)
    return replace(store, computed=computed)


def store_folder(
    dataset: ImageDataset, preprocessing: Preprocessing, cache: Path, *, augmented: bool
) -> Path:
    """Where these pictures lie: a name made of all that determines them."""
    identity = {
        "schema": [
            SCHEMA_VERSION,
            _SMALLEST_CROP,
            _MAX_ASPECT_RATIO,
            _JPEG_QUALITY,
            DECODING_VERSION,
        ],
        "data": dataset.digest,
        "class_names": dataset.class_names,
        "preprocessing": preprocessing.to_dict(),
        "augmented": augmented,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for split in SPLITS:
        digest.update(f"\n{split}\n".encode())
        for sample in dataset.splits[split]:
            row = f"{sample.digest} {sample.label} {sample.path}\n"
            digest.update(row.encode(errors="surrogateescape"))  # a name need not be UTF-8
    return cache / "pictures" / digest.hexdigest()[:32]


def view_side(preprocessing: Preprocessing) -> int:
    """The shorter side of a view, pixels: its small crops have the network's input size."""
    return max(preprocessing.resize, math.ceil(preprocessing.size / math.sqrt(_SMALLEST_CROP)))


def make_view(source: Path, preprocessing: Preprocessing) -> bytes:
    """A training picture as a small JPEG (or, if it is tiny, PNG) file.

    A picture whose shorter side is more than `view_side` is made smaller; none is made larger.

    Raises:
        BadImageError: as `decode_image`.
    """
    side = view_side(preprocessing)
    return _encode_view(decode_image(source, target=side), side)


def _encode_view(image: Image.Image, side: int) -> bytes:
    image = _limit_aspect_ratio(image)
    shorter = min(image.size)
    file = io.BytesIO()
    if shorter > side:
        width, height = (max(side, round(length * side / shorter)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
    elif image.width * image.height <= _LOSSLESS_PIXELS:
        image.save(file, "PNG", compress_level=1)
    else:  # it will be enlarged: what JPEG loses would show
        image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One computation of one store."""

    dataset: ImageDataset
    preprocessing: Preprocessing
    folder: Path
    forms: dict[str, Form]
    on_bad_image: Literal["skip", "fail"]
    workers: int
    progress: Progress

    def run(self) -> int:
        """Decode what is missing and declare the store complete; the number decoded."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [
            SplitFile(self.folder, split, form, self.dataset.splits[split])
            for split, form in self.forms.items()
        ]
        total = sum(len(file.samples) for file in files)
        todo = total - sum(file.done for file in files)
        self.progress(total - todo, total)
        findings: list[Finding] = []
        done = total - todo
        for file in files:
            for group in self._decoded(file):
                file.append(group)
                done += len(group)
                self.progress(done, total)
            findings += file.finish()
        found = few_levels([path for file in files for path in file.few_levels()])
        findings += [Finding(**found.to_dict())] if found else []
        PictureStore(
            folder=self.folder,
            class_names=self.dataset.class_names,
            preprocessing=self.preprocessing,
            forms=self.forms,
            findings=tuple(findings),
            seconds=round(time.monotonic() - began, 3),
        ).write()
        for file in files:
            file.forget_progress()
        return todo

    def _decoded(self, file: SplitFile) -> Iterator[list[DecodedPicture | BadImageError]]:
        """What the file still lacks, some pictures at a time."""
        decode = partial(self._decode, form=file.form)
        paths = [self.dataset.root / sample.path for sample in file.samples[file.done :]]
        group: list[DecodedPicture | BadImageError] = []
        for result in _map_ahead(decode, paths, workers=self.workers):
            if isinstance(result, BadImageError) and self.on_bad_image == "fail":
                raise _bad_image(str(result))
            group.append(result)
            if len(group) == _GROUP:
                yield group
                group = []
        if group:
            yield group

    def _decode(self, path: Path, form: Form) -> DecodedPicture | BadImageError:
        views = form == "views"
        side = view_side(self.preprocessing) if views else self.preprocessing.resize
        try:
            image = decode_image(path, target=side)
        except BadImageError as error:
            return error
        pixels = None if views else crop_pixels(image, self.preprocessing)
        return DecodedPicture(
            content=_encode_view(image, side) if pixels is None else pixels.tobytes(),
            few_levels=has_few_levels(image if pixels is None else pixels),
        )


def _map_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, workers: int
) -> Iterator[_Result]:
    """`map` in threads, in order, with a bounded number of results waiting.

    Threads suffice: Pillow lets go of Python's lock while it decodes, resizes and encodes.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * workers:
                    yield interrupts.result(waiting.popleft())
            while waiting:
                yield interrupts.result(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _limit_aspect_ratio(image: Image.Image) -> Image.Image:
    limit = _MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= limit:
        return image
    width, height = (min(length, limit) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _bad_image(reason: str) -> BadImageError:
    return BadImageError(f"{reason} Repair or delete it, or set `data.on_bad_image: skip`.")
