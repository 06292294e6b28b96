"""`data.source` -> a local folder: a folder, an archive, either on S3, a URL, or the digits.

What is downloaded or unpacked lies under the cache and is used again by the next call.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from visiontuner.commands import next_command
from visiontuner.data.archive import ARCHIVE_SUFFIXES, extract, is_archive_name
from visiontuner.data.digests import file_digest
from visiontuner.data.digits import write_digits
from visiontuner.data.download import download
from visiontuner.data.files import locked
from visiontuner.data.objects import split_uri
from visiontuner.errors import DataError
from visiontuner.text import HIDDEN, without_secrets

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def fetch_source(
    source: str,
    *,
    cache: Path,
    sha256: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Bring a data source onto this machine.

    Args:
        source: a folder, the path or http(s) URL of a zip or tar archive, an `s3://BUCKET/KEY` of
            either, or `digits`.
        cache: where archives are unpacked and downloads are kept.
        sha256: what the archive must hash to, hexadecimal.
        progress: called with (bytes so far, bytes in all; 0 if the server does not say).
        note: told when S3 does not answer and is asked again.

    Returns:
        A folder for `load_dataset`.

    Raises:
        DataError: the source does not exist, is of an unknown kind, or is a damaged archive.
        DownloadError: the download did not end, or its content is not what `sha256` promises.
        ServingError: S3 cannot be reached.
    """
    scheme = _SCHEME.match(source)
    if scheme and HIDDEN in source:
        raise DataError(
            f"{source} is an address whose secret was left out where it was written down. Give "
            "the whole one with --data."
        )
    if source == "digits" and not Path(source).is_dir():
        return write_digits(cache)
    if scheme and scheme[1].lower() in ("http", "https"):
        return _fetch_url(source, cache, sha256, progress)
    if scheme and scheme[1].lower() == "s3":
        return _fetch_s3(source, cache, sha256, progress, note)
    if scheme and scheme[1].lower() == "file":
        source = urlsplit(source).path
    elif scheme:
        raise DataError(_unknown_scheme(source, scheme[1].lower()))
    return _open_path(Path(source).expanduser(), cache, sha256)


def _fetch_url(
    url: str, cache: Path, sha256: str | None, progress: Callable[[int, int], None] | None
) -> Path:
    archive = download(url, cache / "downloads", sha256=sha256, progress=progress)
    folder = cache / "archives" / _folder_name(archive.path.name, archive.sha256)
    if not folder.is_dir() and file_digest(archive.path) != archive.sha256:
        archive.path.unlink()  # not what came: damaged since, and a tar would not show it
        return _fetch_url(url, cache, sha256, progress)
    return extract(archive.path, folder)


def _fetch_s3(
    uri: str,
    cache: Path,
    sha256: str | None,
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None] | None,
) -> Path:
    """What lies on S3, here; of what was here already only what changed comes."""
    from visiontuner.data.storage import download_file, download_folder
    from visiontuner.data.whole_copy import WholeCopy

    bucket, key = split_uri(uri)
    name = key.rstrip("/").rpartition("/")[2]
    place = cache / "s3" / hashlib.sha256(f"{bucket}/{key.rstrip('/')}".encode()).hexdigest()[:16]
    with locked(place):
        memory = place / ".memory.json"
        if is_archive_name(name):
            with WholeCopy(place / name, note):
                download_file(uri, place, memory=memory, progress=progress, note=note)
            return _open_path(place / name, cache, sha256)
        folder = place / (name or bucket)
        with WholeCopy(folder, note):
            moved = download_folder(
                uri, folder, memory=memory, mirror=True, progress=progress, note=note
            )
            if not moved.files + moved.skipped:
                command = next_command("prepare", "--data", "FOLDER", "--upload", uri)
                raise DataError(
                    f"There is nothing at {uri}. Look with `aws s3 ls s3://{bucket}/`, or bring "
                    f"pictures there: `{command}`."
                )
    return folder


def _open_path(path: Path, cache: Path, sha256: str | None) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise DataError(_missing(path))
    if not path.is_file() or not is_archive_name(path.name):
        raise DataError(
            f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})."
        )
    digest = file_digest(path)
    if sha256 is not None and digest != sha256.lower():
        raise DataError(f"{path} has SHA-256 {digest}, not {sha256.lower()} as data.sha256 says.")
    return extract(path, cache / "archives" / _folder_name(path.name, digest))


def _folder_name(name: str, key: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name.split(".")[0])[:40]
    # 2: folders without it may hold names that were read as cp437 whatever they were.
    return f"{stem or 'archive'}-{key[:16]}-2"


def _unknown_scheme(source: str, scheme: str) -> str:
    near = difflib.get_close_matches(scheme, ["http", "https", "file", "s3"], n=1)
    hint = f" Did you mean {near[0]}://?" if near else ""
    return (
        f"{without_secrets(source)} has an unknown scheme.{hint} Use a folder, an archive, "
        "http(s)://, s3:// or digits."
    )


def _missing(path: Path) -> str:
    near = difflib.get_close_matches(str(path), ["digits"], n=1)
    parent = path.parent
    if not near and parent.is_dir():
        names = [p.name for p in parent.iterdir() if p.is_dir() or is_archive_name(p.name)]
        near = [str(parent / n) for n in difflib.get_close_matches(path.name, names, n=2)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"There is no data at {path}.{hint} "
        "data.source is a folder, an archive (path or URL), s3://BUCKET/FOLDER or digits."
    )
