"""A map of a search's images for its report: their features in two dimensions, small images, marks.

FOLDER/image_map.json holds all that the report shows of single images; `tracking/map_symbols.py`
reads it. Test images are on the map only once an evaluation has looked at them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from visiontuner.data.arrays import FeatureSet, available_cpus
from visiontuner.data.dataset import Sample
from visiontuner.data.images import decode_image
from visiontuner.errors import BadImageError
from visiontuner.evaluation.projection import choose_points, project
from visiontuner.io.files import write_atomically, write_json
from visiontuner.paths import (
    EVALUATION_FOLDER,
    EVALUATION_PREDICTIONS,
    IMAGE_MAP_FILE,
    TEST_FEATURES_FILE,
)
from visiontuner.tracking.map_symbols import MAP_VERSION
from visiontuner.workflow.inputs import Inputs

if TYPE_CHECKING:
    from visiontuner.data.findings import OddImage
    from visiontuner.workflow.image_checks import Suspect

# 5,000 images of 40 x 40 pixels, or 1,950 of 64 x 64: about 1.4 MB as WebP, of photographs.
_SPRITE_PIXELS = 8_000_000
_SIDES = (16, 64)  # the smallest and the largest
# What the page can hold: 2.9 MB in base64, beside about 1 MB of figures and names.
_MOST_BYTES = 2_200_000
_QUALITIES = (60, 40, 20, 5)
_FIRST_SUSPECTS = 12
_SUSPECT_SIDE = 112


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What is known of single images: path -> what is said of it.

    Args:
        suspects: training and validation images whose label is probably wrong; None where nobody
            has looked for them.
        outliers: those that are unlike the other images of their class.
    """

    suspects: Sequence[Suspect] | None
    outliers: Mapping[str, str]

    @classmethod
    def of(cls, suspects: Sequence[Suspect] | None, odd: Iterable[OddImage]) -> Marks:
        """Of odd images the outliers, which features show."""
        outliers = {
            one.path: f"{one.value:.1f} deviations from its class"
            for one in odd
            if one.reason == "outlier"
        }
        return cls(suspects=suspects, outliers=outliers)


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """Of an evaluated test image."""

    predicted: int
    probability: float
    known: bool


def draw_image_map(folder: Path, inputs: Inputs, features: FeatureSet, marks: Marks) -> Path | None:
    """Write `image_map.json` into a search folder, for the report that is written next.

    Args:
        features: of the training and validation images, by the network whose images they are.

    Returns:
        Its path; None if there are fewer than three images.

    Raises:
        VisiontunerError: the features of test images cannot be computed, or the disk is full.
    """
    tested = _read_tested(folder)
    samples = _samples(inputs, features, tested)
    kept = _read_test_features(folder, inputs.description.name)
    at_hand = [(of, s) for of, s in samples if of != "test" or not kept or s.path in kept]
    said = _said(marks, tested, features.class_names, at_hand)
    labels = np.array([sample.label for _, sample in at_hand])
    rows = choose_points(labels, [sample.path in said for _, sample in at_hand])
    if len(rows) < 3:
        return None
    chosen = [at_hand[row] for row in rows]
    projection = project(_features(inputs, features, kept, chosen))
    sprite, side, columns = _sprite(inputs, [sample for _, sample in chosen])
    path = folder / IMAGE_MAP_FILE
    write_json(
        path,
        {
            "version": MAP_VERSION,
            "images": len(samples),
            "method": projection.method,
            "explained": projection.explained,
            "class_names": list(features.class_names),
            "paths": [sample.path for _, sample in chosen],
            "splits": [split for split, _ in chosen],
            "labels": [sample.label for _, sample in chosen],
            "places": np.round(projection.places, 4).tolist(),
            "said": {
                str(place): said[sample.path]
                for place, (_, sample) in enumerate(chosen)
                if sample.path in said
            },
            "sprite": sprite,
            "side": side,
            "columns": columns,
            "suspects": _first_suspects(inputs.dataset.root, marks),
        },
    )  # fmt: skip
    return path


# Which images, and what is said of them


def _samples(
    inputs: Inputs, features: FeatureSet, tested: Mapping[str, _Tested]
) -> list[tuple[str, Sample]]:
    """Split and sample of every image that can be read; of test those that were evaluated."""
    splits = inputs.dataset.splits
    known = {s.path: s for split in ("train", "validation") for s in splits[split]}
    found = [
        (split, known[path])
        for split in ("train", "validation")
        for path in features.split(split).paths
    ]
    return found + [("test", sample) for sample in splits["test"] if sample.path in tested]


def _read_tested(folder: Path) -> dict[str, _Tested]:
    """What the evaluation answered, by path; nothing before one."""
    try:
        with np.load(
            folder / EVALUATION_FOLDER / EVALUATION_PREDICTIONS, allow_pickle=False
        ) as file:
            paths, probabilities = file["paths"].tolist(), file["probabilities"]
            known = file["known"] if "known" in file else np.ones(len(paths), dtype=bool)
    except (OSError, ValueError, LookupError, BadZipFile):
        return {}
    first = probabilities.argmax(axis=1)
    return {
        path: _Tested(predicted=int(k), probability=float(row[k]), known=bool(is_known))
        for path, k, row, is_known in zip(paths, first, probabilities, known, strict=True)
    }


def _said(
    marks: Marks,
    tested: Mapping[str, _Tested],
    names: Sequence[str],
    samples: Iterable[tuple[str, Sample]],
) -> dict[str, dict[str, str]]:
    """path -> mark -> what is said of it."""
    said: dict[str, dict[str, str]] = {}
    for suspect in marks.suspects or ():
        said.setdefault(suspect.path, {})["suspect"] = f"rather {suspect.suggested}"
    for path, why in marks.outliers.items():
        said.setdefault(path, {})["outlier"] = why
    for split, sample in samples:
        if split != "test":
            continue
        answer = tested[sample.path]
        if answer.predicted != sample.label:
            taken = f"taken for {names[answer.predicted]} ({answer.probability:.0%})"
            said.setdefault(sample.path, {})["mistake"] = taken
        if not answer.known:
            said.setdefault(sample.path, {})["novel"] = "unlike the training images"
    return said


def write_test_features(
    folder: Path, backbone: str, features: Mapping[str, NDArray[np.float32]]
) -> None:
    """Keep what an evaluation has computed, so that the map needs no further pass.

    Args:
        backbone: whose features they are.
        features: path -> float32, shape (D,); without any an older file goes.

    Raises:
        OSError: the disk is full.
    """
    path = folder / TEST_FEATURES_FILE
    path.unlink(missing_ok=True)
    if features:
        rows = np.stack(list(features.values())).astype(np.float16)
        arrays = {
            "paths": np.array(list(features)),
            "features": rows,
            "backbone": np.array(backbone),
        }
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def _read_test_features(folder: Path, backbone: str) -> dict[str, NDArray[np.float32]]:
    try:
        with np.load(folder / TEST_FEATURES_FILE, allow_pickle=False) as file:
            if str(file["backbone"]) != backbone:
                return {}
            rows = file["features"].astype(np.float32)
            return dict(zip(file["paths"].tolist(), rows, strict=True))
    except (OSError, ValueError, LookupError, BadZipFile):
        return {}


def _features(
    inputs: Inputs,
    features: FeatureSet,
    kept: Mapping[str, NDArray[np.float32]],
    chosen: Sequence[tuple[str, Sample]],
) -> NDArray[np.float32]:
    """Of the images on the map, float32, shape (N, D), in order."""
    found = dict(kept)
    stores = [(split, features) for split in ("train", "validation")]
    missing = tuple(s for split, s in chosen if split == "test" and s.path not in found)
    if missing:  # of a fine-tuned network, whose own features are others
        dataset = replace(inputs.dataset, splits={**inputs.dataset.splits, "test": missing})
        stores.append(("test", inputs.features_of(dataset, ("test",))))
    wanted = {sample.path for _, sample in chosen}
    for split, store in stores:
        part = store.split(split)
        found |= {p: part.features[row] for row, p in enumerate(part.paths) if p in wanted}
    return np.stack([found[sample.path] for _, sample in chosen])


# Small images


def _sprite(inputs: Inputs, samples: Sequence[Sample]) -> tuple[str, int, int]:
    """All images in rows on one sheet, WebP in base64; the side of each, and how many in a row."""
    side = int(min(_SIDES[1], max(_SIDES[0], math.sqrt(_SPRITE_PIXELS / len(samples)))))
    columns = math.ceil(math.sqrt(len(samples)))
    sheet = Image.new("RGB", (columns * side, math.ceil(len(samples) / columns) * side), "#ccc")
    paths = [inputs.dataset.root / sample.path for sample in samples]
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="thumbnails") as pool:
        for place, image in enumerate(pool.map(lambda path: thumbnail(path, side), paths)):
            if image is not None:
                sheet.paste(image, (place % columns * side, place // columns * side))
            inputs.observer.progress("Map", place + 1, len(paths), "images")
    for smaller in (side, side // 2, _SIDES[0]):  # a photograph fits at once, noise does not
        size = (columns * smaller, math.ceil(len(samples) / columns) * smaller)
        for quality in _QUALITIES:
            content = _webp(sheet if smaller == side else sheet.resize(size), quality)
            if len(content) <= _MOST_BYTES:
                return _base64(content), smaller, columns
    raise AssertionError(f"{len(samples)} images of {smaller} pixels have {len(content)} bytes")


def thumbnail(path: Path, side: int) -> Image.Image | None:
    """The middle of an image, side x side pixels; None if it cannot be read any more."""
    try:
        image = decode_image(path, target=side)
    except BadImageError:
        return None
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def _webp(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def _first_suspects(root: Path, marks: Marks) -> dict[str, Any] | None:
    """How many suspects there are, and the surest of them as images."""
    if marks.suspects is None:
        return None
    first = []
    for suspect in marks.suspects[:_FIRST_SUSPECTS]:
        image = thumbnail(root / suspect.path, _SUSPECT_SIDE)
        first.append(
            {
                "path": suspect.path,
                "label": suspect.label,
                "suggested": suspect.suggested,
                "score": suspect.score,
                "image": image and _base64(_webp(image, _QUALITIES[0])),
            }
        )
    return {"count": len(marks.suspects), "first": first}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
