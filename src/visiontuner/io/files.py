"""Whole files, JSON, locks and digests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from visiontuner import interrupts
from visiontuner.errors import DataError, DiskError, VisiontunerError
from visiontuner.paths import (
    CACHE_MARK_FILE,
    DRIFT_FILE,
    JOURNAL_FILE,
    RANGE_TEST_FILE,
    RANGE_TESTS_FOLDER,
    SEARCHES_FOLDER,
    SUGGEST_FILE,
    SUGGEST_FOLDER,
    SUSPECTS_FILE,
    SUSPECTS_FOLDER,
)
from visiontuner.text import printable

# JSON as we write it into files: UTF-8, readable by any reader.


def encode_json(value: Any, *, indent: int | None = None) -> bytes:
    """JSON as UTF-8.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False).encode()
    except UnicodeEncodeError:
        # A file name that is not UTF-8 holds halves of surrogate pairs; escaped they pass.
        return json.dumps(value, indent=indent, allow_nan=False).encode()


# Files that are computed once and found again: whole or not there, written by one at a time.


def write_json(path: Path, value: Any) -> None:
    """Write JSON; errors as `write_atomically`."""
    content = encode_json(value)
    write_atomically(path, lambda file: file.write(content))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is either whole or not there.

    Raises:
        VisiontunerError: the disk is full or not writable.
    """
    try:
        write_whole(path, write)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, private: bool = False) -> None:
    """Write a file that is either whole or not there, over an older one.

    Args:
        private: nobody but its owner may read it, from its first byte on.

    Raises:
        OSError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process; whose mode it would keep
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(os.open(temporary, flags, 0o600 if private else 0o666), "wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_state(status: os.stat_result) -> list[int]:
    """What tells a file from what it was: size, modification and change time (ns), inode.

    Who moves another file into its place can keep size and modification time, and changes the rest.
    """
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


# As the system, numpy, Rust's libraries (safetensors) and SQLite write it: other packages put it
# into errors of their own, without the number.
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_DISK_WORDS = re.compile(
    "|".join(re.escape(os.strerror(number)) for number in _DISK_ERRNOS)
    + r"|\[Errno (?:{0})\]|\(os error (?:{0})\)".format("|".join(map(str, _DISK_ERRNOS)))
    + r"|\d+ requested and \d+ written|database or disk is full|disk I/O error"
)


def disk_problem(error: BaseException | str) -> str | None:
    """What is wrong with a disk, if that is what an error or its text is about; else None."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return os.strerror(error.errno)
    found = _DISK_WORDS.search(str(error))
    return found[0] if found else None


def cannot_write(path: Path, error: OSError) -> VisiontunerError:
    """What to say when a file of the cache cannot be written."""
    reason = error.strerror or "the disk is full"  # numpy's own short-write error has no text
    kind = DiskError if disk_problem(error) else VisiontunerError
    return kind(
        f"Cannot write {path.parent.parent.name} to {path.parent} ({reason}). Make room there or "
        "set VISIONTUNER_CACHE to another folder; what is done is kept."
    )


def flush_to_disk(path: Path) -> None:
    """Return when a file's content is on the disk, or a folder's names are.

    Raises:
        OSError: it cannot be written; some network file systems cannot be asked about folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time computes a folder; the lock ends with its process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        with suppress(OSError):  # a file system without locks: whole files still replace each other
            fcntl.flock(file, fcntl.LOCK_EX)
            for half_written in folder.glob(".*.tmp"):  # by a process that was killed
                half_written.unlink(missing_ok=True)
        yield


_TEMPORARY = "visiontuner-tmp-"
# A new folder is locked within microseconds; one of this age without a lock has lost its process.
_SWEPT_AFTER_SECONDS = 60.0


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder that is gone, or has another name, when the block ends.

    A lock that ends with its process marks it as in use. What processes that were killed left in
    the same place is removed first.

    Args:
        parent: default: the system's folder for temporary files.
    """
    prefix = _TEMPORARY if parent is None else f".{_TEMPORARY}"
    parent = parent or Path(tempfile.gettempdir())
    _sweep_temporary_folders(parent, prefix)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        with _folder_lock(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep_temporary_folders(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # somebody else's, or just gone
            status = folder.lstat()
            old = time.time() - status.st_mtime > _SWEPT_AFTER_SECONDS
            if old and status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode):
                with _folder_lock(folder) as is_ours:
                    if is_ours:
                        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds it; False too where the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


# What a file holds, as a SHA-256 that is computed once and remembered.


# Reading waits for the disk and hashing releases the interpreter: more threads than cores pay.
_THREADS = 8


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digests(
    root: Path,
    files: Iterable[ImageFile],
    *,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str | OSError]:
    """The content digest of each file by its relative path, or why it cannot be read.

    A file with the path, size, times and inode of an earlier look is not read again.
    """
    store = (
        cache / "digests" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]}.json"
    )
    known = _read_store(store)
    digests: dict[str, str | OSError] = {}
    unknown: list[ImageFile] = []
    for file in files:
        state, digest = known.get(file.path, ([], ""))
        if state == file.state:
            digests[file.path] = digest
        else:
            unknown.append(file)
    if unknown or len(digests) != len(known):
        digests |= _hash(root, unknown, progress)
        _write_store(store, files, digests)
    return digests


def write_cached_json(path: Path, value: object) -> None:
    """Write a small JSON file whole or not at all; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(json.dumps(value).encode()))


def read_cached_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there, damaged or no table of names."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _hash(
    root: Path, files: list[ImageFile], progress: Callable[[int, int], None] | None
) -> dict[str, str | OSError]:
    def digest(file: ImageFile) -> str | OSError:
        try:
            return file_digest(root / file.path)
        except OSError as error:
            return error

    digests: dict[str, str | OSError] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed = enumerate(zip(files, pool.map(digest, files), strict=True), 1)
        try:
            for done, (file, result) in hashed:
                digests[file.path] = result
                interrupts.check()
                if progress is not None:
                    progress(done, len(files))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return digests


def _read_store(store: Path) -> dict[str, tuple[list[int], str]]:
    """Each path's state and digest; rows of earlier versions, which said less, fit no file."""
    try:
        raw = json.loads(store.read_text(encoding="utf-8"))
        return {path: (row[:-1], str(row[-1])) for path, row in raw.items()}
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return {}  # nothing remembered yet, or damaged: everything is read again


def _write_store(
    store: Path, files: Iterable[ImageFile], digests: dict[str, str | OSError]
) -> None:
    rows = {
        file.path: [*file.state, digests[file.path]]
        for file in files
        if isinstance(digests[file.path], str)
    }
    write_cached_json(store, rows)


_IGNORED_FILES = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "mlflow.db", "mlruns", "mlartifacts"}
)


# In the folder of a search, of a range test, and in the cache.
_OWN_MARKER_FILES = (JOURNAL_FILE, RANGE_TEST_FILE, DRIFT_FILE, CACHE_MARK_FILE)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image file: `split` is None where the folders say nothing about splits."""

    path: str  # posix, relative to the layout's root
    class_name: str
    split: str | None
    state: Sequence[int]  # of `file_state`
    group: str | None = None


def scan_folder(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}.") from None
    return sorted(visible, key=lambda entry: entry.name)


def walk_files(
    folder: Path | str, relative: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Files below a folder in a stable order with their paths from it, links followed.

    Hidden ones and what systems, MLflow and commands leave are no data and left out.

    Raises:
        DataError: a folder cannot be read, or is a link to one above it.
    """
    status = os.stat(folder)  # noqa: PTH116 - called for every folder of a large tree
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder above it; remove it.")
    entries = scan_folder(folder)
    if any(entry.name in _OWN_MARKER_FILES for entry in entries):
        return
    for entry in entries:
        path = f"{relative}/{entry.name}" if relative else entry.name
        if is_folder(entry):
            yield from walk_files(entry.path, path, (*above, identity))
        else:
            yield entry, path


def is_made_by_commands(folder: Path) -> bool:
    """Whether searches, range tests, suspects, suggestions, drift or the cache lie there."""
    for name, file in ((SUSPECTS_FOLDER, SUSPECTS_FILE), (SUGGEST_FOLDER, SUGGEST_FILE)):
        if folder.name == name:
            return (folder / file).exists()
    if folder.name in (SEARCHES_FOLDER, RANGE_TESTS_FOLDER):
        return any(_has_mark(Path(child.path)) for child in scan_folder(folder) if is_folder(child))
    return _has_mark(folder)


def _has_mark(folder: Path) -> bool:
    return any(os.path.exists(folder / mark) for mark in _OWN_MARKER_FILES)  # noqa: PTH110 never raises


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{entry.path} is a link to itself; remove it.") from None
        raise DataError(f"Cannot read {entry.path}: {error.strerror}.") from None


def is_no_data(path: Path) -> bool:
    """Hidden, or left there by a system, by MLflow or by a command of ours."""
    return is_hidden(path.name) or (path.is_dir() and is_made_by_commands(path))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED_FILES


_LONGEST_NAME = 200  # bytes; file systems take 255, and numbers may be added


def as_file_name(text: str) -> str:
    """A text as the name of one file or folder: itself wherever it can be one.

    A class may be called `../x` or `a/b` by a table: it names no other folder here.
    """
    name = printable(text).replace("/", "%2F").replace("\0", "%00")
    if name in ("", ".", "..") or name.startswith("."):
        name = f"%{name}"
    if len(name.encode(errors="surrogateescape")) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
        name = f"{name[: _LONGEST_NAME // 4 - 13]}-{digest}"
    return name
