"""Which pictures a query is about: files, folders, URLs and standard input, read one at a time."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from visiontuner.data.images import decode_image, picture_extensions
from visiontuner.errors import BadImageError, UserMistake
from visiontuner.serving.answers import MAX_BYTES
from visiontuner.text import without_secrets

_TIMEOUT_SECONDS = (10, 60)  # to connect, between two blocks
_BLOCK = 1 << 16
# The shorter side, pixels, and JPEG quality; every network here sees less than 600 pixels.
_SMALLER = ((1024, 92), (768, 85), (512, 80), (256, 70))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a query; `read` gives its content or raises BadImageError."""

    name: str
    read: Callable[[], bytes]


def find_pictures(sources: Sequence[str]) -> list[Picture]:
    """Files, folders (with all below them), http(s) URLs, and `-` for standard input.

    A file that is not there is found out by reading it, so that it does not hold up the others.

    Raises:
        UserMistake: a folder holds no picture, or `-` is given twice.
    """
    if list(sources).count("-") > 1:
        raise UserMistake("`-`, standard input, holds one picture; give it once.")
    return [picture for source in sources for picture in _pictures(source)]


def shrink(content: bytes, max_bytes: int) -> bytes:
    """The same picture as a JPEG of at most so many bytes, still more than a network sees.

    Raises:
        BadImageError: it cannot be read, or not be made so small.
    """
    for side, quality in _SMALLER:
        image = decode_image(content, target=side)
        scale = min(1.0, side / min(image.size))
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= max_bytes:
            return buffer.getvalue()
    raise BadImageError(f"{len(content):,} bytes cannot be reduced to the {max_bytes:,} allowed.")


def _pictures(source: str) -> Iterator[Picture]:
    if source == "-":
        yield Picture(name="-", read=_read_stdin)
    elif source.startswith(("http://", "https://")):
        yield Picture(name=without_secrets(source), read=partial(_read_url, source))
    elif (folder := Path(source)).is_dir():
        yield from _below(folder)
    else:
        yield Picture(name=source, read=partial(_read_file, Path(source)))


def _below(folder: Path) -> list[Picture]:
    endings = picture_extensions()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not paths:
        raise UserMistake(f"{folder} holds no picture files.")
    return [Picture(name=str(path), read=partial(_read_file, path)) for path in paths]


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadImageError(_too_large(path.stat().st_size))
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"Cannot read it: {error.strerror}.") from None


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadImageError(_too_large(len(content)))
    return content


def _read_url(url: str) -> bytes:
    try:
        with requests.get(url, stream=True, timeout=_TIMEOUT_SECONDS) as response:
            response.raise_for_status()
            content = b""
            for block in response.iter_content(_BLOCK):
                content += block
                if len(content) > MAX_BYTES:
                    raise BadImageError(_too_large(len(content)))
            return content
    except requests.HTTPError as error:
        status = error.response.status_code
        raise BadImageError(f"Cannot fetch it: the server answers {status}.") from None
    except requests.RequestException as error:
        raise BadImageError(f"Cannot fetch it: {type(error).__name__}.") from None


def _too_large(length: int) -> str:
    return f"It has {length / 1e6:,.1f} MB or more; at most {MAX_BYTES / 1e6:,.0f} MB are read."
