"""Files that are computed once and found again: whole or not there, written by one at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from visiontuner.errors import DiskError, VisiontunerError
from visiontuner.plain_json import encode_json


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
