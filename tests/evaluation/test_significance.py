import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from visiontuner.evaluation.intervals import paired_test, resampled_sums


def answers(both, only_a, only_b, neither):
    """Right or wrong, for a and b, in the given numbers."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def test_paired_test_by_hand():
    # 10 against 2: p = 2 * (C(12,0) + C(12,1) + C(12,2)) / 2^12 = 2 * 79 / 4096
    test = paired_test(*answers(80, 10, 2, 8))
    assert (test.only_a, test.only_b) == (10, 2)
    assert test.difference.value == pytest.approx(0.08)
    assert test.p_value == pytest.approx(158 / 4096)
    # The normal interval: 0.08 +- 1.96 sqrt(0.12 - 0.08^2) / 10
    assert test.difference.low == pytest.approx(0.08 - 0.066, abs=0.015)
    assert test.difference.high == pytest.approx(0.08 + 0.066, abs=0.015)
    assert test.a_is_better
    assert not test.b_is_better
    assert not test.tied


def test_the_other_way_round_b_is_better():
    test = paired_test(*answers(80, 2, 10, 8))
    assert test.b_is_better
    assert test.difference.value == pytest.approx(-0.08)


def test_a_clear_interval_is_not_enough():
    # 5 against 0: no resample is below 0 but in 1 % of them, and yet p = 2 / 2^5 = 0.0625.
    test = paired_test(*answers(95, 5, 0, 0))
    assert test.p_value == pytest.approx(0.0625)
    assert test.tied


def test_the_same_answers_are_tied():
    a, _ = answers(5, 3, 0, 2)
    test = paired_test(a, a)
    assert test.tied
    assert (test.p_value, test.difference.low, test.difference.high) == (1.0, 0.0, 0.0)


def test_one_picture_decides_nothing():
    assert paired_test(np.array([True]), np.array([False])).tied


def test_the_bootstrap_by_counts_is_the_bootstrap_by_pictures():
    a, b = answers(150, 20, 8, 22)
    by_counts = paired_test(a, b, resamples=4000).difference
    sums = resampled_sums((a * 1.0 - b)[:, None], seed=3, resamples=4000) / len(a)
    low, high = np.quantile(sums, [0.025, 0.975])
    assert by_counts.low == pytest.approx(low, abs=0.006)
    assert by_counts.high == pytest.approx(high, abs=0.006)


def test_the_same_seed_gives_the_same_interval():
    a, b = answers(80, 10, 2, 8)
    assert paired_test(a, b) == paired_test(a, b)


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_other_pictures_are_refused(a, b):
    with pytest.raises(ValueError, match="the same pictures"):
        paired_test(np.array(a, dtype=bool), np.array(b, dtype=bool))


@settings(max_examples=40, deadline=None)
@given(counts=st.tuples(*[st.integers(0, 60)] * 4).filter(lambda counts: sum(counts) > 0))
def test_swapping_the_two_swaps_the_answer(counts):
    a, b = answers(*counts)
    there, back = paired_test(a, b), paired_test(b, a)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.difference.value == -back.difference.value
    assert there.difference.low <= there.difference.value <= there.difference.high
    assert not (there.a_is_better and there.b_is_better)
    if counts[1] + counts[2]:
        assert there.p_value == pytest.approx(binomtest(counts[1], counts[1] + counts[2]).pvalue)
