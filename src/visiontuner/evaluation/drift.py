"""Whether images come from where others do, by several measures and one stated false-alarm rate.

Each measure is a two-sample test; Holm's correction keeps the chance that any of them names a
difference where there is none below the rate. The same images give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from visiontuner.evaluation.baselines import fixed_regression
from visiontuner.evaluation.calibration import probabilities_of

Head = tuple[NDArray[np.float64], NDArray[np.float64]]

FALSE_ALARMS = 0.05
FEWEST = 20
"""Images on either side; of fewer a measure says next to nothing."""
FEATURES, CLASSES = "features", "classes"
# Another mix of classes shows in little else, and counts need most images to tell; other changes
# show in the features, and most of them in several measures.
_WEIGHTS = {FEATURES: 4.0, CLASSES: 12.0}
_OTHER_WEIGHT = 2 / 3  # so that six others have 4
_PERMUTATIONS = 4_999  # the smallest p is .0002, well below the .01 of a weight of 4 in 20
_COMPONENTS = 100
_FOLDS = 4
_AT_ONCE = 500  # permutations; 500 x 3,000 images in float32: 6 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class Observations:
    """What was measured of some images; each array has its own number of images, in any order.

    Args:
        values: by measure, float64, shape (N,).
        features: float32, shape (N, D); None where they are of no use.
        classes: int64, shape (N,), the classes that the model names; None likewise.
    """

    values: Mapping[str, NDArray[np.float64]]
    features: NDArray[np.float32] | None = None
    classes: NDArray[np.int64] | None = None

    @property
    def samples(self) -> dict[str, NDArray[np.generic]]:
        """The array of each measure that there is."""
        parts = {FEATURES: self.features, CLASSES: self.classes, **self.values}
        return {name: array for name, array in parts.items() if array is not None}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What one measure says of two sets of images.

    Args:
        p_value: of its test, adjusted for all measures: not above the rate of false alarms means
            that it has moved.
        reference, images: the medians; None for features and classes, which have none.
        reference_images: how many images the reference is.
    """

    name: str
    p_value: float
    moved: bool
    reference: float | None
    images: float | None
    reference_images: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldJudges:
    """Regressions of which each was fitted to all but a fold of some images.

    Those images are answered by the one that has not seen them, any other images by one after the
    other: where nothing differs, neither do the answers. A model that has learned from all of them
    would be surer of them than of others.

    Args:
        heads: weights (C, D) and biases (C,), by fold; every fourth image is in one.
    """

    heads: tuple[Head, ...]

    @classmethod
    def fit(
        cls, features: NDArray[np.float32], labels: NDArray[np.int64], *, num_classes: int
    ) -> Self:
        """Args:
        features: float32, shape (N, D), in any order that has nothing to do with the labels.
        labels: int64, shape (N,).
        """
        folds = np.arange(len(features)) % _FOLDS
        return cls(
            heads=tuple(
                fixed_regression(
                    features[folds != fold], labels[folds != fold], num_classes=num_classes
                )
                for fold in range(_FOLDS)
            )
        )

    def answers(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities, float64, shape (N, C).

        Args:
            features: float32, shape (N, D); those of `fit` in its order, or of any other images.
        """
        logits = np.empty((len(features), len(self.heads[0][1])))
        for fold, (weights, biases) in enumerate(self.heads):
            logits[fold :: len(self.heads)] = features[fold :: len(self.heads)] @ weights.T + biases
        return probabilities_of(logits)


def compare_observations(
    reference: Observations,
    images: Observations,
    *,
    false_alarms: float = FALSE_ALARMS,
    without: Collection[str] = (),
) -> tuple[Measure, ...]:
    """Test every measure that both sides have, of at least 20 images each.

    Continuous measures by the two-sample test of Kolmogorov and Smirnov, classes by the chi-square
    statistic and features by the distance of their means, both against random divisions of the
    images. The p-values are adjusted by Holm's method with weights, which holds whatever the
    measures have to do with each other. Images have to be independent: those of one series alarm
    more often.

    Args:
        false_alarms: how often anything may be named where nothing differs, in (0, 1).
        without: measures to leave out.

    Raises:
        ValueError: no measure is left.

    Source: such tests compared, Rabanser et al. 2019, https://arxiv.org/abs/1810.11953
    """
    pairs = {
        name: (before, images.samples[name])
        for name, before in reference.samples.items()
        if name in images.samples and name not in without
    }
    pairs = {name: pair for name, pair in pairs.items() if min(map(len, pair)) >= FEWEST}
    if not pairs:
        raise ValueError("no measure can be compared")
    found = [_tests().get(name, _compare_values)(*pair) for name, pair in pairs.items()]
    weights = np.array([_WEIGHTS.get(name, _OTHER_WEIGHT) for name in pairs])
    adjusted = adjust_by_holm(np.array(found), weights)
    return tuple(
        Measure(
            name=name,
            p_value=float(p_value),
            moved=bool(p_value <= false_alarms),
            reference=_median(name, before),
            images=_median(name, after),
            reference_images=len(before),
        )
        for (name, (before, after)), p_value in zip(pairs.items(), adjusted, strict=True)
    )


def _tests() -> dict[str, Callable[..., float]]:
    return {FEATURES: compare_features, CLASSES: compare_classes}


def _median(name: str, values: NDArray[np.generic]) -> float | None:
    return None if name in (FEATURES, CLASSES) else float(np.median(values.astype(float)))


def adjust_by_holm(
    p_values: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p-values of several tests such that those below a level err together no more often.

    Args:
        p_values: float64, shape (M,).
        weights: float64, shape (M,), how much of the level each test has before the others.

    Returns:
        float64, shape (M,), in [0, 1], none smaller than before.

    Source: Holm 1979, section 6, https://www.jstor.org/stable/4615733
    """
    order = np.argsort(p_values / weights, kind="stable")
    p_values, weights = p_values[order], weights[order]
    left = np.cumsum(weights[::-1])[::-1]  # of a test and those after it
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values * left / weights), 1.0)
    return adjusted


def _compare_values(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    return float(stats.ks_2samp(before, after).pvalue)


def compare_features(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """How often images divided at random have means as far apart as these, in (0, 1].

    The distance is Hotelling's in the main directions of all images together: in units of how much
    images differ in each direction. What two sets share, as their classes, so counts little.

    Args:
        before, after: float32, shapes (N, D) and (M, D).

    Source: Hotelling 1931, https://doi.org/10.1214/aoms/1177732979
    """
    from sklearn.decomposition import PCA  # a second to import, needed by one command

    together = np.concatenate([before, after])
    most = min(_COMPONENTS, len(together) // 10, together.shape[1])
    pca = PCA(most, whiten=True, svd_solver="randomized", iterated_power=2, random_state=0)
    # Threads that wait for one another beside other programs take several times as long.
    with threadpool_limits(limits=1):
        rows = pca.fit_transform(together - together.mean(axis=0))
    rows = np.where(np.isfinite(rows), rows, 0)  # of images that are all alike

    def distances(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        squares: NDArray[np.float64] = (sums**2).sum(axis=1)
        return squares

    return _share_as_extreme(rows, len(before), distances)


def compare_classes(before: NDArray[np.int64], after: NDArray[np.int64]) -> float:
    """How often images divided at random have shares of classes as far apart as these, in (0, 1].

    Args:
        before, after: int64, shapes (N,) and (M,).
    """
    _, together = np.unique(np.concatenate([before, after]), return_inverse=True)
    rows = np.eye(together.max() + 1)[together]  # (N + M, C)
    totals = rows.sum(axis=0)
    expected = totals * len(after) / len(together)

    def distances(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        # Of the other side the differences are the same: chi-square but for a factor.
        squares: NDArray[np.float64] = ((sums - expected) ** 2 / totals).sum(axis=1)
        return squares

    return _share_as_extreme(rows, len(before), distances)


def _share_as_extreme(
    rows: NDArray[np.floating],
    start: int,
    distances: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> float:
    """Of random divisions of rows in two, the share whose sums are as far from what is expected.

    Args:
        rows: shape (N, D); the second part begins at `start`.
        distances: of the sums over some second parts, shape (B, D), how far each is, shape (B,).
    """
    rows = rows.astype(np.float32)
    number = len(rows) - start
    told = float(distances(rows[start:].sum(axis=0, dtype=np.float64)[None])[0])
    rng, extreme = np.random.default_rng(0), 0
    for done in range(0, _PERMUTATIONS, _AT_ONCE):
        chosen = np.zeros((min(_AT_ONCE, _PERMUTATIONS - done), len(rows)), dtype=np.float32)
        for division in chosen:
            division[rng.choice(len(rows), number, replace=False)] = 1
        extreme += int((distances((chosen @ rows).astype(np.float64)) >= told * (1 - 1e-5)).sum())
    return (1 + extreme) / (1 + _PERMUTATIONS)
