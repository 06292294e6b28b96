"""A table of labels on a web server: the table and the images that it names, mirrored here.

An image is fetched if it lies below the table's own folder on the same server. A table cannot make
anybody's machine ask other servers, among them those that only this machine reaches.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter

from visiontuner import interrupts
from visiontuner.data.images import image_extensions
from visiontuner.data.labels import is_table_name, path_inside, read_table, with_local_paths
from visiontuner.errors import DataError
from visiontuner.io.download import NotOnServer, download, explain_write
from visiontuner.io.files import locked

_CONNECTIONS = 16
# Hidden, so that it is neither data nor uploaded.
_DOWNLOADS = ".downloads"


def is_web_table(source: str) -> bool:
    """Whether a data source is a table on a web server."""
    path = re.split(r"[?#]", source, maxsplit=1)[0]
    return path.lower().startswith(("http://", "https://")) and is_table_name(path)


def folder_address(url: str) -> str:
    """The address of the folder that a table lies in, with a slash at its end."""
    return re.split(r"[?#]", url, maxsplit=1)[0].rpartition("/")[0] + "/"


def fetch_table(
    url: str,
    *,
    columns: Mapping[str, str | None],
    cache: Path,
    sha256: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Bring a table and the images that it names; of what was here only what changed comes.

    The server is asked about each image. One that it does not have is left out, as a file that is
    missing beside a local table.

    Args:
        columns: how the table calls its columns.
        sha256: what the table must hash to.
        progress: called with (images asked for, images in all).
        note: told which images the server does not give.

    Returns:
        The table, with the images beside it.

    Raises:
        DataError: it is no table of images, or the disk is full.
        DownloadError: the server refuses or is away, and nothing is here from before.
    """
    base = folder_address(url)
    place = cache / "web" / hashlib.sha256(base.encode()).hexdigest()[:16]
    with locked(place), _session() as session:
        downloads = place / _DOWNLOADS
        table = download(url, downloads, sha256=sha256, session=session).path
        local = place / table.name
        _place(table, local)
        images = _images(local, base, columns)
        work = [
            partial(_fetch, address, place / path, downloads, session)
            for path, address in images.items()
        ]
        missing = _run(work, progress)
    if missing and note is not None:
        note(f"{len(missing):,} images are not on the server, or not given: {missing[0]}")
    return local


def _session() -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=_CONNECTIONS))
    return session


def _images(table: Path, base: str, columns: Mapping[str, str | None]) -> dict[str, str]:
    """Path below the table -> address, of the rows that are of use."""
    raw = read_table(table, columns)
    images: dict[str, str] = {}
    for given, row in zip(raw.rows, with_local_paths(raw, base).rows, strict=True):
        path = path_inside(row.path)
        if path is None or "\0" in path or not row.label:
            continue
        if Path(path).suffix.lower() not in image_extensions():
            continue
        whole = given.path != row.path  # perhaps with a signature of its own
        images.setdefault(path, given.path if whole else base + quote(path))
    return images


def _run(
    work: Sequence[Callable[[], str | None]], progress: Callable[[int, int], None] | None
) -> list[str]:
    """Do all, several at a time; the first error ends it. What the server does not have."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        futures = [pool.submit(one) for one in work]
        try:
            for done, future in enumerate(interrupts.as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(work))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [missing for future in futures if (missing := future.result()) is not None]


def _fetch(url: str, target: Path, downloads: Path, session: requests.Session) -> str | None:
    """Bring one image; why not, where the server does not have it."""
    try:
        _place(download(url, downloads, session=session).path, target)
    except NotOnServer as error:
        target.unlink(missing_ok=True)
        return str(error)
    return None


def _place(source: Path, target: Path) -> None:
    """Give a download its place in the mirror; the same file under both names where that works."""
    try:
        with suppress(FileNotFoundError):
            if source.samefile(target):
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    except OSError as error:
        raise DataError(explain_write(error, target)) from None
