"""Arrays that are computed once and memory-mapped afterwards: features and decoded images."""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib.format import write_array_header_2_0
from numpy.typing import NDArray
from PIL import Image

from visiontuner import interrupts
from visiontuner.data.dataset import (
    ImageDataset,
    Sample,
    few_levels,
    none_readable,
    unreadable_image,
)
from visiontuner.data.images import (
    DECODING_VERSION,
    Preprocessing,
    crop_pixels,
    decode_image,
    has_few_levels,
    read_pixels,
)
from visiontuner.errors import BadImageError, ClassifierError, DataError, VisiontunerError
from visiontuner.io.files import cannot_write, flush_to_disk, locked, write_atomically, write_json
from visiontuner.journal import Finding

# How many cores there are to use, and the processes that use them.


def available_cpus() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def initialise_worker() -> None:
    """Called first in every worker process: it leaves Ctrl-C to its parent and ends with it."""
    # They reach the whole process group; the parent answers them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next batch forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# Folders of arrays that are computed once: committed with checksums, verified when opened.
#
# `meta.json` is written last and holds the size and CRC-32 of every file beside it, so that what a
# power cut or a bad disk left is told from what was written. A checksum is no protection against
# whoever changes files on purpose.


SCHEMA_VERSION = 1
META = "meta.json"
CHECKSUMS = "checksums"
# 4 GB/s on a core where BLAKE2b takes 0.9 and SHA-256, with instructions for it, 1.7: 512 MB of
# features are read and compared in 0.3 s.
_CHECKSUM_BLOCK = 1 << 20

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def commit_folder(folder: Path, meta: Mapping[str, Any], files: Iterable[str]) -> None:
    """Declare a folder complete: its files reach the disk, then the `meta.json` that says so.

    Args:
        meta: what else `meta.json` holds.
        files: names, relative to the folder, of all that has to be there.

    Raises:
        VisiontunerError: the disk is full or broken.
    """
    try:
        checksums = {}
        for name in files:
            checksums[name] = file_checksum(folder / name)
            flush_to_disk(folder / name)
        _flush_folder(folder)
        write_json(folder / META, {**meta, CHECKSUMS: checksums})
        flush_to_disk(folder / META)
        _flush_folder(folder)
    except OSError as error:
        raise cannot_write(folder / META, error) from None


def find_damage(folder: Path, files: Iterable[str] | None = None) -> str | None:
    """What is wrong with a committed folder, as the end of a sentence; None if it is as written.

    A folder without checksums, as earlier versions left it, cannot be verified: that is damage too.

    Args:
        files: verify only these; default: all that were committed.
    """
    checksums = _read_checksums(folder)
    if checksums is None:
        return "carry no checksums"
    for name in checksums if files is None else files:
        try:
            if file_checksum(folder / name) != checksums.get(name):
                return f"are damaged ({name} is not what was written)"
        except OSError:
            return f"are incomplete ({name} is missing or cannot be read)"
    return None


def has_checksums(folder: Path) -> bool:
    """Whether a folder was committed with checksums."""
    return _read_checksums(folder) is not None


def file_checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file.

    Raises:
        OSError: it cannot be read.
    """
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BLOCK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]


def content_checksum(parts: Iterable[tuple[str, NDArray[np.uint8]]]) -> str:
    """CRC-32 (hex) over names and bytes, in their order; the arrays are contiguous."""
    checksum = 0
    for name, content in parts:
        checksum = zlib.crc32(content.data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def make_store(
    folder: Path, make: Callable[[], int], *, of: str, made: str, note: Note | None
) -> int:
    """Make what a folder holds, unless it is there as it was committed.

    Args:
        make: fills and commits the folder; returns how many images it computed.
        of, made: what the folder holds, and what is done to it, for the note.
        note: told in one line why what is there is not used.

    Returns:
        What `make` returned; 0 if all was there, from another process perhaps.
    """
    if find_damage(folder) is None:
        return 0
    with locked(folder):
        damage = find_damage(folder)
        if damage is None:  # another process has done it meanwhile
            return 0
        if (folder / META).exists() and note is not None:
            note(f"The {of} in {folder} {damage}: they are {made} anew.")
        (folder / META).unlink(missing_ok=True)
        return make()


def store_name(identity: Mapping[str, Any], dataset: ImageDataset, splits: Sequence[str]) -> str:
    """A folder's name, made of all that determines what it holds: the images and what is said."""
    told = {**identity, "data": dataset.digest, "class_names": dataset.class_names}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for split in splits:
        digest.update(f"\n{split}\n".encode())
        for sample in dataset.splits[split]:
            row = f"{sample.digest} {sample.label} {sample.path}\n"
            digest.update(row.encode(errors="surrogateescape"))  # a name need not be UTF-8
    return digest.hexdigest()[:32]


def require_images(dataset: ImageDataset, splits: Iterable[str]) -> None:
    """Raises DataError: a split has no images."""
    for split in splits:
        if not dataset.splits[split]:
            raise DataError(f"{dataset.root} has no images for {split}. Add some.")


def refuse_unreadable(findings: Iterable[Finding], on_bad_image: Literal["skip", "fail"]) -> None:
    """Raises BadImageError: one of the findings is an unreadable image that may not be left out."""
    for one in findings:
        if on_bad_image == "fail" and one.rule == "unreadable_image":
            raise bad_image(one.evidence)


def bad_image(reason: str) -> BadImageError:
    """What is said of an unreadable image where none may be left out."""
    return BadImageError(f"{reason} Repair or delete it, or set `data.on_bad_image: skip`.")


def _read_meta(folder: Path) -> dict[str, Any]:
    """Raises OSError, ValueError, KeyError, TypeError: none that this code reads."""
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    if meta["schema_version"] != SCHEMA_VERSION:
        raise ValueError
    return meta


def _read_checksums(folder: Path) -> dict[str, list[int]] | None:
    try:
        checksums = json.loads((folder / META).read_text(encoding="utf-8"))[CHECKSUMS]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return checksums if isinstance(checksums, dict) else None


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    with suppress(OSError):
        flush_to_disk(folder)


# Images -> pixels in worker processes, in order and with a bounded number in flight.
#
# No torch here: a worker starts in a fraction of a second and takes little memory.


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Pixels of the images that could be read, and why the others could not.

    Args:
        pixels: uint8, shape (number of good images, size, size, 3).
        good: their positions in the batch.
        bad: position -> reason.
        few_levels: positions of images that are nearly black, white or of one shade.
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
    decode = partial(decode_batch, root, preprocessing=preprocessing)
    try:
        # Two batches ahead of each worker hide its start and a slow image.
        yield from interrupts.map_ahead(executor, decode, batches, ahead=2 * max(workers, 1))
    except BrokenProcessPool:
        raise VisiontunerError(
            "A process that decodes images died (killed, or out of memory). Run the same again: "
            "it goes on where it stopped. A script needs `if __name__ == '__main__':`."
        ) from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def decode_batch(root: Path, paths: Sequence[str], preprocessing: Preprocessing) -> DecodedBatch:
    """Decode some images, one after the other."""
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
    few = [i for i, image in zip(good, pixels, strict=True) if has_few_levels(image)]
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


# Feature vectors on disk: what trials read, memory-mapped and without torch.
#
# features/KEY/   meta.json                   written last: a store that has it is complete; with
# checksums   train.features.npy          float32 (N, D), the images that could be read, in order
# train.labels.npy            int64 (N,)   train.samples.json          their paths and content
# digests   shards/                     while it is being computed


Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """One split of a data set as feature vectors.

    Args:
        features: float32, shape (N, D); memory-mapped, copy-on-write: pages are shared between
            processes until one writes to its own.
        labels: int64, shape (N,), indices into the class names.
        paths: N posix paths, relative to the data set's root.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    paths: list[str]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """A complete feature store.

    Args:
        folder: open it again by this path, in any process.
        findings: one for each image that could not be read.
        engine: what ran the network.
        seconds: how long the network ran, all sessions together.
        computed: images computed by the call that returned this; 0 if all were there.
    """

    folder: Path
    class_names: tuple[str, ...]
    feature_dim: int
    splits: tuple[str, ...]
    findings: tuple[Finding, ...]
    engine: str
    seconds: float
    computed: int = 0

    @classmethod
    def open(cls, folder: Path) -> FeatureSet:
        """Read a store's description; its arrays are mapped by `split`.

        Raises:
            DataError: there is no complete store of a version that this code reads.
        """
        try:
            meta = _read_meta(folder)
            return cls(
                folder=folder,
                class_names=tuple(meta["class_names"]),
                feature_dim=int(meta["feature_dim"]),
                splits=tuple(meta["splits"]),
                findings=tuple(Finding(**finding) for finding in meta["findings"]),
                engine=meta["engine"],
                seconds=float(meta["seconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{folder} holds no complete features. Start the search again to compute them."
            ) from None

    def split(self, name: str) -> SplitFeatures:
        """Map one split.

        Raises:
            DataError: the store has no such split, or its files are damaged.
        """
        if name not in self.splits:
            raise DataError(
                f"The features in {self.folder} have no split {name!r}, only "
                f"{', '.join(self.splits)}."
            )
        try:
            features = np.load(array_path(self.folder, name, "features"), mmap_mode="c")
            labels = np.load(array_path(self.folder, name, "labels"), allow_pickle=False)
            samples = json.loads(samples_path(self.folder, name).read_text(encoding="utf-8"))
            if features.shape != (len(labels), self.feature_dim):
                raise ValueError
            return SplitFeatures(features=features, labels=labels, paths=samples["paths"])
        except (OSError, ValueError, KeyError, EOFError):
            raise DataError(
                f"The features in {self.folder} are damaged. Delete that folder and start again."
            ) from None


def array_path(folder: Path, split: str, kind: str) -> Path:
    return folder / f"{split}.{kind}.npy"


def samples_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.samples.json"


def feature_files(split: str) -> tuple[str, ...]:
    """The names of a split's files in its store."""
    return tuple(
        path.name
        for path in (
            array_path(Path(), split, "features"),
            array_path(Path(), split, "labels"),
            samples_path(Path(), split),
        )
    )


def write_meta(features: FeatureSet) -> None:
    """Declare a store complete; raises as `commit_folder`."""
    meta = {
        "schema_version": SCHEMA_VERSION,
        "class_names": features.class_names,
        "feature_dim": features.feature_dim,
        "splits": features.splits,
        "findings": [asdict(finding) for finding in features.findings],
        "engine": features.engine,
        "seconds": features.seconds,
    }
    files = [name for split in features.splits for name in feature_files(split)]
    commit_folder(features.folder, meta, files)


# The pieces in which features are computed, and how they become one store.


SHARD_SIZE = 256
FOLDER = "shards"


@dataclass(frozen=True)
class Shard:
    """Up to SHARD_SIZE neighbouring images of one split."""

    split: str
    number: int
    samples: tuple[Sample, ...]
    store: Path

    @property
    def path(self) -> Path:
        return self.store / FOLDER / f"{self.split}-{self.number:06d}.npy"

    @property
    def bad_path(self) -> Path:
        return self.path.with_suffix(".bad.json")

    def batches(self, batch_size: int) -> list[tuple[int, int]]:
        """(start, end) of each batch in the shard."""
        length = len(self.samples)
        return list(pairwise([*range(0, length, batch_size), length]))

    def bad(self) -> dict[int, str]:
        """Position in the shard -> why that image could not be read."""
        return {int(position): reason for position, reason in self._facts()["bad"].items()}

    def few_levels(self) -> list[str]:
        """Paths of its images that are nearly black, white or of one shade."""
        return [self.samples[position].path for position in self._facts()["few_levels"]]

    def rows(self) -> NDArray[np.float32]:
        """Features of the readable images, float32 (N, D)."""
        rows: NDArray[np.float32] = np.load(self.path, allow_pickle=False)
        return rows

    def is_done(self) -> bool:
        """Whether the shard is on disk, as it was written."""
        try:
            rows = self.rows()
            if _checksum_of_rows(rows) != self._facts()["checksum"]:
                return False
            return len(rows) + len(self.bad()) == len(self.samples)
        except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError):
            return False

    def write(
        self, rows: NDArray[np.float32], bad: Mapping[int, str], few_levels: Sequence[int] = ()
    ) -> None:
        """Keep the shard with the checksum of its rows: what a power cut spoils is seen."""
        facts = {"bad": bad, "few_levels": list(few_levels), "checksum": _checksum_of_rows(rows)}
        write_json(self.bad_path, facts)
        write_atomically(self.path, lambda file: np.save(file, rows, allow_pickle=False))

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.bad_path.read_text(encoding="utf-8"))
        return facts


def _checksum_of_rows(rows: NDArray[np.float32]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).data)


def cut_into_shards(split: str, samples: Sequence[Sample], store: Path) -> Iterator[Shard]:
    for number, start in enumerate(range(0, len(samples), SHARD_SIZE)):
        yield Shard(split, number, tuple(samples[start : start + SHARD_SIZE]), store)


def assemble(shards: Sequence[Shard], store: FeatureSet) -> None:
    """One array a split, then the mark that all is there; then the shards go.

    Args:
        shards: all of them, computed.
        store: the description to write; its findings are filled in.

    Raises:
        DataError: a split has no readable image.
    """
    findings: list[Finding] = []
    for split in store.splits:
        own = [shard for shard in shards if shard.split == split]
        bad = {shard.path: shard.bad() for shard in own}
        findings += [
            unreadable_image(shard.samples[position], reason)
            for shard in own
            for position, reason in sorted(bad[shard.path].items())
        ]
        good = [
            sample
            for shard in own
            for position, sample in enumerate(shard.samples)
            if position not in bad[shard.path]
        ]
        if not good:
            raise none_readable(split, findings)
        _write_split(own, good, store, split)
    found = few_levels([path for shard in shards for path in shard.few_levels()])
    findings += [Finding(**found.to_dict())] if found else []
    write_meta(replace(store, findings=tuple(findings)))
    shutil.rmtree(store.folder / FOLDER, ignore_errors=True)


def _write_split(
    shards: Sequence[Shard], samples: Sequence[Sample], store: FeatureSet, split: str
) -> None:
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    listing = {"paths": [s.path for s in samples], "digests": [s.digest for s in samples]}
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(samples), store.feature_dim)}

    def write_features(file: BinaryIO) -> None:
        write_array_header_2_0(file, header)
        for shard in shards:  # one at a time: a split may be larger than memory
            file.write(np.ascontiguousarray(shard.rows(), dtype="<f4").data)

    write_atomically(array_path(store.folder, split, "features"), write_features)
    write_atomically(
        array_path(store.folder, split, "labels"),
        lambda file: np.save(file, labels, allow_pickle=False),
    )
    write_json(samples_path(store.folder, split), listing)


# Images that were decoded once: what a training reads, memory-mapped and without torch.
#
# images/KEY/   meta.json                written last: a store that has it is complete; with
# checksums   validation.pixels        uint8 (N, S, S, 3), one image after the other
# validation.labels.npy    int64 (N,)   validation.samples.json  their paths   train.pixels
# the same; or, where training images are changed at random,   train.views              small
# JPEG or PNG files, one after the other, and   train.ends.npy           int64 (N,), where each of
# them ends


Form = Literal["pixels", "views"]
"""`pixels`: what evaluation reads. `views`: a whole image made small, for random crops."""


class StoredImages:
    """One split of a data set as decoded images; small when pickled, since it maps a file.

    Args:
        folder: the store.
        paths: N posix paths, relative to the data set's root.
        labels: int64, shape (N,), indices into the class names.
        ends: int64, shape (N,), where each image ends in the file, in bytes.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        form: Form,
        preprocessing: Preprocessing,
        *,
        paths: tuple[str, ...],
        labels: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        self.folder = folder
        self.name = split
        self.form = form
        self.preprocessing = preprocessing
        self.paths = paths
        self.labels = labels
        self._starts = np.concatenate([[0], ends])
        # Copy-on-write: torch wants memory that may be written to; nobody does.
        self._bytes = np.memmap(data_path(folder, split, form), dtype=np.uint8, mode="c")
        if len(self._bytes) != self._starts[-1]:
            raise ValueError

    def __len__(self) -> int:
        return len(self.paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self.folder, self.name)

    @property
    def all_pixels(self) -> NDArray[np.uint8]:
        """uint8, shape (N, S, S, 3), memory-mapped; each image as `read_pixels` gives it.

        Raises:
            DataError: the store holds views of these images, for random crops.
        """
        if self.form != "pixels":
            raise DataError(f"The images in {self.folder} for {self.name} are kept for cropping.")
        size = self.preprocessing.size
        return self._bytes.reshape(len(self), size, size, 3)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """uint8, shape (S, S, 3): exactly `data.images.read_pixels` of the file."""
        image: NDArray[np.uint8] = self.all_pixels[index]
        return image

    def view(self, index: int) -> Image.Image:
        """A whole training image, made small; mode RGB.

        It is opened, not decoded: a JPEG's `draft` is still possible.

        Raises:
            DataError: the store holds pixels of these images.
        """
        if self.form != "views":
            raise DataError(f"The images in {self.folder} for {self.name} are cropped already.")
        content = self._bytes[self._starts[index] : self._starts[index + 1]].tobytes()
        return Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """A complete store of decoded images.

    Args:
        folder: open it again by this path, in any process.
        forms: how each split is kept, by the split's name.
        findings: one for each image that could not be read.
        seconds: how long decoding took, in the call that finished it.
        computed: images decoded by the call that returned this; 0 if all were there.
    """

    folder: Path
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    forms: Mapping[str, Form]
    findings: tuple[Finding, ...]
    seconds: float
    computed: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.forms)

    @classmethod
    def open(cls, folder: Path) -> DecodedImages:
        """Read a store's description; its images are mapped by `split`.

        Raises:
            DataError: there is no complete store of a version that this code reads.
        """
        try:
            meta = _read_meta(folder)
            return cls(
                folder=folder,
                class_names=tuple(meta["class_names"]),
                preprocessing=Preprocessing.from_dict(meta["preprocessing"]),
                forms=dict(meta["forms"]),
                findings=tuple(Finding(**finding) for finding in meta["findings"]),
                seconds=float(meta["seconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError, ClassifierError):
            raise DataError(
                f"{folder} holds no decoded images, or not all. Start again to decode them."
            ) from None

    def write(self) -> None:
        """Declare the store complete; raises as `commit_folder`."""
        meta = {
            "schema_version": SCHEMA_VERSION,
            "class_names": self.class_names,
            "preprocessing": self.preprocessing.to_dict(),
            "forms": dict(self.forms),
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": self.seconds,
        }
        files = [name for split, form in self.forms.items() for name in image_files(split, form)]
        commit_folder(self.folder, meta, files)

    def split(self, name: str) -> StoredImages:
        """Map one split.

        Raises:
            DataError: the store has no such split, or its files are damaged or gone.
        """
        if name not in self.forms:
            raise DataError(
                f"The images in {self.folder} have no split {name!r}, only "
                f"{', '.join(self.splits)}."
            )
        try:
            labels = np.load(array_path(self.folder, name, "labels"), allow_pickle=False)
            samples = json.loads(samples_path(self.folder, name).read_text(encoding="utf-8"))
            return StoredImages(
                self.folder,
                name,
                self.forms[name],
                self.preprocessing,
                paths=tuple(samples["paths"]),
                labels=labels,
                ends=self._ends(name, len(labels)),
            )
        except (OSError, ValueError, KeyError, EOFError):
            raise DataError(
                f"The decoded images in {self.folder} are damaged. Delete that folder and start "
                "again."
            ) from None

    def _ends(self, name: str, count: int) -> NDArray[np.int64]:
        if self.forms[name] == "pixels":
            size = self.preprocessing.size
            return np.arange(1, count + 1, dtype=np.int64) * (size * size * 3)
        ends: NDArray[np.int64] = np.load(array_path(self.folder, name, "ends"), allow_pickle=False)
        if ends.shape != (count,):
            raise ValueError
        return ends


def data_path(folder: Path, split: str, form: Form) -> Path:
    return folder / f"{split}.{form}"


def image_files(split: str, form: Form) -> tuple[str, ...]:
    """The names of a split's files in its store."""
    paths = [
        data_path(Path(), split, form),
        array_path(Path(), split, "labels"),
        samples_path(Path(), split),
    ]
    if form == "views":
        paths.append(array_path(Path(), split, "ends"))
    return tuple(path.name for path in paths)


def _open_split(folder: Path, split: str) -> StoredImages:
    return DecodedImages.open(folder).split(split)


# One split of a store of decoded images while it is written: append, resume, finish.


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it is stored, and whether it is nearly black, white or of one shade."""

    content: bytes
    few_levels: bool


class SplitFile:
    """A split's images, one after the other in a file, and how far that file is.

    A line of the progress file stands for some images that are in the file, with the checksum of
    their bytes; what lies beyond the last line that fits the file will be decoded again.

    Attributes:
        done: images that need no decoding any more, readable or not.
    """

    def __init__(self, folder: Path, split: str, form: Form, samples: Sequence[Sample]) -> None:
        self.split = split
        self.form = form
        self.samples = samples
        self._folder = folder
        self._data = data_path(folder, split, form)
        self._progress = folder / f"{split}.progress.jsonl"
        self._lengths: list[int] = []  # of each image in bytes, 0 for an unreadable one
        self._bad: dict[int, str] = {}
        self._few_levels: list[int] = []
        self._take_up()

    @property
    def done(self) -> int:
        return len(self._lengths)

    def few_levels(self) -> list[str]:
        """Paths of images that are nearly black, white or of one shade."""
        return [self.samples[number].path for number in self._few_levels]

    def append(self, images: Sequence[EncodedImage | BadImageError]) -> None:
        """Add the next images, or why they cannot be read.

        Raises:
            VisiontunerError: the disk is full.
        """
        contents = [b"" if isinstance(p, BadImageError) else p.content for p in images]
        content = b"".join(contents)
        group = {
            "checksum": zlib.crc32(content),
            "lengths": [len(one) for one in contents],
            "bad": {
                number: str(image)
                for number, image in enumerate(images)
                if isinstance(image, BadImageError)
            },
            "few_levels": [
                number
                for number, image in enumerate(images)
                if isinstance(image, EncodedImage) and image.few_levels
            ],
        }
        line = json.dumps(group) + "\n"
        try:
            with self._data.open("ab") as data:
                data.write(content)
            with self._progress.open("a", encoding="utf-8") as progress:
                progress.write(line)
        except OSError as error:
            raise cannot_write(self._data, error) from None
        self._add(json.loads(line))

    def finish(self) -> list[Finding]:
        """Write what belongs to the images; a finding for each that could not be read.

        Raises:
            DataError: none could be read.
        """
        findings = [unreadable_image(self.samples[i], why) for i, why in self._bad.items()]
        good = [s for number, s in enumerate(self.samples) if number not in self._bad]
        if not good:
            raise none_readable(self.split, findings)
        arrays = {"labels": np.array([sample.label for sample in good], dtype=np.int64)}
        if self.form == "views":
            lengths = np.array([n for i, n in enumerate(self._lengths) if i not in self._bad])
            arrays["ends"] = np.cumsum(lengths, dtype=np.int64)
        for kind, array in arrays.items():
            path = array_path(self._folder, self.split, kind)
            write_atomically(path, partial(np.save, arr=array, allow_pickle=False))
        write_json(samples_path(self._folder, self.split), {"paths": [s.path for s in good]})
        return findings

    def forget_progress(self) -> None:
        self._progress.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Read how far an earlier computation came, and cut off what it did not finish."""
        size = length = 0  # of the images, of the lines that tell of them
        try:
            lines = self._progress.read_bytes().split(b"\n")[:-1]  # the last one may be torn
            with self._data.open("rb") as data:
                for line in lines:
                    group = json.loads(line)
                    content = data.read(sum(group["lengths"]))
                    if zlib.crc32(content) != group["checksum"]:
                        break
                    if self.done + len(group["lengths"]) > len(self.samples):
                        break
                    self._add(group)
                    size, length = size + len(content), length + len(line) + 1
        except (OSError, ValueError, LookupError, TypeError):
            pass  # nothing there yet, or damaged from here on
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, end in {self._data: size, self._progress: length}.items():
            if not end:  # another training may have mapped what was there: it keeps its own
                path.unlink(missing_ok=True)
            with path.open("ab") as file:
                file.truncate(end)

    def _add(self, group: dict[str, Any]) -> None:
        start = self.done
        self._lengths += [int(length) for length in group["lengths"]]
        self._bad |= {start + int(number): str(why) for number, why in group["bad"].items()}
        self._few_levels += [start + int(number) for number in group["few_levels"]]


# A data set's images, decoded once: a training never decodes a photograph twice.
#
# A store is named after everything that determines it: images, labels, preprocessing and what it
# is for. Pixels for evaluation are kept as they are. A training image that is changed at random
# in every epoch is kept whole, but small.
#
# Images are appended to one file a split, with a line in a progress file for every few of them,
# so that a computation that was killed goes on where it stopped. Two processes that need the same
# store take turns.


SPLITS = ("train", "validation")

# A crop of a fifth of a view's area, as small as strong augmentation takes them, still has the
# network's input size.
_SMALLEST_CROP = 0.2
# Beyond it a random crop of usual shape cannot reach more of the image's length.
_MAX_ASPECT_RATIO = 8
# A view of so few pixels is kept without loss: small letters and digits suffer most from JPEG.
_LOSSLESS_PIXELS = 128 * 128
_JPEG_QUALITY = 90
_MOST_THREADS = 32
_GROUP = 32  # images in a line of the progress file


def prepare_images(
    dataset: ImageDataset,
    *,
    preprocessing: Preprocessing,
    cache: Path,
    augmented: bool,
    on_bad_image: Literal["skip", "fail"] = "skip",
    workers: int | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> DecodedImages:
    """The decoded images for training and validation, from the store or made now.

    Args:
        augmented: keep training images whole, for random crops, instead of cropped as in
            evaluation.
        on_bad_image: leave unreadable images out and list them as findings, or fail.
        workers: threads that decode; by default one a core.
        progress: called with (images done, images in all).

    Raises:
        DataError: a split has no readable image.
        BadImageError: an image is unreadable and `on_bad_image` is `fail`.
        VisiontunerError: the disk is full. What is done is kept.
    """
    require_images(dataset, SPLITS)
    folder = store_folder(dataset, preprocessing, cache, augmented=augmented)
    job = _Job(
        dataset=dataset,
        preprocessing=preprocessing,
        folder=folder,
        forms={"train": "views" if augmented else "pixels", "validation": "pixels"},
        on_bad_image=on_bad_image,
        workers=workers or min(_MOST_THREADS, available_cpus()),
        progress=progress or (lambda _done, _total: None),
    )
    computed = make_store(folder, job.run, of="decoded images", made="decoded", note=note)
    store = DecodedImages.open(folder)
    refuse_unreadable(store.findings, on_bad_image)
    return replace(store, computed=computed)


def store_folder(
    dataset: ImageDataset, preprocessing: Preprocessing, cache: Path, *, augmented: bool
) -> Path:
    """Where these images lie: a name made of all that determines them."""
    identity = {
        "schema": [
            SCHEMA_VERSION,
            _SMALLEST_CROP,
            _MAX_ASPECT_RATIO,
            _JPEG_QUALITY,
            DECODING_VERSION,
        ],
        "preprocessing": preprocessing.to_dict(),
        "augmented": augmented,
    }
    name = store_name(identity, dataset, SPLITS)
    before = cache / "pictures" / name  # where earlier versions decoded to
    return before if before.exists() else cache / "images" / name


def view_side(preprocessing: Preprocessing) -> int:
    """The shorter side of a view, pixels: its small crops have the network's input size."""
    return max(preprocessing.resize, math.ceil(preprocessing.size / math.sqrt(_SMALLEST_CROP)))


def make_view(source: Path, preprocessing: Preprocessing) -> bytes:
    """A training image as a small JPEG (or, if it is tiny, PNG) file.

    An image whose shorter side is more than `view_side` is made smaller; none is made larger.

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
        DecodedImages(
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

    def _decoded(self, file: SplitFile) -> Iterator[list[EncodedImage | BadImageError]]:
        """What the file still lacks, some images at a time."""
        decode = partial(self._decode, form=file.form)
        paths = [self.dataset.root / sample.path for sample in file.samples[file.done :]]
        group: list[EncodedImage | BadImageError] = []
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            try:
                # Threads suffice: Pillow lets go of Python's lock while it decodes and encodes.
                for result in interrupts.map_ahead(pool, decode, paths, ahead=4 * self.workers):
                    if isinstance(result, BadImageError) and self.on_bad_image == "fail":
                        raise bad_image(str(result))
                    group.append(result)
                    if len(group) == _GROUP:
                        yield group
                        group = []
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if group:
            yield group

    def _decode(self, path: Path, form: Form) -> EncodedImage | BadImageError:
        views = form == "views"
        side = view_side(self.preprocessing) if views else self.preprocessing.resize
        try:
            image = decode_image(path, target=side)
        except BadImageError as error:
            return error
        pixels = None if views else crop_pixels(image, self.preprocessing)
        return EncodedImage(
            content=_encode_view(image, side) if pixels is None else pixels.tobytes(),
            few_levels=has_few_levels(image if pixels is None else pixels),
        )


def _limit_aspect_ratio(image: Image.Image) -> Image.Image:
    limit = _MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= limit:
        return image
    width, height = (min(length, limit) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
