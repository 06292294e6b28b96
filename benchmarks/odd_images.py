"""Does `visiontuner suspects` name odd images, and leave the others alone?

On photographs: those that are named as delivered are counted; some are then made odd (blurred,
darkened, put into a class of another data set), and what is named is compared with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from measuring import Row, cache_of_its_own, features_of, photographs, report
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from visiontuner.data.findings import are_blurred, are_dark, brightness, sharpness
from visiontuner.data.images import decode_image
from visiontuner.evaluation.suspects import UNLIKE_ITS_CLASS, class_deviations
from visiontuner.workflow.image_checks import check_labels, find_odd_images

TARGETS = ("at most 2 % of the images as delivered are named",)
SMALL = {"names": ("flowers5",), "step": 40}
_NETWORK_INPUT = 224
_OTHER = {"dogs24": "flowers5", "flowers5": "dogs24"}


def measure(*, names: tuple[str, ...] = ("dogs24", "flowers5"), step: int = 5) -> dict[str, Any]:
    """Args:
    step: of so many photographs one is blurred and darkened.
    """
    for name in names:
        photographs(name)  # before anything is computed
    rows: list[Row] = []
    with cache_of_its_own():
        for name in names:
            rows += [_delivered(name), *_changed(name, step), _foreign(name)]
    return report(rows)


def _delivered(name: str) -> Row:
    inputs, features = features_of(photographs(name), ("train", "validation"))
    checked = check_labels(inputs, features)
    odd = find_odd_images(inputs, features, checked.suspects)
    counts = Counter(one.reason for one in odd)
    share = len(odd) / checked.images
    return Row(
        what=f"{name}: named of {checked.images:,} images as delivered",
        target="at most 2 %",
        result=f"{share:.1%} ({', '.join(f'{n} {reason}' for reason, n in counts.items())})",
        met=share <= 0.02,
    )


def _changed(name: str, step: int) -> list[Row]:
    """Recall on changed photographs, each judged beside all others as they are."""
    paths = sorted(path for path in photographs(name).rglob("*.jp*g"))
    whole = [decode_image(path, target=64) for path in paths]  # as `prepare` decodes
    sharp = np.array([sharpness(image) for image in whole])
    light = np.array([brightness(image) for image in whole], dtype=np.float64)

    def recall(change: Callable[[Image.Image], Image.Image], *, dark: bool) -> str:
        found = 0
        for row in range(0, len(whole), step):
            image = change(whole[row])
            value = brightness(image) if dark else sharpness(image)
            values = (light if dark else sharp).copy()
            values[row] = value
            found += bool((are_dark if dark else are_blurred)(values)[row])
        return f"{found / len(range(0, len(whole), step)):.3f}"

    blurred = [
        Row(
            what=f"{name}: found when blurred by {pixels} of 224 pixels (sigma)",
            target="",
            result=recall(lambda image, pixels=pixels: _blur(image, pixels), dark=False),
        )
        for pixels in (1, 1.5, 2, 3)
    ]
    darkened = [
        Row(
            what=f"{name}: found when each level is multiplied by {factor}",
            target="",
            result=recall(lambda image, f=factor: image.point(lambda v: v * f), dark=True),
        )
        for factor in (0.4, 0.3, 0.2)
    ]
    return blurred + darkened


def _blur(image: Image.Image, pixels: float) -> Image.Image:
    radius = pixels * min(image.size) / _NETWORK_INPUT
    return image.filter(ImageFilter.GaussianBlur(radius))


def _foreign(name: str) -> Row:
    """Recall of three images of the other data set in each class, ten draws."""
    own, others = (_vectors(each) for each in (name, _OTHER[name]))
    found: list[float] = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        classes = np.unique(own[1])
        drawn = rng.choice(len(others[0]), 3 * len(classes), replace=False)
        features = np.concatenate([own[0], others[0][drawn]])
        labels = np.concatenate([own[1], np.repeat(classes, 3)])
        values = class_deviations(features, labels, [str(row) for row in range(len(labels))])
        found.append(float((values[len(own[0]) :] > UNLIKE_ITS_CLASS).mean()))
    return Row(
        what=f"{name}: of three images of {_OTHER[name]} in each class found, 10 draws",
        target="",
        result=f"{np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})",
    )


def _vectors(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    _, features = features_of(photographs(name), ("train", "validation"))
    splits = [features.split(split) for split in ("train", "validation")]
    return (
        np.concatenate([split.features for split in splits]),
        np.concatenate([split.labels for split in splits]),
    )
