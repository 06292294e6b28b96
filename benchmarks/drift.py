"""Does `visiontuner drift` name what has changed, and nothing where nothing has?

Photographs are divided at random, again for each trial: up to 1,000 are what the classifier was
made with, of the others some are what it is asked about, as they are or changed. What the product
measures of an image is measured once, by an artifact on EfficientNet-Lite0, of its changed copies
too; reference and tests are the product's own.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Row, cache_of_its_own, photographs, report, scratch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from visiontuner.data.dataset import Sample
from visiontuner.evaluation.drift import Measure, compare_observations
from visiontuner.experiment.schema import Experiment
from visiontuner.model.classifier import Classifier
from visiontuner.model.package import package_untrained
from visiontuner.workflow.drift import Seen, make_reference, see_images
from visiontuner.workflow.inputs import Inputs, Silent

TARGETS = (
    "equal halves of one set: drift in at most 5 of 100 splits",
    "200 images saved again with JPEG's quality 20: drift in at least 90 % of 50 trials",
    "200 images of 0.6 times the brightness: likewise",
    "200 images, of which 20 % are replaced by images of one class: likewise",
)
SMALL = {"trials": 2, "splits": 2, "names": ("flowers5",)}
_SPLITS = ("train", "validation", "test")
_MOST = 1_000
_ASKED = 200
_REPLACED = _ASKED // 5
_ONE_CLASS = "20 % replaced by images of one class"
_WITH_TARGET = ("JPEG quality 20", "brightness x 0.6", _ONE_CLASS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Looked:
    """All images of a data set as the artifact sees them, and their changed copies in one order."""

    classifier: Classifier
    plain: Seen
    jpeg: Seen
    dark: Seen

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([sample.label for sample in self.plain.samples], dtype=np.int64)


def measure(
    *, trials: int = 50, splits: int = 100, names: Sequence[str] = ("dogs24", "flowers5")
) -> dict[str, Any]:
    """Args:
    trials: of each change.
    splits: of each set in halves.
    """
    for name in names:
        photographs(name)  # before anything is computed
    rows, details = list[Row](), dict[str, Any]()
    with cache_of_its_own(), scratch() as folder:
        for name in names:
            looked = _look(name, folder / name)
            for row, moved in (*_halves(name, looked, splits), *_changes(name, looked, trials)):
                rows.append(row)
                details[row.what] = moved
    return report(rows, **details)


def _look(name: str, folder: Path) -> Looked:
    root = photographs(name)
    inputs = Inputs(Experiment.parse({"data": {"source": str(root)}}), Silent())
    names = inputs.dataset.class_names
    packaged = package_untrained(folder / "artifact", inputs.backbone, names, cache=inputs.cache)
    classifier = Classifier.load(packaged)
    samples = [sample for split in _SPLITS for sample in inputs.dataset.splits[split]]
    distinct = list({sample.digest: sample for sample in samples}.values())
    plain = see_images(classifier, root, distinct, lambda *_: None)

    def changed(kind: str, change: Callable[[Image.Image], bytes]) -> Seen:
        copies = [_copy(root, sample, folder / kind, change) for sample in plain.samples]
        seen = see_images(classifier, folder / kind, copies, lambda *_: None)
        assert len(seen.samples) == len(copies)
        return seen

    return Looked(
        classifier=classifier,
        plain=plain,
        jpeg=changed("jpeg", lambda image: _as_jpeg(image, 20)),
        dark=changed("dark", lambda image: _as_jpeg(ImageEnhance.Brightness(image).enhance(0.6))),
    )


def _as_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _copy(
    root: Path, sample: Sample, folder: Path, change: Callable[[Image.Image], bytes]
) -> Sample:
    path = folder / f"{sample.digest}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(root / sample.path) as image:
        path.write_bytes(change(image.convert("RGB")))
    return replace(sample, path=path.name)


def _some(seen: Seen, rows: NDArray[np.int64]) -> Seen:
    return Seen(
        samples=tuple(seen.samples[row] for row in rows),
        logits=seen.logits[rows],
        features=seen.features[rows],
        statistics=seen.statistics[rows],
        bad={},
    )


def _joined(first: Seen, second: Seen) -> Seen:
    return Seen(
        samples=first.samples + second.samples,
        logits=np.concatenate([first.logits, second.logits]),
        features=np.concatenate([first.features, second.features]),
        statistics=np.concatenate([first.statistics, second.statistics]),
        bad={},
    )


def _halves(name: str, looked: Looked, splits: int) -> Iterator[tuple[Row, Any]]:
    moved, seconds = Counter[str](), []
    alarms = 0
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(looked.plain.samples))
        half = len(order) // 2
        began = time.perf_counter()
        reference = make_reference(
            looked.classifier, _some(looked.plain, order[:half][:_MOST]), is_head=True
        )
        asked = reference.observe(_some(looked.plain, order[half:]))
        found = _moved(compare_observations(reference.observations, asked))
        seconds.append(time.perf_counter() - began)
        moved.update(found)
        alarms += bool(found)
    row = Row(
        what=f"{name}: equal halves, {splits} splits",
        target="drift in at most 5 %",
        result=f"drift in {alarms} of {splits}; {np.median(seconds):.1f} s a check, once the "
        "images went through the network",
        met=alarms <= 0.05 * splits,
    )
    yield row, dict(moved)


def _moved(measures: Sequence[Measure]) -> list[str]:
    return [measure.name for measure in measures if measure.moved]


def _changes(name: str, looked: Looked, trials: int) -> Iterator[tuple[Row, Any]]:
    found: dict[str, list[list[str]]] = {}
    for trial in range(trials):
        rng = np.random.default_rng(2_000 + trial)
        order = rng.permutation(len(looked.plain.samples))
        cut = min(_MOST, len(order) - 2 * _ASKED)
        known, rest = order[:cut], order[cut:]
        reference = make_reference(looked.classifier, _some(looked.plain, known), is_head=True)
        for what, seen in _asked(looked, rest, rng):
            measures = compare_observations(reference.observations, reference.observe(seen))
            found.setdefault(what, []).append(_moved(measures))
    for what, moved in found.items():
        number = sum(map(bool, moved))
        has_target = what in _WITH_TARGET
        by = Counter(name for one in moved for name in one)
        named = ", ".join(f"{measure} {count}" for measure, count in by.most_common())
        row = Row(
            what=f"{name}: {_ASKED} images, {what}",
            target="drift in at least 90 %" if has_target else "",
            result=f"drift in {number} of {trials} ({named or 'nothing moved'})",
            met=number >= 0.9 * trials if has_target else None,
        )
        yield row, dict(by)


def _asked(
    looked: Looked, rest: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[tuple[str, Seen]]:
    """200 images that the reference does not hold, as they are and changed in each way."""
    rows, others = rest[:_ASKED], rest[_ASKED:]
    kept = rows[_REPLACED:]
    labels = looked.labels
    yield "as they are", _some(looked.plain, rows)
    yield "JPEG quality 20", _some(looked.jpeg, rows)
    yield "brightness x 0.6", _some(looked.dark, rows)
    yield (
        "half of them JPEG quality 20",
        _joined(_some(looked.jpeg, rows[: _ASKED // 2]), _some(looked.plain, rows[_ASKED // 2 :])),
    )
    classes = rng.permutation(labels.max() + 1)
    for what, chosen in (
        (_ONE_CLASS, classes[:1]),
        ("20 % replaced by images of three classes", classes[:3]),
        ("20 % replaced by images of half of the classes", classes[: len(classes) // 2]),
    ):
        # Of the class that is taken there may be fewer others: those that were drawn count too.
        own = others[np.isin(labels[others], chosen)]
        mixed = np.concatenate([kept, own[:_REPLACED]])
        yield what, _some(looked.plain, mixed)
