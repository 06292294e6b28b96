"""95 % intervals of scores, and whether two classifiers differ beyond noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.sparse import csr_array

# Shares of images have exact intervals. Those of other scores come from drawing the images
# again, with replacement.
#
# Everything that is resampled is a sum over images, or is made of such sums: accuracy, a mean
# loss, the counts behind F1. So a resample is a row of weights (how often each image was drawn),
# and all sums of all resamples are one product of matrices.
#
# Source: Efron and Tibshirani 1993, chapters 6, 12 (bootstrap-t) and 13 (percentiles).


CONFIDENCE = 0.95
# 100 x 10,000 weights are 8 MB; more at once is no faster.
_RESAMPLES_AT_ONCE = 100
# A resample without any of a few rare mistakes seems certain, and would stretch the interval
# without end. Its standard error counts as this share of the real one at least.
_SMALLEST_ERROR_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % interval; `low <= value <= high`."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def resampled_sums(
    columns: NDArray[np.float64] | csr_array, *, seed: int, resamples: int
) -> NDArray[np.float64]:
    """Sums of each column over images that were drawn with replacement.

    The same seed draws the same images, whatever the columns.

    Args:
        columns: float64, shape (N, K), dense or sparse.

    Returns:
        float64, shape (resamples, K).
    """
    draws = _weights(columns.shape[0], seed=seed, resamples=resamples)
    return np.concatenate([weights @ columns for weights in draws])


def sign_flipped_sums(
    columns: NDArray[np.float64], *, seed: int, resamples: int
) -> NDArray[np.float64]:
    """Sums of each column with every image's sign drawn anew: what a difference is by chance.

    Args:
        columns: float64, shape (N, K), differences on each image.

    Returns:
        float64, shape (resamples, K).
    """
    generator = np.random.default_rng(seed)
    parts = []
    for rows in _portions(resamples):
        signs = generator.integers(2, size=(rows, len(columns))) * 2.0 - 1
        parts.append(signs @ columns)
    return np.concatenate(parts)


def percentile_interval(value: float, samples: NDArray[np.float64]) -> Interval:
    """The middle 95 % of the resampled values, as far as needed widened to hold `value`.

    A calibration error or a macro F1 is biased under resampling, and its percentiles can miss the
    value itself. Resamples for which it is undefined (NaN) are left out.

    Args:
        samples: float64, shape (resamples,).
    """
    known = samples[np.isfinite(samples)]
    if not len(known):
        return Interval(value=value, low=value, high=value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def share_interval(hits: float, total: int) -> Interval:
    """`hits` of `total` images, with the exact binomial interval.

    A bootstrap is too narrow for few images: 16 of 19 reach up to 1, 0 of 5 would be certain.

    Args:
        hits: not whole where it was corrected, see `choice.corrected_for_choice`.

    Raises:
        ValueError: no images, or not 0 <= hits <= total.

    Source: Clopper and Pearson 1934
    """
    if not 0 <= hits <= total or not total:
        raise ValueError(f"needs hits of at least one image, got {hits} of {total}")
    tail, misses = (1 - CONFIDENCE) / 2, total - hits
    low = stats.beta.ppf(tail, hits, misses + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, misses) if misses else 1.0
    return Interval(value=hits / total, low=float(low), high=float(high))


def studentised_interval(
    value: float,
    error: float,
    samples: NDArray[np.float64],
    errors: NDArray[np.float64],
    *,
    implied_error: float = 0.0,
    highest: float = np.inf,
) -> Interval:
    """The bootstrap-t interval: resampled deviations are measured in their own standard errors.

    So a skewed score gets a skewed interval. Percentiles of few images are too narrow on the side
    where the rare, costly mistakes are.

    Args:
        error: the value's standard error, > 0.
        samples, errors: float64, shape (resamples,), resampled values and their standard errors.
            Values that are undefined (NaN) are left out.
        implied_error: a standard error known otherwise, which counts where it is larger.
        highest: the score is in [0, highest].

    Source: Efron and Tibshirani 1993, section 12.5
    """
    deviations = (samples - value) / np.maximum(errors, _SMALLEST_ERROR_SHARE * error)
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(deviations[np.isfinite(deviations)], [1 - tail, tail])
    low, high = np.clip(value - ends * max(error, implied_error), 0, highest)
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def _weights(num_images: int, *, seed: int, resamples: int) -> Iterator[NDArray[np.float64]]:
    """How often each image was drawn, shape (some resamples, num_images), until all came."""
    generator = np.random.default_rng(seed)
    for rows in _portions(resamples):
        drawn = generator.integers(num_images, size=(rows, num_images))
        drawn += np.arange(rows)[:, None] * num_images
        counts = np.bincount(drawn.ravel(), minlength=rows * num_images)
        yield counts.reshape(rows, num_images).astype(np.float64)


def _portions(resamples: int) -> list[int]:
    whole, rest = divmod(resamples, _RESAMPLES_AT_ONCE)
    return [_RESAMPLES_AT_ONCE] * whole + [rest] * (rest > 0)


# Is one classifier better than another on the same images, or is it noise?


SIGNIFICANCE_LEVEL = 0.05


def level_at_look(look: int) -> float:
    """The two-sided level at which the n-th model is compared on the same test images.

    The first is compared at 5 %, the second at 5/3 %, the third at 5/6 %: all levels together are
    10 %, of which half is the side of being better. So however many equal models are compared with
    a champion on one test set, in at most 5 % of cases any of them seems better.

    Args:
        look: 1 for the first.

    Source: Bonferroni's inequality with unequal shares; Lan and DeMets 1983 for spending a level
    """
    return SIGNIFICANCE_LEVEL * 2 / (look * (look + 1))


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Two classifiers, a and b, on the same images.

    Args:
        difference: accuracy of a minus accuracy of b, a fraction in [-1, 1].
        only_a, only_b: images that only one of them classified correctly.
        p_value: of the exact McNemar test, two-sided.
        level: below which it counts, see `level_at_look`.
    """

    difference: Interval
    only_a: int
    only_b: int
    p_value: float
    level: float = SIGNIFICANCE_LEVEL

    @property
    def a_is_better(self) -> bool:
        """By both measures: the interval excludes 0, and p is below the level."""
        return self.difference.low > 0 and self.p_value < self.level

    @property
    def b_is_better(self) -> bool:
        return self.difference.high < 0 and self.p_value < self.level

    @property
    def tied(self) -> bool:
        """The images cannot tell the two apart; that is not to say that they are equal."""
        return not (self.a_is_better or self.b_is_better)


def paired_test(
    correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], *, look: int = 1
) -> PairedTest:
    """Compare two classifiers by the images on which only one of them is right.

    Args:
        correct_a, correct_b: bool, shape (N,), for the same images in the same order.
        look: how many models were compared on these images so far, this one included;
            see `level_at_look`.

    Raises:
        ValueError: no images, or not the same number of them.

    Source: McNemar 1947; Dietterich 1998, https://doi.org/10.1162/089976698300017197
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"needs the same images, at least one, got {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    return PairedTest(
        difference=difference_interval(only_a, only_b, len(a)),
        only_a=only_a,
        only_b=only_b,
        p_value=float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0,
        level=level_at_look(look),
    )


def difference_interval(only_a: int, only_b: int, total: int) -> Interval:
    """The difference of two shares of the same images, by the score test of every difference.

    It excludes 0 where McNemar's test without continuity correction gives p < 0.05. A bootstrap is
    certain where the two never differ, and too narrow where they seldom do.

    Args:
        only_a, only_b: images that are hits of one alone.
        total: all images, at least one.

    Source: Tango 1998, Statistics in Medicine 17:891-908
    """
    wanted = float(stats.norm.ppf((1 + CONFIDENCE) / 2))

    def score(difference: float) -> float:
        """How many standard errors the observed difference lies above an assumed one."""
        # The likeliest share of images that are hits of b alone, given the assumed difference.
        b = (2 * total - only_a + only_b) * difference - only_a - only_b
        c = -only_b * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * total * c, 0)) - b) / (4 * total)
        variance = total * (2 * share + difference * (1 - difference))
        gap = only_a - only_b - total * difference
        if variance <= 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return float(gap / math.sqrt(variance))

    value, edge = (only_a - only_b) / total, 1 - 1e-9
    low = high = value
    if score(-edge) <= wanted:  # not even the largest difference is ruled out
        low = -1.0
    elif score(value) < wanted:
        low = float(optimize.brentq(lambda d: score(d) - wanted, -edge, value))
    if score(edge) >= -wanted:
        high = 1.0
    elif score(value) > -wanted:
        high = float(optimize.brentq(lambda d: score(d) + wanted, value, edge))
    return Interval(value=value, low=min(low, value), high=max(high, value))
