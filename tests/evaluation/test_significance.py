from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from visiontuner.evaluation.intervals import difference_interval, level_at_look, paired_test


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
    # 5 against 0: the interval begins at 0.011, and yet p = 2 / 2^5 = 0.0625.
    test = paired_test(*answers(95, 5, 0, 0))
    assert test.p_value == pytest.approx(0.0625)
    assert test.tied


def test_the_same_answers_are_tied():
    a, _ = answers(5, 3, 0, 2)
    test = paired_test(a, a)
    assert test.tied
    assert test.p_value == 1.0
    # Ten images do not make it certain: d / sqrt(d (1 - d) / 10) is 1.96 at this end.
    assert test.difference.high == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-4)
    assert test.difference.low == pytest.approx(-test.difference.high)


def test_one_image_decides_nothing():
    assert paired_test(np.array([True]), np.array([False])).tied


def test_the_interval_of_a_difference_is_where_the_score_test_ends():
    # At a difference d the variance has the likeliest shares of 80, 10, 2 and 8 images given d.
    def best_share(d):  # of images that b alone names rightly, by looking for it
        shares = np.linspace(max(0, -d) + 1e-9, (1 - d) / 2 - 1e-9, 200_001)
        likelihood = 10 * np.log(shares + d) + 2 * np.log(shares) + 88 * np.log(1 - 2 * shares - d)
        return shares[likelihood.argmax()]

    interval = difference_interval(10, 2, 100)
    for end in (interval.low, interval.high):
        variance = (2 * best_share(end) + end - end**2) / 100
        assert abs(0.08 - end) / variance**0.5 == pytest.approx(1.96, abs=1e-3)


@given(
    only_a=st.integers(0, 40),
    only_b=st.integers(0, 40),
    alike=st.integers(0, 200).map(lambda n: n + 1),
)
def test_the_interval_excludes_0_where_mcnemars_test_does(only_a, only_b, alike):
    interval = difference_interval(only_a, only_b, only_a + only_b + alike)
    excludes = not interval.low <= 0 <= interval.high
    assert excludes == (abs(only_a - only_b) > 1.959964 * (only_a + only_b) ** 0.5)
    assert -1 <= interval.low <= interval.value <= interval.high <= 1


def test_the_interval_of_a_difference_holds_the_truth_where_few_images_differ():
    drawn = np.random.default_rng(0).multinomial(100, [0.03, 0.01, 0.96], size=500)
    intervals = [difference_interval(int(a), int(b), 100) for a, b, _ in drawn]
    assert np.mean([i.low <= 0.02 <= i.high for i in intervals]) >= 0.93


def test_the_levels_of_all_looks_are_five_percent_on_one_side():
    assert [level_at_look(n) for n in (1, 2, 3)] == pytest.approx([0.05, 0.05 / 3, 0.05 / 6])
    assert sum(level_at_look(n) for n in range(1, 100_000)) / 2 == pytest.approx(0.05, rel=1e-3)


def test_a_later_look_needs_more_evidence():
    first, fourth = (paired_test(*answers(80, 10, 2, 8), look=look) for look in (1, 4))
    assert first.a_is_better  # p = 0.039
    assert fourth.tied
    assert paired_test(*answers(80, 18, 2, 8), look=4).a_is_better  # p = 0.0004


def test_of_many_equal_challengers_hardly_any_is_promoted():
    generator = np.random.default_rng(1)
    promoted = {"at 5 %": 0, "by look": 0}
    for _ in range(200):
        champion = np.zeros(300, dtype=bool)
        champion[: generator.binomial(300, 0.9)] = True
        better = []
        for look in range(1, 21):
            changed = generator.random(300) < np.where(champion, 0.05 / 0.9, 0.05 / 0.1)
            better.append(paired_test(champion ^ changed, champion, look=look))
        promoted["by look"] += any(test.a_is_better for test in better)
        promoted["at 5 %"] += any(replace(test, level=0.05).a_is_better for test in better)
    assert promoted["at 5 %"] > 20  # of 200
    assert promoted["by look"] <= 12  # 6 on average


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_other_images_are_refused(a, b):
    with pytest.raises(ValueError, match="the same images"):
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
