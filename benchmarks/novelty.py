"""Does a classifier's `known` tell images of its classes from others?

On photographs, by the network's features and the functions that `tune` fits and an endpoint asks.
Beside it stands what there is without it: the top probability of a regression on the same features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from measuring import Row, cache_of_its_own, features_of, photographs, report
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from visiontuner.data.dataset import Sample
from visiontuner.evaluation.baselines import logistic_regression
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.model.novelty import Novelty, fit_novelty
from visiontuner.workflow.image_checks import units_of
from visiontuner.workflow.selection import folds_of

TARGETS = (
    "half of dogs24's breeds unseen: AUROC at least .87",
    "flowers5 against dogs24: AUROC at least .99",
    "94 to 96 % of test images of known classes stay known",
    "at most 5 MB in the artifact",
)
SMALL = {"draws": 1, "redistributions": 1}
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """All images of a data set, those of test last.

    Args:
        features: float32, shape (N, D).
        labels: int64, shape (N,).
        is_test: bool, shape (N,).
    """

    samples: list[Sample]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_]

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def measure(*, draws: int = 10, redistributions: int = 20) -> dict[str, Any]:
    """Args:
    draws: of the breeds that are unseen.
    redistributions: of all images to training and test.
    """
    for name in ("dogs24", "flowers5"):
        photographs(name)  # before anything is computed
    with cache_of_its_own():
        dogs, flowers = _load("dogs24"), _load("flowers5")
    rows = [_unseen_breeds(dogs, draws), _other_images(dogs, flowers)]
    for name, images in (("dogs24", dogs), ("flowers5", flowers)):
        rows += _still_known(name, images, redistributions)
    return report([*rows, *_cost(dogs)])


def _load(name: str) -> Images:
    inputs, features = features_of(photographs(name))
    known = {sample.path: sample for of in inputs.dataset.splits.values() for sample in of}
    splits = [features.split(split) for split in _SPLITS]
    labels = np.concatenate([split.labels for split in splits])
    return Images(
        samples=[known[path] for split in splits for path in split.paths],
        features=np.concatenate([split.features for split in splits]),
        labels=labels,
        is_test=np.arange(len(labels)) >= len(labels) - len(splits[-1].labels),
    )


def _fit(images: Images, chosen: NDArray[np.bool_]) -> Novelty:
    """As `tune` does for a head, to some of the images."""
    everything = np.ones(int(chosen.sum()), dtype=bool)
    fitted = fit_novelty(
        images.features[chosen],
        images.labels[chosen],
        known=everything,
        judged=everything,
        units=units_of([images.samples[row] for row in np.flatnonzero(chosen)]),
    )
    assert fitted is not None
    return fitted


def _unseen_breeds(dogs: Images, draws: int) -> Row:
    by_novelty, by_probability, sure = [], [], []
    for draw in range(draws):
        seen = np.random.default_rng(draw).permutation(dogs.num_classes)[: dogs.num_classes // 2]
        is_seen = np.isin(dogs.labels, seen)
        known, asked = is_seen & ~dogs.is_test, dogs.is_test
        new = ~is_seen[asked]
        by_novelty.append(roc_auc_score(new, _fit(dogs, known).scores(dogs.features[asked])))
        top = _top_probability(dogs, known, dogs.features[asked])
        by_probability.append(roc_auc_score(new, 1 - top))
        sure.append((top[new] >= 0.5).mean())
    value = float(np.mean(by_novelty))
    return Row(
        what=f"dogs24: test images of {dogs.num_classes // 2} unseen breeds, {draws} draws: AUROC",
        target="at least .87",
        result=f"{value:.3f} ({min(by_novelty):.3f} to {max(by_novelty):.3f}); by the top "
        f"probability {np.mean(by_probability):.3f}, which is at least .5 for {np.mean(sure):.0%}",
        met=value >= 0.87,
    )


def _other_images(dogs: Images, flowers: Images) -> Row:
    fitted = _fit(dogs, ~dogs.is_test)
    own, others = (
        fitted.scores(features) for features in (dogs.features[dogs.is_test], flowers.features)
    )
    new = np.repeat([False, True], [len(own), len(others)])
    value = float(roc_auc_score(new, np.concatenate([own, others])))
    tops = [
        _top_probability(dogs, ~dogs.is_test, features)
        for features in (dogs.features[dogs.is_test], flowers.features)
    ]
    return Row(
        what="flowers5 against dogs24's test images: AUROC",
        target="at least .99",
        result=f"{value:.4f}; by the top probability "
        f"{roc_auc_score(new, 1 - np.concatenate(tops)):.4f}; "
        f"{(others <= fitted.threshold).mean():.1%} of the flowers are known",
        met=value >= 0.99,
    )


def _top_probability(
    images: Images, known: NDArray[np.bool_], asked: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Of a regression on the known images, whose classes are the ones that it has."""
    classes, labels = np.unique(images.labels[known], return_inverse=True)
    folds = folds_of([images.samples[row] for row in np.flatnonzero(known)], 5)
    fitted = logistic_regression(
        images.features[known], labels, folds, num_classes=len(classes), refit=True
    )
    logits = asked @ np.asarray(fitted.weights).T + np.asarray(fitted.biases)
    return probabilities_of(logits).max(axis=1)


def _still_known(name: str, images: Images, times: int) -> Iterator[Row]:
    """The share of test images that are known: of the given ones, and of others drawn at random."""
    count = int(images.is_test.sum())
    shares = []
    for draw in range(times):
        is_test = np.zeros(len(images.labels), dtype=bool)
        chosen = np.random.default_rng(draw).choice(len(is_test), count, replace=False)
        is_test[chosen] = True
        shares.append(_share_known(images, is_test))
    mean = float(np.mean(shares))
    yield Row(
        what=f"{name}: {count} test images, drawn {times} times, that stay known",
        target="94 to 96 %",
        result=f"{mean:.1%} on average ({min(shares):.1%} to {max(shares):.1%})",
        met=0.94 <= mean <= 0.96,
    )
    share = _share_known(images, images.is_test)
    yield Row(
        what=f"{name}: the same of the {count} test images as delivered",
        target="94 to 96 %",
        result=f"{share:.1%}",
        met=0.94 <= share <= 0.96,
    )


def _share_known(images: Images, is_test: NDArray[np.bool_]) -> float:
    fitted = _fit(images, ~is_test)
    return float((fitted.scores(images.features[is_test]) <= fitted.threshold).mean())


def _cost(dogs: Images) -> Iterator[Row]:
    began = time.perf_counter()
    fitted = _fit(dogs, ~dogs.is_test)
    seconds = time.perf_counter() - began
    times = []
    for features in dogs.features[dogs.is_test][:200]:
        began = time.perf_counter()
        fitted.scores(features[None])
        times.append(time.perf_counter() - began)
    size = len(fitted.content())
    yield Row(
        what="novelty.npz of a classifier of dogs24",
        target="at most 5 MB",
        result=f"{size / 1e6:.1f} MB, fitted in {seconds:.2f} s, "
        f"{1e3 * float(np.median(times)):.2f} ms an image",
        met=size <= 5e6,
    )
