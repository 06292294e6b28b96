"""The validation pictures that a classifier folder records with its own answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from visiontuner.commands import next_command
from visiontuner.data.images import Preprocessing, decode_image
from visiontuner.errors import BadImageError, DataError

REFERENCE_PICTURES = 20
# Twenty pictures as base64: at most 20 x 200 kB x 4/3 = 5.3 MB.
_LARGEST_PICTURE = 200_000
_JPEG_QUALITY = 90


def reference_pictures(
    root: Path,
    paths: Sequence[str],
    *,
    labels: Sequence[int] | None,
    preprocessing: Preprocessing,
) -> list[dict[str, Any]]:
    """The first 20 pictures that can be read: "content" (bytes), "path" and "label" (or None).

    A file of more than 200 kB becomes a smaller JPEG that still exceeds what the network sees.

    Args:
        paths: relative to `root`.
        labels: the pictures' classes.

    Raises:
        DataError: none can be read.
    """
    pictures: list[dict[str, Any]] = []
    for index, path in enumerate(paths):
        if len(pictures) == REFERENCE_PICTURES:
            break
        with suppress(BadImageError, OSError):
            content = _small_content(root / path, preprocessing)
            label = None if labels is None else int(labels[index])
            pictures.append({"path": path, "content": content, "label": label})
    if not pictures:
        raise DataError(
            f"None of the {len(paths)} reference pictures in {root} can be read. "
            f"Run `{next_command('prepare', '--data', root)}` to see why."
        )
    return pictures


def _small_content(path: Path, preprocessing: Preprocessing) -> bytes:
    """The file as it is, or a smaller JPEG that still exceeds what the network sees."""
    content = path.read_bytes()
    if len(content) <= _LARGEST_PICTURE:
        decode_image(content, target=preprocessing.resize)
        return content
    image = decode_image(content, target=preprocessing.resize)
    for side in (2 * preprocessing.resize, preprocessing.resize):
        smaller = image.copy()
        scale = min(1.0, side / min(smaller.size))
        smaller = smaller.resize([max(1, round(length * scale)) for length in smaller.size])
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        if buffer.tell() <= _LARGEST_PICTURE:
            break
    return buffer.getvalue()
