"""Download a file over http(s): resumed where it broke off, checked, and kept for the next call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from filelock import FileLock

from visiontuner import interrupts
from visiontuner.data.archive import explain_write
from visiontuner.data.digests import file_digest, write_json
from visiontuner.errors import DataError, DownloadError
from visiontuner.text import without_secrets

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


class _TryAgain(Exception):
    """The server is busy or the connection broke; what came so far is kept."""


def download(
    url: str, folder: Path, *, sha256: str | None = None, progress: Progress | None = None
) -> Download:
    """Fetch a URL, or use the earlier copy while the server says it is current.

    An earlier copy with the right `sha256` is used without asking the server, and any earlier copy
    while the server cannot be reached. Calls at the same time wait for each other.

    Args:
        folder: where downloads are kept, each in its own folder.
        sha256: what the content must hash to, hexadecimal.
        progress: called with (bytes so far, bytes in all; 0 if the server does not say).

    Raises:
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
            return _Transfer(url, place / name, sha256, progress).run()
    except OSError as error:
        raise DataError(explain_write(error, place / name)) from None


class _Transfer:
    """One URL on its way to one path; `.part` holds what has come, `.json` what it belongs to."""

    def __init__(self, url: str, path: Path, sha256: str | None, progress: Progress | None) -> None:
        self.url = url
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
            with requests.get(
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
            known = _read_json(_notes(self.path))
            headers |= _filled("If-None-Match", known.get("etag"))
            headers |= _filled("If-Modified-Since", known.get("modified"))
        elif self._size():
            known = _read_json(_notes(self.part))
            validator = known.get("etag") or known.get("modified")
            if validator and not str(validator).startswith("W/"):
                headers |= {"Range": f"bytes={self._size()}-", "If-Range": str(validator)}
        return headers

    def _refuse(self, response: requests.Response) -> None:
        status = response.status_code
        if status == 429 or status >= 500:
            raise _TryAgain(f"the server answered {status} {response.reason}")
        if status not in (200, 206):
            raise DownloadError(
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
            write_json(_notes(self.part), _validators(response))
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
        notes = _read_json(_notes(self.part))
        self.part.replace(self.path)
        write_json(_notes(self.path), {**notes, "sha256": digest, "size": self.path.stat().st_size})
        _notes(self.part).unlink(missing_ok=True)
        return Download(self.path, digest)

    def _kept(self) -> Download | None:
        notes = _read_json(_notes(self.path))
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


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
