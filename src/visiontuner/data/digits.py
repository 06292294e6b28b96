"""The built-in data set: scikit-learn's 1,797 handwritten digits as pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from visiontuner.data.archive import whole_folder

# Part of the folder's name: another way of drawing them is another data set.
_VERSION = 1
_SIDE = 32  # pixels; the originals are 8 x 8, drawn four times as large
_FOLDERS = (("valid", 0.1), ("test", 0.1))


def write_digits(cache: Path) -> Path:
    """Write the digits once, as train/, valid/ and test/ with a folder for each of "0" to "9".

    A tenth of each digit is for validation and a tenth for the test, chosen by content.

    Returns:
        The folder; calls at the same time, in other processes too, end with the same one.

    Raises:
        DataError: the cache cannot be written.
    """
    target = cache / "datasets" / f"digits-{_VERSION}"
    if target.is_dir():
        return target
    with whole_folder(target) as folder:
        _write(folder)
    return target


def _write(folder: Path) -> None:
    from sklearn.datasets import load_digits  # a second to import, needed once

    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0 to 16
    for digit in range(10):
        indices = [int(i) for i in np.flatnonzero(digits.target == digit)]
        # By content, not by order: neighbours in the original were written by the same person.
        indices.sort(key=lambda i: hashlib.sha256(levels[i].tobytes()).digest())
        for name, members in _split(indices).items():
            place = folder / name / str(digit)
            place.mkdir(parents=True)
            for index in members:
                picture = Image.fromarray(levels[index])
                picture = picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
                picture.save(place / f"{index:04}.png")


def _split(indices: list[int]) -> dict[str, list[int]]:
    parts, start = {}, 0
    for name, fraction in _FOLDERS:
        end = start + round(fraction * len(indices))
        parts[name] = indices[start:end]
        start = end
    return {"train": indices[start:], **parts}
