"""Unpack a zip or tar so that nothing lands outside the target folder."""

from __future__ import annotations

import errno
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from visiontuner.errors import DataError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError)


def is_archive_name(name: str) -> bool:
    """Whether a file name ends like an archive that `extract` reads."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def extract(archive: Path, target: Path) -> Path:
    """Unpack an archive into a folder that is complete or absent; an existing one is used again.

    Plain files and folders only: links, devices and paths that leave the folder are refused.

    Raises:
        DataError: the archive is damaged, encrypted, hostile or no archive, or the disk is full.
    """
    if target.is_dir():
        return target
    with whole_folder(target) as folder:
        try:
            _extract(archive, folder)
        except _DAMAGED as error:
            raise _damaged(archive, error) from None
        except (RuntimeError, NotImplementedError) as error:  # encrypted, unknown compression
            raise DataError(f"{archive} cannot be unpacked: {error}.") from None
        except OSError as error:
            if error.errno is None:  # gzip and bz2 say "invalid data" this way
                raise _damaged(archive, error) from None
            raise
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target that takes its name when the block ends well.

    Whoever comes second, in another process, keeps the first one's folder.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        # mkdtemp is for this user only; other processes on a cluster read the cache as well.
        folder.chmod(0o755)
        yield folder
        _move(folder, target)
    except OSError as error:
        raise DataError(explain_write(error, target)) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
            raise


def _extract(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):
        _extract_zip(archive, folder)
    elif tarfile.is_tarfile(archive):
        _extract_tar(archive, folder)
    else:
        raise DataError(
            f"{archive} is not an archive that can be read ({', '.join(ARCHIVE_SUFFIXES)}); "
            "was a web page downloaded instead?"
        )


def _damaged(archive: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{archive} is damaged: {reason}. Fetch it again.")


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        needed = sum(member.file_size for member in bundle.infolist())
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, f"needs {needed:,} bytes")
        for member in bundle.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _hostile(archive, member.filename, "is a link or a device")
            path = _inside(archive, folder, member.filename)
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                with bundle.open(member) as content:
                    _write(path, content)


def _extract_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as bundle:
        for member in bundle:
            path = _inside(archive, folder, member.name)
            content = bundle.extractfile(member) if member.isfile() else None
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif content is None:
                raise _hostile(archive, member.name, "is a link or a device")
            else:
                with content:
                    _write(path, content)
        # A compressed file's checksum comes last, behind the tar's own end.
        while bundle.fileobj is not None and bundle.fileobj.read(1 << 20):
            pass


def _inside(archive: Path, folder: Path, name: str) -> Path:
    parts = name.replace("\\", "/").split("/")
    # `C:` alone is a drive's name elsewhere; `photos: summer` is a folder's.
    drive = re.fullmatch(r"[A-Za-z]:.*", parts[0]) is not None
    if name.startswith(("/", "\\")) or ".." in parts or drive or "\0" in name:
        raise _hostile(archive, name, "leads out of the folder")
    return folder.joinpath(*parts)


def _write(path: Path, content: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)


def _hostile(archive: Path, name: str, what: str) -> DataError:
    return DataError(f"{archive} is refused: its entry {name!r} {what}. Unpack it yourself.")


def explain_write(error: OSError, target: Path) -> str:
    """Why a path cannot be written, as one line with a next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(target)).free / 1e9
        return (
            f"The disk is full: cannot write {target} ({free:.1f} GB free). "
            "Make room, or point VISIONTUNER_CACHE elsewhere."
        )
    return f"Cannot write {target}: {error.strerror or os.strerror(error.errno or 0)}."


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
