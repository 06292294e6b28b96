"""Does `visiontuner suspects` name labels that were swapped, and leave the others alone?

On photographs, with the training and validation images and the network that a search would take.
Some labels are swapped for another class, drawn at random; what is named is compared with them.
A regression on all images and one without those that were named are judged on the test images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from measuring import Row, cache_of_its_own, features_of, photographs, report
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample
from visiontuner.evaluation.baselines import logistic_regression
from visiontuner.evaluation.suspects import find_suspect_labels
from visiontuner.workflow.image_checks import FOLDS, out_of_fold_probabilities
from visiontuner.workflow.selection import folds_of

TARGETS = (
    "5 % of dogs24 swapped: precision at least .80, recall at least .75",
    "5 % of flowers5 swapped: precision at least .65, recall at least .65",
    "labels as delivered: at most 2 % named",
    "test accuracy after leaving out what was named: on average not lower",
)
SMALL = {"seeds": 1, "shares": (0.05,), "names": ("flowers5",)}
# The rule was chosen with the seeds 0 to 4.
_FIRST_SEED = 100
_TARGETS = {("dogs24", 0.05): (0.80, 0.75), ("flowers5", 0.05): (0.65, 0.65)}
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """A data set's features, float32, shape (N, D), and labels, (N,); those of test apart."""

    samples: list[Sample]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    test_features: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    num_classes: int


def measure(
    *,
    seeds: int = 5,
    shares: tuple[float, ...] = (0.02, 0.05, 0.10),
    names: tuple[str, ...] = ("dogs24", "flowers5"),
) -> dict[str, Any]:
    """Args:
    seeds: draws of each share.
    shares: of the labels that are swapped.
    """
    for name in names:
        photographs(name)  # before anything is computed
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in names:
        with cache_of_its_own():
            images = load_images(name)
        delivered = _named(images, images.labels)
        rows.append(
            Row(
                what=f"{name}: named of {len(delivered):,} labels as delivered",
                target="at most 2 %",
                result=f"{delivered.mean():.1%} ({delivered.sum()})",
                met=bool(delivered.mean() <= 0.02),
            )
        )
        for share in shares:
            drawn = [_one(images, share, _FIRST_SEED + seed) for seed in range(seeds)]
            details[f"{name} {share}"] = drawn
            rows += _rows(name, share, drawn)
    return report(rows, draws=details)


def load_images(name: str) -> Images:
    inputs, features = features_of(photographs(name))
    known = {sample.path: sample for of in inputs.dataset.splits.values() for sample in of}
    train, validation, test = (features.split(name) for name in _SPLITS)
    return Images(
        samples=[known[path] for path in (*train.paths, *validation.paths)],
        features=np.concatenate([train.features, validation.features]),
        labels=np.concatenate([train.labels, validation.labels]),
        test_features=np.array(test.features),
        test_labels=test.labels,
        num_classes=len(features.class_names),
    )


def _one(images: Images, share: float, seed: int) -> dict[str, float]:
    """One draw: swap labels, name suspects, and judge what is left."""
    rng = np.random.default_rng(seed)
    labels = images.labels.copy()
    rows = rng.choice(len(labels), round(share * len(labels)), replace=False)
    others = rng.integers(1, images.num_classes, len(rows))
    labels[rows] = (labels[rows] + others) % images.num_classes
    named, swapped = _named(images, labels), labels != images.labels
    hits = int((named & swapped).sum())
    everything = np.ones(len(labels), dtype=bool)
    return {
        "named": int(named.sum()),
        "precision": hits / max(1, int(named.sum())),
        "recall": hits / len(rows),
        "accuracy": _accuracy(images, labels, everything),
        "accuracy_without": _accuracy(images, labels, ~named),
    }


def _named(images: Images, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the images the command would name, shape (N,)."""
    samples = [
        replace(sample, label=int(label))
        for sample, label in zip(images.samples, labels, strict=True)
    ]
    probabilities = out_of_fold_probabilities(
        images.features, labels, folds_of(samples, FOLDS), images.num_classes
    )
    named = np.zeros(len(labels), dtype=bool)
    named[find_suspect_labels(probabilities, labels).rows] = True
    return named


def _accuracy(images: Images, labels: NDArray[np.int64], kept: NDArray[np.bool_]) -> float:
    """On test, of a regression on the images that are kept."""
    samples = [
        replace(sample, label=int(label))
        for sample, label, keep in zip(images.samples, labels, kept, strict=True)
        if keep
    ]
    fitted = logistic_regression(
        images.features[kept],
        labels[kept],
        folds_of(samples, FOLDS),
        num_classes=images.num_classes,
    )
    logits = images.test_features @ np.asarray(fitted.weights).T + np.asarray(fitted.biases)
    return float((logits.argmax(axis=1) == images.test_labels).mean())


def _rows(name: str, share: float, drawn: list[dict[str, float]]) -> Iterable[Row]:
    means = {key: float(np.mean([one[key] for one in drawn])) for key in drawn[0]}
    target = _TARGETS.get((name, share))
    what = f"{name}: {share:.0%} of the labels swapped, {len(drawn)} draws"
    yield Row(
        what=f"{what}: precision and recall",
        target=f"at least {target[0]:.2f} and {target[1]:.2f}" if target else "",
        result=f"{means['precision']:.3f} and {means['recall']:.3f}, {means['named']:.1f} named",
        met=means["precision"] >= target[0] and means["recall"] >= target[1] if target else None,
    )
    gain = means["accuracy_without"] - means["accuracy"]
    yield Row(
        what=f"{what}: test accuracy without what was named",
        target="not lower",
        result=f"{means['accuracy_without']:.4f}, {100 * gain:+.2f} points",
        met=gain >= 0,
    )
