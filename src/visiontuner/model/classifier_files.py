"""Write a classifier folder; without torch, so that calibrating one again is quick."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from visiontuner.data.images import Preprocessing, decode_image
from visiontuner.errors import BadImageError, ClassifierError, DataError, VisiontunerError
from visiontuner.io.files import encode_json, temporary_folder
from visiontuner.model.classifier import (
    DESCRIPTION,
    NETWORK,
    NOVELTY,
    REFERENCE,
    SCHEMA_VERSION,
    WEIGHTS,
    Classifier,
    reference_entries,
)
from visiontuner.model.novelty import Novelty
from visiontuner.text import next_command

# The validation images that a classifier folder records with its own answers.


REFERENCE_IMAGES = 20
# Twenty images as base64: at most 20 x 200 kB x 4/3 = 5.3 MB.
_LARGEST_IMAGE = 200_000
_JPEG_QUALITY = 90


def reference_images(
    root: Path,
    paths: Sequence[str],
    *,
    labels: Sequence[int] | None,
    preprocessing: Preprocessing,
) -> list[dict[str, Any]]:
    """The first 20 images that can be read: "content" (bytes), "path" and "label" (or None).

    A file of more than 200 kB becomes a smaller JPEG that still exceeds what the network sees.

    Args:
        paths: relative to `root`.
        labels: the images' classes.

    Raises:
        DataError: none can be read.
    """
    images: list[dict[str, Any]] = []
    for index, path in enumerate(paths):
        if len(images) == REFERENCE_IMAGES:
            break
        with suppress(BadImageError, OSError):
            content = _small_content(root / path, preprocessing)
            label = None if labels is None else int(labels[index])
            images.append({"path": path, "content": content, "label": label})
    if not images:
        raise DataError(
            f"None of the {len(paths)} reference images in {root} can be read. "
            f"Run `{next_command('prepare', '--data', root)}` to see why."
        )
    return images


def _small_content(path: Path, preprocessing: Preprocessing) -> bytes:
    """The file as it is, or a smaller JPEG that still exceeds what the network sees."""
    content = path.read_bytes()
    if len(content) <= _LARGEST_IMAGE:
        decode_image(content, target=preprocessing.resize)
        return content
    image = decode_image(content, target=preprocessing.resize)
    for side in (2 * preprocessing.resize, preprocessing.resize):
        smaller = image.copy()
        scale = min(1.0, side / min(smaller.size))
        smaller = smaller.resize([max(1, round(length * scale)) for length in smaller.size])
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        if buffer.tell() <= _LARGEST_IMAGE:
            break
    return buffer.getvalue()


def recalibrate(
    folder: Path,
    *,
    temperature: float,
    threshold: float | None,
    abstains: bool = False,
    metadata: Mapping[str, Any],
) -> Classifier:
    """The same network with another temperature and threshold; its reference is answered anew.

    The folder changes at once or not at all. The same values give the same bytes.

    Args:
        temperature: logits are divided by it before the softmax.
        threshold: below this probability an answer should not be trusted; None for no limit.
        abstains: no answer should be trusted; without a threshold.
        metadata: plain JSON values, added to what is there.

    Raises:
        ClassifierError: the folder is no classifier, or its reference is damaged.
        VisiontunerError: the folder cannot be written.
    """
    folder = folder.absolute()
    images = recorded_images(folder)
    with replacing(folder) as temporary:
        shutil.copy2(folder / NETWORK, temporary / NETWORK)
        for name in (WEIGHTS, NOVELTY):  # a classifier in int8 has no weights
            with suppress(FileNotFoundError):
                shutil.copy2(folder / name, temporary / name)
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        description |= {
            "temperature": temperature,
            "threshold": threshold,
            "abstains": abstains,
        }
        description["metadata"] |= metadata
        write_json(temporary / DESCRIPTION, description)
        classifier = Classifier.load(temporary)
        write_json(temporary / REFERENCE, reference_document(classifier, images))
    return Classifier.load(folder)


def recorded_images(folder: Path) -> list[dict[str, Any]]:
    """The images of a classifier's `reference.json`: "path", "label" and "content" (bytes).

    Raises:
        ClassifierError: the folder is no classifier, or its reference is damaged.
    """
    Classifier.load(folder).verify_reference()  # damaged: said before anything is written
    try:
        reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
        return [
            {
                "path": image.get("path"),
                "label": image.get("label"),
                "content": base64.b64decode(image["image"], validate=True),
            }
            for image in reference_entries(reference)
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ClassifierError(f"{folder / REFERENCE} is damaged ({error}).") from None


def reference_document(
    classifier: Classifier, images: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `reference.json` holds: images with what this artifact says of them now.

    Args:
        images: each with "path", "content" (bytes of an image file) and "label" (or None).
    """
    scores = classifier.score([image["content"] for image in images])
    scores.raise_first()
    return {
        "schema_version": SCHEMA_VERSION,
        "images": [
            {
                "path": image["path"],
                "label": image["label"],
                "class_name": _name(classifier, image["label"]),
                "predicted": classifier.class_names[int(row.argmax())],
                "probabilities": row.tolist(),
                "novelty": None if classifier.novelty is None else float(novelty),
                "image": base64.b64encode(image["content"]).decode(),
            }
            for image, row, novelty in zip(images, *scores[:2], strict=True)
        ],
    }


def write_novelty(folder: Path, description: dict[str, Any], novelty: Novelty) -> None:
    """Add to a classifier folder, and to what its description says, which images are known."""
    (folder / NOVELTY).write_bytes(novelty.content())
    description["novelty"] = novelty.to_dict()
    write_json(folder / DESCRIPTION, description)


def _name(classifier: Classifier, label: int | None) -> str | None:
    return None if label is None else classifier.class_names[label]


def write_json(path: Path, value: Any) -> None:
    """Plain JSON, one line a value."""
    path.write_bytes(encode_json(value, indent=1) + b"\n")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of another one when the block ends well.

    Raises:
        VisiontunerError: it cannot be written.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            temporary.chmod(0o755)
            yield temporary
            _replace_folder(temporary, folder)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}). Make room.") from None


def _replace_folder(new: Path, target: Path) -> None:
    """Move `new` to `target`; an older folder there is kept until the new one is in place."""
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        for left in target.parent.glob(f".{target.name}-old-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        target.replace(old)
    try:
        new.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
