"""100,000 images: is `prepare` with a table as fast as with the class folders of the same images?

Both have been looked at before, so that digests and what images show are in the cache. In turn,
in this process; the table has the same digest, or the measurement fails.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measuring import Row, report, scratch
from PIL import Image

from visiontuner.experiment.schema import Experiment
from visiontuner.workflow.prepare import prepare

TARGETS = ("at most 1.2 x the time with class folders",)
SMALL = {"images": 1_000, "rounds": 1}
_CLASSES = 100


def measure(*, images: int = 100_000, rounds: int = 3) -> dict[str, Any]:
    """Seconds of each form, the median of the rounds."""
    with scratch() as folder:
        os.environ["VISIONTUNER_CACHE"] = str(folder / "cache")
        photos = folder / "photos"
        _make(photos, images)
        forms = {"folders": str(photos), "table": str(photos / "labels.csv")}
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        digests = {_prepare(source, []) for source in forms.values()}
        for _ in range(rounds):
            digests |= {_prepare(source, seconds[name]) for name, source in forms.items()}
    if len(digests) != 1:
        raise RuntimeError("the table is another data set than the folders")
    middle = {name: median(values) for name, values in seconds.items()}
    ratio = middle["table"] / middle["folders"]
    row = Row(
        what=f"{images:,} images in {_CLASSES} classes, looked at before",
        target=TARGETS[0],
        result=f"{ratio:.2f} x: {middle['table']:.2f} s, {middle['folders']:.2f} s with folders",
        met=ratio <= 1.2,
    )
    return report([row], seconds=seconds)


def _prepare(source: str, seconds: list[float]) -> str:
    began = time.monotonic()
    digest = prepare(Experiment.parse({"data": {"source": source}})).dataset.digest
    seconds.append(time.monotonic() - began)
    return digest


def _make(photos: Path, images: int) -> None:
    """Images of noise, 8 x 8 pixels, in class folders, and their table beside them."""
    generator = np.random.default_rng(0)
    rows = ["path,label"]
    for label in range(_CLASSES):
        (photos / f"class{label:03}").mkdir(parents=True)
        for number in range(images // _CLASSES):
            path = f"class{label:03}/{number:05}.png"
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / path, compress_level=0)
            rows.append(f"{path},class{label:03}")
    (photos / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
