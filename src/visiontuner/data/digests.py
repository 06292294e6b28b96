"""What a file holds, as a SHA-256 that is computed once and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from visiontuner import interrupts
from visiontuner.data.layout import PictureFile

# Reading waits for the disk and hashing releases the interpreter: more threads than cores pay.
_THREADS = 8


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digests(
    root: Path,
    files: Iterable[PictureFile],
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
    unknown: list[PictureFile] = []
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


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file whole or not at all; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(value, file)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)


def _hash(
    root: Path, files: list[PictureFile], progress: Callable[[int, int], None] | None
) -> dict[str, str | OSError]:
    def digest(file: PictureFile) -> str | OSError:
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
    store: Path, files: Iterable[PictureFile], digests: dict[str, str | OSError]
) -> None:
    rows = {
        file.path: [*file.state, digests[file.path]]
        for file in files
        if isinstance(digests[file.path], str)
    }
    write_json(store, rows)
