"""Is one classifier better than another on the same pictures, or is it noise?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from visiontuner.evaluation.bootstrap import Interval, percentile_interval

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Two classifiers, a and b, on the same pictures.

    Args:
        difference: accuracy of a minus accuracy of b, a fraction in [-1, 1].
        only_a, only_b: pictures that only one of them named rightly.
        p_value: of the exact McNemar test, two-sided.
    """

    difference: Interval
    only_a: int
    only_b: int
    p_value: float

    @property
    def a_is_better(self) -> bool:
        """By both measures: the interval excludes 0 and p < 0.05."""
        return self.difference.low > 0 and self.p_value < SIGNIFICANCE_LEVEL

    @property
    def b_is_better(self) -> bool:
        return self.difference.high < 0 and self.p_value < SIGNIFICANCE_LEVEL

    @property
    def tied(self) -> bool:
        """The pictures cannot tell the two apart; that is not to say that they are equal."""
        return not (self.a_is_better or self.b_is_better)


def paired_test(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    *,
    seed: int = 7,
    resamples: int = 2000,
) -> PairedTest:
    """Compare two classifiers by the pictures on which only one of them is right.

    Args:
        correct_a, correct_b: bool, shape (N,), for the same pictures in the same order.

    Raises:
        ValueError: no pictures, or not the same number of them.

    Source: McNemar 1947; Dietterich 1998, https://doi.org/10.1162/089976698300017197
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"needs the same pictures, at least one, got {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    # Drawing pictures again is drawing these three counts: the pictures within one are alike.
    shares = np.array([only_a, only_b, len(a) - only_a - only_b]) / len(a)
    drawn = np.random.default_rng(seed).multinomial(len(a), shares, size=resamples)
    discordant = only_a + only_b
    return PairedTest(
        difference=percentile_interval(
            (only_a - only_b) / len(a), (drawn[:, 0] - drawn[:, 1]) / len(a)
        ),
        only_a=only_a,
        only_b=only_b,
        p_value=float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0,
    )
