import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import bootstrap

from visiontuner.evaluation.intervals import (
    percentile_interval,
    resampled_sums,
    share_interval,
    sign_flipped_sums,
    studentised_interval,
)


def test_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=300)
    sums = resampled_sums(values[:, None], seed=1, resamples=4000)
    found = percentile_interval(values.mean(), sums[:, 0] / 300)
    expected = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.01)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.01)


def test_every_resample_draws_as_many_images_as_there_are():
    sums = resampled_sums(np.ones((17, 1)), seed=1, resamples=250)
    assert sums.tolist() == [[17.0]] * 250


def test_sparse_and_dense_columns_draw_the_same_images():
    columns = np.random.default_rng(0).integers(2, size=(40, 3)).astype(float)
    dense = resampled_sums(columns, seed=5, resamples=120)
    assert np.array_equal(dense, resampled_sums(csr_array(columns), seed=5, resamples=120))
    assert not np.array_equal(dense, resampled_sums(columns, seed=6, resamples=120))


def test_flipped_signs_have_no_direction():
    sums = sign_flipped_sums(np.ones((100, 1)), seed=1, resamples=2000)
    assert sums.std() == pytest.approx(10, rel=0.1)  # of 100 coins of +-1
    assert abs(sums.mean()) < 1


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # R: binom.test(16, 19)$conf.int and so on.
    [(16, 19, 0.6042, 0.9662), (19, 20, 0.7513, 0.9987), (573, 600, 0.9352, 0.9701)],
)
def test_a_share_has_the_exact_binomial_interval(hits, total, low, high):
    interval = share_interval(hits, total)
    assert interval.value == hits / total
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


def test_hits_that_were_corrected_need_not_be_whole():
    interval = share_interval(9.5, 12)
    assert share_interval(9, 12).low < interval.low < share_interval(10, 12).low
    assert interval.value == pytest.approx(9.5 / 12)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_a_share_is_of_something(hits, total):
    with pytest.raises(ValueError, match="at least one image"):
        share_interval(hits, total)


def test_a_studentised_interval_by_hand():
    # Deviations in their own errors are -2, -1, 0, 1 and 4; the 2.5 % quantile lies a tenth of the
    # way from -2 to -1, the 97.5 % one nine tenths of the way from 1 to 4.
    deviations, errors = np.array([-2.0, -1, 0, 1, 4]), np.array([0.5, 1, 1, 2, 1])
    samples = 10 + deviations * errors
    interval = studentised_interval(10.0, 1.0, samples, errors)
    assert (interval.low, interval.high) == pytest.approx((10 - 3.7, 10 + 1.9))
    wider = studentised_interval(10.0, 1.0, samples, errors, implied_error=2.0)
    assert (wider.low, wider.high) == pytest.approx((10 - 7.4, 10 + 3.8))
    undefined = studentised_interval(10.0, 1.0, np.append(samples, np.nan), np.append(errors, 1.0))
    assert undefined == interval


def test_a_resample_that_seems_certain_does_not_stretch_the_interval_without_end():
    samples, errors = np.array([1.0, 0.0]), np.array([1.0, 1e-12])
    interval = studentised_interval(1.0, 1.0, samples, errors)
    assert interval.high == pytest.approx(1 + 3 * 0.975)


def test_five_of_five_is_not_certain():
    # Clopper-Pearson: the lower end p has p^5 = 0.025.
    interval = share_interval(5, 5)
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 5))
    assert share_interval(0, 5).high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_interval_holds_its_value_and_passes_over_undefined_resamples():
    interval = percentile_interval(0.5, np.array([0.6, 0.7, np.nan, 0.8]))
    assert (interval.low, interval.value) == (0.5, 0.5)
    assert interval.high == pytest.approx(0.795)
    assert percentile_interval(0.5, np.array([np.nan])).to_dict() == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
    }
