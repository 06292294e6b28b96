"""Do heat maps lie on the animal? Their energy inside boxes that were drawn by hand.

The photographs are the first 20 of dogs24's test images, in an order drawn once (numpy's generator,
seed 20), whose box takes at most half of what the network sees: in a larger one no map can have
much more than a uniform one has. 47 of the first 67 were passed over for it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from measuring import Command, Row, photographs, report, scratch

from visiontuner.data.images import read_pixels
from visiontuner.model.classifier import Classifier
from visiontuner.model.heatmaps import Explainer

TARGETS = ("energy inside the box at least 1.5 times that of a uniform map",)
SMALL: dict[str, Any] = {}
# Left, top, right, bottom around the animals of the label, in pixels of the 224 x 224 that the
# network sees: the shorter side resized to 256, and the middle cut out.
_SIDE = 224
BOXES = {
    "test/Weimaraner/n02092339_5313.jpg": (66, 64, 152, 204),
    "test/Greater_Swiss_Mountain_dog/n02107574_1953.jpg": (4, 56, 138, 186),
    "test/beagle/n02088364_14548.jpg": (0, 56, 202, 172),
    "test/Irish_wolfhound/n02090721_5049.jpg": (90, 70, 182, 206),
    "test/toy_poodle/n02113624_274.jpg": (66, 60, 150, 172),
    "test/Yorkshire_terrier/n02094433_2266.jpg": (38, 120, 186, 202),
    "test/Norwegian_elkhound/n02091467_4426.jpg": (52, 64, 180, 168),
    "test/whippet/n02091134_10219.jpg": (102, 64, 198, 190),
    "test/Greater_Swiss_Mountain_dog/n02107574_1041.jpg": (60, 24, 172, 206),
    "test/whippet/n02091134_16794.jpg": (46, 76, 190, 190),
    "test/malamute/n02110063_14434.jpg": (32, 66, 130, 166),
    "test/basenji/n02110806_3376.jpg": (26, 52, 178, 214),
    "test/dingo/n02115641_10021.jpg": (52, 146, 124, 224),
    "test/dingo/n02115641_12541.jpg": (68, 104, 222, 224),
    "test/bull_mastiff/n02108422_4375.jpg": (130, 36, 202, 224),
    "test/Leonberg/n02111129_372.jpg": (36, 36, 140, 206),
    "test/Norwegian_elkhound/n02091467_4472.jpg": (30, 14, 162, 150),
    "test/basenji/n02110806_4400.jpg": (48, 96, 140, 172),
    "test/Tibetan_terrier/n02097474_4085.jpg": (44, 22, 168, 224),
    "test/whippet/n02091134_14506.jpg": (50, 130, 176, 224),
}


def measure() -> dict[str, Any]:
    dogs = photographs("dogs24")
    with scratch() as folder:
        arguments = ["-m", "visiontuner", "tune", "--data", str(dogs), "--trials", "2"]
        Command([*arguments, "--output", "search"], folder=folder, cache=folder / "cache").wait()
        explainer = Explainer(Classifier.load(folder / "search" / "classifier"))
        ratios, seconds = [], []
        for name, box in BOXES.items():
            pixels = read_pixels(dogs / name, explainer.classifier.preprocessing)
            began = time.perf_counter()
            (heat,) = explainer.explain(pixels[None])
            energy = heat.resized(_SIDE)
            seconds.append(time.perf_counter() - began)
            ratios.append(_energy_inside(energy, box) / _share_of(box))
    mean, least = float(np.mean(ratios)), min(ratios)
    above = sum(ratio >= 1.5 for ratio in ratios)
    row = Row(
        what=f"energy of {len(ratios)} maps in boxes around the animal, against a uniform map's",
        target="at least 1.5 x",
        result=f"{mean:.2f} x on average, {least:.2f} x at least; {above} of {len(ratios)} reach "
        f"it; {1e3 * float(np.median(seconds)):.0f} ms a map, the network included",
        met=mean >= 1.5,
    )
    return report([row], ratios=dict(zip(BOXES, map(float, ratios), strict=True)))


def _energy_inside(energy: np.ndarray, box: tuple[int, int, int, int]) -> float:
    left, top, right, bottom = box
    return float(energy[top:bottom, left:right].sum() / energy.sum())


def _share_of(box: tuple[int, int, int, int]) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top) / _SIDE**2
