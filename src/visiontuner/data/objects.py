"""Files and the objects on S3 that hold them: names, digests, memory. Nothing here asks S3."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from visiontuner.data.digests import write_json
from visiontuner.data.files import file_state
from visiontuner.data.layout import is_no_data
from visiontuner.errors import DataError
from visiontuner.text import without_secrets

PART_BYTES = 8 << 20
"""A file of this size or more goes up in parts of this size; boto3 and `aws s3` do the same."""

_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,62})(?:/(.*))?", re.DOTALL | re.IGNORECASE)
_ETAG = re.compile(r"([0-9a-f]{32})(?:-([0-9]+))?")
_LONGEST_KEY = 1024  # bytes, S3's own limit


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One object: `name` is its key without the folder's prefix; `size` in bytes."""

    name: str
    key: str
    size: int
    etag: str


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://BUCKET/KEY` -> bucket and key; the key may be empty.

    Raises:
        DataError: it is no such address.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise DataError(f"{without_secrets(uri)!r} is no place on S3; write s3://BUCKET/FOLDER.")
    return match[1], match[2] or ""


def split_folder(uri: str) -> tuple[str, str]:
    """`s3://BUCKET/FOLDER` -> bucket and prefix: empty, or with a slash at its end."""
    bucket, key = split_uri(uri)
    key = key.rstrip("/")
    return bucket, f"{key}/" if key else ""


def files_in(folder: Path) -> dict[str, Path]:
    """All files under a folder of pictures by name (posix, relative), links followed.

    Hidden ones stay, and what commands leave in a folder: searches, MLflow's store, the cache.

    Raises:
        DataError: it is no folder, a folder in it cannot be read, or a name fits no key.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    try:
        paths = sorted(_walk(folder, frozenset()))
    except OSError as error:
        raise DataError(f"Cannot read {error.filename}: {error.strerror}.") from None
    return {_key_name(path.relative_to(folder).as_posix()): path for path in paths}


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:
        paths = [Path(entry) for entry in entries]
    for path in paths:
        if is_no_data(path):
            continue
        if path.is_dir():
            yield from _walk(path, above | {real})
        elif path.is_file():
            yield path


def _key_name(name: str) -> str:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name!a} is no UTF-8 and can be no key on S3: rename it.") from None
    if len(encoded) > _LONGEST_KEY:
        raise DataError(f"{name[:60]}… is too long for a key on S3 ({len(encoded)} bytes).")
    return name


def places(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where objects go by name; never outside the folder.

    Raises:
        DataError: a name leads elsewhere, or is a file and a folder at once.
    """
    found: dict[str, Path] = {}
    for name in names:
        parts = name.split("/")
        if "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise DataError(f"The object {name!r} would leave the folder: rename it on S3.")
        found[name] = folder.joinpath(*parts)
    for name in found:
        for above in PurePosixPath(name).parents:
            if str(above) in found:
                raise DataError(f"On S3 {str(above)!r} is a file and a folder: rename one of them.")
    return found


def has_content_of(path: Path, etag: str) -> bool:
    """Whether a file is what an ETag says: its MD5, or the MD5 of its parts' MD5s.

    An ETag of an object that a KMS key encrypts, or of parts of another size, fits no file.
    """
    match = _ETAG.fullmatch(etag)
    if match is None:
        return False
    if match[2] is None:
        return file_md5(path) == etag
    parts = -(-path.stat().st_size // PART_BYTES)
    return int(match[2]) == parts and _md5_of_parts(path) == match[1]


def is_md5(etag: str) -> bool:
    """Whether an ETag looks like an MD5; that of an encrypted object does, too."""
    return bool(re.fullmatch(r"[0-9a-f]{32}", etag))


def file_md5(path: Path) -> str:
    """MD5 (hex) of a file; S3's ETag, which protects against accidents and nothing else."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def _md5(content: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(content, usedforsecurity=False)


def _md5_of_parts(path: Path) -> str:
    digests = b""
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digests += _md5(part).digest()
    return _md5(digests).hexdigest()


class Memory:
    """Which object each file was when it came: it is not read again while it stays as it was.

    Args:
        path: a JSON file, which may be missing or damaged; None: nothing is remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[str, list[object]] = {}
        if path is not None:
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return
            self._rows = raw if isinstance(raw, dict) else {}

    def knows(self, name: str, etag: str, path: Path) -> bool:
        """Whether a file is still what came as this object."""
        return self._rows.get(name) == _row(etag, path)

    def add(self, name: str, etag: str, path: Path) -> None:
        """A file is this object now."""
        self._rows[name] = _row(etag, path)

    def save(self, names: Mapping[str, object]) -> None:
        """Write down what is known of these names and forget the others."""
        if self._path is not None:
            rows = {name: row for name, row in self._rows.items() if name in names}
            write_json(self._path, rows)


def _row(etag: str, path: Path) -> list[object]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [etag, *file_state(status)]
