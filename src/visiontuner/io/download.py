"""Files over http(s), and archives unpacked safely."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import stat
import string
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from filelock import FileLock

from visiontuner import interrupts
from visiontuner.errors import DataError, DownloadError
from visiontuner.io.files import (
    file_digest,
    flush_to_disk,
    read_cached_json,
    temporary_folder,
    write_cached_json,
)
from visiontuner.text import without_secrets

# Unpack a zip or tar so that nothing lands outside the target folder.
#
# Old archives do not say how the names of their files are encoded. That is decided for the whole
# archive: UTF-8 if all names are, else the encoding in which they read most like words.


ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

# In an unpacked folder, where the names' encoding had to be guessed: hidden, so that it is no data.
_NAMES_NOTE = ".visiontuner-names.json"
# A byte below 0x40 is no half of a character; some programs part folders with a backslash.
_WORD_ENDS = re.compile(rb"[\x00-\x3f]+|(?<=[\x00-\x7f])\\")
_SCORED_WORDS = 2_000  # of an archive's different ones; more of them change no verdict
_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_LARGEST_READ = 16 << 20  # bytes; a header is 512, a very long name a few thousand
# Bytes that are no UTF-8 become surrogates, and come back from them, whatever the locale.
_TAR_NAMES = ("utf-8", "surrogateescape")
_UTF8_FLAG = 0x800
_UNICODE_PATH_FIELD = 0x7075

_FLUSHES_AT_ONCE = 32
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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent) as folder:
            # It is for this user only; other processes on a cluster read the cache as well.
            folder.chmod(0o755)
            yield folder
            _flush_files(folder)
            _move(folder, target)
    except OSError as error:
        raise DataError(explain_write(error, target)) from None


def _flush_files(folder: Path) -> None:
    """Bring a folder's files to the disk before it counts as whole.

    Side by side: a file system commits many files at once, where one after the other would take
    minutes for 100,000.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:
        for _ in pool.map(flush_to_disk, files):
            pass


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
            raise


def _extract(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):
        _extract_zip(archive, folder)
    else:
        _extract_tar(archive, folder)


def _damaged(archive: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{archive} is damaged: {reason}. Fetch it again.")


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        _refuse_what_does_not_fit(folder, sum(member.file_size for member in members))
        names = decode_names([_zip_name(member) for member in members])
        for name, member in zip(names.texts, members, strict=True):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _hostile(archive, name, "is a link or a device")
        is_folder = [name.endswith("/") for name in names.texts]
        paths = _entry_paths(archive, folder, names.texts, is_folder)
        for path, only_folder, member in zip(paths, is_folder, members, strict=True):
            if only_folder:
                path.mkdir(parents=True, exist_ok=True)
            else:
                with bundle.open(member) as content:
                    _write(path, content)
    _write_names_note(folder, names)


def _extract_tar(archive: Path, folder: Path) -> None:
    with _ModestReader(_decompressed(archive)) as stream, _open_tar(archive, stream) as bundle:
        members = _tar_members(archive, folder, bundle)
        # A compressed file's checksum comes last, behind the tar's own end.
        while stream.read(1 << 20):
            pass
        names = decode_names([member.name.encode(*_TAR_NAMES) for member in members])
        is_folder = [member.isdir() for member in members]
        paths = _entry_paths(archive, folder, names.texts, is_folder)
        for path, member in zip(paths, members, strict=True):
            content = None if member.isdir() else bundle.extractfile(member)
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                with content:
                    _write(path, content)
    _write_names_note(folder, names)


class _ModestReader(io.BufferedReader):
    """Reads no more than a header may need at once: compressed zeros can claim to be gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_READ:
            raise tarfile.TarError(f"a header claims {size} bytes")
        return super().read(size)


def _decompressed(archive: Path) -> Any:
    with archive.open("rb") as file:
        head = file.read(8)
    for start, opener in _COMPRESSIONS.items():
        if head.startswith(start):
            return opener(archive, "rb")
    return archive.open("rb", buffering=0)


def _open_tar(archive: Path, stream: IO[bytes]) -> tarfile.TarFile:
    encoding, errors = _TAR_NAMES
    try:
        return tarfile.open(fileobj=stream, mode="r:", encoding=encoding, errors=errors)
    except tarfile.ReadError as error:
        raise _no_archive(archive, error) from None


def _no_archive(archive: Path, error: Exception) -> DataError:
    with archive.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):  # a zip's contents are listed at its end
        return _damaged(archive, EOFError("its end is missing"))
    if any(map(head.startswith, _COMPRESSIONS)):
        return _damaged(archive, error)
    page = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
    return DataError(
        f"{archive} is not an archive that can be read ({', '.join(ARCHIVE_SUFFIXES)})"
        + ("; was a web page downloaded instead?" if page else ".")
    )


def _tar_members(archive: Path, folder: Path, bundle: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Every entry, read before anything is written: plain files and folders that fit the disk."""
    members: list[tarfile.TarInfo] = []
    needed = 0
    for member in bundle:
        if member.issparse():
            raise _hostile(archive, member.name, "is a sparse file")
        if not (member.isfile() or member.isdir()):
            raise _hostile(archive, member.name, "is a link or a device")
        if member.size < 0:  # the next header would be looked for before this one, for ever
            raise tarfile.ReadError(f"the entry {member.name!r} has {member.size} bytes")
        needed += member.size
        _refuse_what_does_not_fit(folder, needed)
        members.append(member)
    return members


def _refuse_what_does_not_fit(folder: Path, needed: int) -> None:
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"needs {needed:,} bytes")


def _entry_paths(
    archive: Path, folder: Path, names: Sequence[str], is_folder: Sequence[bool]
) -> list[Path]:
    """Where each entry belongs; none may leave the folder, and no two may be the same file."""
    paths = [_inside(archive, folder, name) for name in names]
    folders = {path for path, only_folder in zip(paths, is_folder, strict=True) if only_folder}
    files: set[Path] = set()
    for name, path, only_folder in zip(names, paths, is_folder, strict=True):
        if not only_folder and (path in files or path in folders):
            raise _hostile(archive, name, "is there twice, and one would replace the other")
        if not only_folder:
            files.add(path)
    return paths


def _inside(archive: Path, folder: Path, name: str) -> Path:
    parts = name.split("/")
    # `C:` alone is a drive's name elsewhere; `photos: summer` is a folder's.
    drive = re.fullmatch(r"[A-Za-z]:.*", parts[0]) is not None
    if name.startswith("/") or ".." in parts or drive or "\0" in name:
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


@dataclass(frozen=True)
class EntryNames:
    """The names in an archive, with `/` between their parts.

    Args:
        encoding: how names were read that do not say it themselves; None where none had to be.
        guessed: those names, if `encoding` is neither UTF-8 nor a zip's own default.
    """

    texts: list[str]
    encoding: str | None
    guessed: list[str]


def decode_names(raw_names: Sequence[str | bytes]) -> EntryNames:
    """Read the names of an archive: text where the archive says what they are, else bytes."""
    undeclared = {name for name in raw_names if isinstance(name, bytes) and not name.isascii()}
    encoding, is_evident = _names_encoding(undeclared) if undeclared else (None, True)
    texts = [
        name if isinstance(name, str) else name.decode(encoding or "ascii") for name in raw_names
    ]
    # Some Windows programs part folders with a backslash. In the second byte of a character it is
    # none, which decoding has settled; where no encoding fits, each may be one.
    backslash = r"(?<![\x80-\U0010ffff])\\" if encoding == _FALLBACK and not is_evident else r"\\"
    texts = [re.sub(backslash, "/", text) for text in texts]
    guessed = (
        []
        if is_evident
        else [text for raw, text in zip(raw_names, texts, strict=True) if raw in undeclared]
    )
    return EntryNames(texts, encoding, guessed)


def _write_names_note(folder: Path, names: EntryNames) -> None:
    note = folder / _NAMES_NOTE
    note.unlink(missing_ok=True)  # the archive's own, which knows nothing of this
    if names.guessed:
        parts = {part for name in names.guessed for part in name.split("/") if not part.isascii()}
        content = {
            "encoding": names.encoding,
            "count": len(names.guessed),
            "examples": sorted(parts, key=lambda part: (len(part), part))[:3],
        }
        note.write_text(json.dumps(content), encoding="utf-8")


def _zip_name(member: zipfile.ZipInfo) -> str | bytes:
    """A zip entry's name: text where the entry says that it is UTF-8, else its bytes."""
    name = member.orig_filename.partition("\0")[0]
    if member.flag_bits & _UTF8_FLAG:
        return name
    raw = name.encode("cp437")  # as zipfile read it
    return _unicode_path(member.extra, raw) or raw


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """The UTF-8 name that Info-ZIP puts beside an old one, if it belongs to that one."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH_FIELD and len(content) > 5:
            version, checksum = struct.unpack_from("<BL", content)
            if version == 1 and checksum == zlib.crc32(raw):
                return content[5:].decode("utf-8")
    return None


def _names_encoding(names: Collection[bytes]) -> tuple[str, bool]:
    """The encoding of names that are not ASCII, and whether that needs no warning."""
    if _names_decode_as(names, "utf-8"):
        return "utf-8", True
    words = sorted(
        {word for name in names for word in _WORD_ENDS.split(name) if not word.isascii()}
    )
    costs = {
        encoding: sum(_word_cost(word, encoding) for word in words[:_SCORED_WORDS])
        for encoding in _ALPHABETS
        if _names_decode_as(names, encoding)
    }
    best = min(costs, key=lambda encoding: costs[encoding])
    return (best, best == _FALLBACK) if math.isfinite(costs[best]) else (_FALLBACK, False)


def _names_decode_as(names: Iterable[bytes], encoding: str) -> bool:
    try:
        return all(name.decode(encoding).encode(encoding) == name for name in names)
    except UnicodeError:
        return False


def _word_cost(word: bytes, encoding: str) -> float:
    """Minus the log-likelihood of a word in an encoding; infinite if it holds more than letters."""
    costs = _letter_costs(encoding)
    return sum(costs.get(letter, math.inf) for letter in word.decode(encoding))


@cache
def _letter_costs(encoding: str) -> dict[str, float]:
    # From 0x40 on a byte may be half of a character; a backslash rarely stands for itself.
    costs = {chr(code): 5.0 for code in range(0x40, 0x80)} | {"\\": 14.0}
    known: set[str] = set()
    for share, letters in _ALPHABETS[encoding]:
        group = (
            set(_two_byte_characters(encoding, *letters) if isinstance(letters, tuple) else letters)
            - known
        )
        costs |= dict.fromkeys(group, -math.log(share / len(group)))
        known |= group
    return costs


def _two_byte_characters(
    encoding: str, leads: tuple[int, int], trails: tuple[int, int]
) -> Iterator[str]:
    """The characters of two bytes, each between two bounds, both included."""
    for lead in range(leads[0], leads[1] + 1):
        for trail in range(trails[0], trails[1] + 1):
            text = bytes((lead, trail)).decode(encoding, errors="ignore")
            if len(text) == 1 and not text.isascii():
                yield text


_ByteRanges = tuple[tuple[int, int], tuple[int, int]]
_Alphabet = tuple[tuple[float, str | _ByteRanges], ...]

_WESTERN = "äöüßéèêëàâáåãæçíìîïñóòôõøœúùûÿ"
_CENTRAL = "ąćčďđęěłľńňőřśšşťţůűýźżžăâ"
_RUSSIAN = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
# The hundred syllables that make up most of Korean text.
_KOREAN = (
    "이다는에의가을고하지로은기도를한사어나리아자시대인서여해과정부그일수원전보들주조게마만제거구상"
    "장니동국면무소안오성스세선년신라생위비중적유우공진경물내당문간학모드것저방관화바트용말"
    "연미산양개강새소파과물치호랑토끼닭돼쥐곰꽃나무"
)
_CJK_SIGNS = "々ー・（）「」《》、。！　"
_LATIN: _Alphabet = (
    (0.9, string.ascii_letters),
    (0.07, _WESTERN),
    (0.015, _CENTRAL),
    (0.012, _WESTERN.upper().replace("SS", "") + "’–"),
    (0.003, _CENTRAL.upper()),
)
_CYRILLIC: _Alphabet = (
    (0.01, string.ascii_letters),
    (0.87, _RUSSIAN),
    (0.12, _RUSSIAN.upper() + "іїєґўІЇЄҐЎ№"),
)
_CJK: _Alphabet = ((0.08, string.ascii_letters), (0.02, _CJK_SIGNS))
# How often which letters are met. Of equal ones the first is taken: a zip without a word is cp437.
_ALPHABETS: dict[str, _Alphabet] = {
    "cp437": _LATIN,
    "cp850": _LATIN,
    "cp1252": _LATIN,
    "cp852": _LATIN,
    "cp1250": _LATIN,
    "cp866": _CYRILLIC,
    "cp1251": _CYRILLIC,
    "koi8-r": _CYRILLIC,
    "cp932": (
        *_CJK,
        (0.25, ((0x82, 0x82), (0x9F, 0xF1))),  # hiragana
        (0.25, ((0x83, 0x83), (0x40, 0x96))),  # katakana
        (0.38, ((0x88, 0x98), (0x40, 0xFC))),  # kanji, the common ones
        (0.02, ((0x99, 0xEA), (0x40, 0xFC))),
    ),
    "gbk": (
        *_CJK,
        (0.82, ((0xB0, 0xD7), (0xA1, 0xFE))),  # GB 2312, level 1
        (0.07, ((0xD8, 0xF7), (0xA1, 0xFE))),  # level 2
        (0.01, ((0x81, 0xFE), (0x40, 0xFE))),
    ),
    "cp950": (
        *_CJK,
        (0.85, ((0xA4, 0xC6), (0x40, 0xFE))),  # Big5, level 1
        (0.05, ((0xC9, 0xF9), (0x40, 0xFE))),
    ),
    "cp949": (
        *_CJK,
        (0.65, _KOREAN),
        (0.24, ((0xB0, 0xC8), (0xA1, 0xFE))),  # KS X 1001
        (0.01, ((0x81, 0xC6), (0x41, 0xFE))),
    ),
}
_FALLBACK = "cp437"


# Download a file over http(s): resumed where it broke off, checked, and kept for the next call.


Progress = Callable[[int, int], None]

# 0.5 + 1 + 2 + 4 s without one new byte, then it is given up.
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0)
_TIMEOUT_SECONDS = (10, 60)  # to connect, between two blocks
_BLOCK = 1 << 20
_INTERRUPTED = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


@dataclass(frozen=True)
class Download:
    """A complete file and the SHA-256 of its content, hexadecimal."""

    path: Path
    sha256: str


class NotOnServer(DownloadError):
    """The server is there, and does not have the file or does not give it to us."""


class _TryAgain(Exception):
    """The server is busy or the connection broke; what came so far is kept."""


def download(
    url: str,
    folder: Path,
    *,
    sha256: str | None = None,
    session: requests.Session | None = None,
    progress: Progress | None = None,
) -> Download:
    """Fetch a URL, or use the earlier copy while the server says it is current.

    An earlier copy with the right `sha256` is used without asking the server, and any earlier copy
    while the server cannot be reached. Calls at the same time wait for each other.

    Args:
        folder: where downloads are kept, each in its own folder.
        sha256: what the content must hash to, hexadecimal.
        session: keeps connections open for many files.
        progress: called with (bytes so far, bytes in all; 0 if the server does not say).

    Raises:
        NotOnServer: the server answers that it has no such file, or keeps it from us.
        DownloadError: the server refuses, the connection keeps breaking, or the content is wrong.
        DataError: the disk is full or cannot be written.
    """
    try:
        name = unquote(Path(urlsplit(url).path).name).replace("/", "_")[:100] or "archive"
    except ValueError as error:
        raise DataError(f"{without_secrets(url)} is not a web address: {error}.") from None
    place = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            return _Transfer(url, place / name, sha256, session, progress).run()
    except OSError as error:
        raise DataError(explain_write(error, place / name)) from None


class _Transfer:
    """One URL on its way to one path; `.part` holds what has come, `.json` what it belongs to."""

    def __init__(
        self,
        url: str,
        path: Path,
        sha256: str | None,
        session: requests.Session | None,
        progress: Progress | None,
    ) -> None:
        self.url = url
        self.get = requests.get if session is None else session.get
        self.shown = without_secrets(url)
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.expected = sha256.lower() if sha256 else None
        self.progress = progress

    def run(self) -> Download:
        kept = self._kept()
        if kept is not None and kept.sha256 == self.expected:
            return kept
        failures = 0
        while True:
            before = self._size()
            try:
                current = self._request(kept)
                return kept if current and kept is not None else self._finish()
            except _TryAgain as error:
                if kept is not None and self.expected is None:
                    return kept
                failures = 0 if self._size() > before else failures + 1
                if failures > len(_BACKOFF_SECONDS):
                    raise DownloadError(
                        f"The download of {self.shown} broke off: {error}. "
                        "Run the same command again; it goes on where it stopped."
                    ) from None
                interrupts.sleep(_BACKOFF_SECONDS[max(failures - 1, 0)])

    def _request(self, kept: Download | None) -> bool:
        """One request; True if the kept copy is still current."""
        try:
            with self.get(
                self.url, headers=self._headers(kept), stream=True, timeout=_TIMEOUT_SECONDS
            ) as response:
                if response.status_code == 304:
                    return True
                if response.status_code == 416:  # what came so far is no part of the file any more
                    self.part.unlink(missing_ok=True)
                    raise _TryAgain("the file changed on the server")
                self._refuse(response)
                self._receive(response)
        except _INTERRUPTED as error:
            raise _TryAgain(_reason(error)) from None
        except requests.RequestException as error:
            raise DownloadError(f"Cannot fetch {self.shown}: {_reason(error)}.") from None
        return False

    def _headers(self, kept: Download | None) -> dict[str, str]:
        # Compressed on the way, lengths and ranges would count other bytes than the file's.
        headers = {"Accept-Encoding": "identity"}
        if kept is not None and self.expected is None:
            known = read_cached_json(_notes(self.path))
            headers |= _filled("If-None-Match", known.get("etag"))
            headers |= _filled("If-Modified-Since", known.get("modified"))
        elif self._size():
            known = read_cached_json(_notes(self.part))
            validator = known.get("etag") or known.get("modified")
            if validator and not str(validator).startswith("W/"):
                headers |= {"Range": f"bytes={self._size()}-", "If-Range": str(validator)}
        return headers

    def _refuse(self, response: requests.Response) -> None:
        status = response.status_code
        if status == 429 or status >= 500:
            raise _TryAgain(f"the server answered {status} {response.reason}")
        if status not in (200, 206):
            kind = NotOnServer if status in (401, 403, 404, 410) else DownloadError
            raise kind(
                f"Cannot fetch {self.shown}: the server answered {status} "
                f"{response.reason}. Check the address."
            )

    def _receive(self, response: requests.Response) -> None:
        done = self._size() if response.status_code == 206 else 0
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == 206 and not content_range.startswith(f"bytes {done}-"):
            self.part.unlink(missing_ok=True)
            raise _TryAgain("the server sent another part than asked for")
        total = done + int(response.headers.get("Content-Length") or 0)
        total = total if "Content-Length" in response.headers else 0
        with self.part.open("ab" if done else "wb") as file:
            write_cached_json(_notes(self.part), _validators(response))
            for block in response.raw.stream(_BLOCK, decode_content=False):
                file.write(block)
                done += len(block)
                interrupts.check()
                if self.progress is not None:
                    self.progress(done, total)
        if total and done != total:
            raise _TryAgain(f"{done:,} of {total:,} bytes came")

    def _finish(self) -> Download:
        digest = file_digest(self.part)
        if self.expected not in (None, digest):
            self.part.unlink()
            raise DownloadError(
                f"{self.shown} has SHA-256 {digest}, not {self.expected} as asked for. "
                "Check data.sha256, or try again."
            )
        notes = read_cached_json(_notes(self.part))
        self.part.replace(self.path)
        write_cached_json(
            _notes(self.path), {**notes, "sha256": digest, "size": self.path.stat().st_size}
        )
        _notes(self.part).unlink(missing_ok=True)
        return Download(self.path, digest)

    def _kept(self) -> Download | None:
        notes = read_cached_json(_notes(self.path))
        if self.path.is_file() and notes.get("size") == self.path.stat().st_size:
            return Download(self.path, str(notes.get("sha256")))
        return None

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0


def _notes(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _validators(response: requests.Response) -> dict[str, str | None]:
    headers = response.headers
    return {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified")}


def _filled(name: str, value: Any) -> dict[str, str]:
    return {name: str(value)} if value else {}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "the server does not answer"
    if "NameResolutionError" in text:
        return "the host's name is not known here"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "the server's certificate cannot be verified"
    if "refused" in text:
        return "the connection was refused"
    if isinstance(error, _INTERRUPTED):
        return "the connection was closed"
    return without_secrets(text)
