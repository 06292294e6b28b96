"""Folders of arrays that are computed once: committed with checksums, verified when opened.

`meta.json` is written last and holds the size and CRC-32 of every file beside it, so that what a
power cut or a bad disk left is told from what was written. A checksum is no protection against
whoever changes files on purpose.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.files import cannot_write, flush_to_disk, write_json

META = "meta.json"
CHECKSUMS = "checksums"
# 4 GB/s on a core where BLAKE2b takes 0.9 and SHA-256, with instructions for it, 1.7: 512 MB of
# features are read and compared in 0.3 s.
_CHECKSUM_BLOCK = 1 << 20


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
