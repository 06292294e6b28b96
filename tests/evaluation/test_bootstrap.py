import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import bootstrap

from visiontuner.evaluation.intervals import (
    fraction_interval,
    percentile_interval,
    resampled_sums,
    sign_flipped_sums,
)


def test_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=300)
    sums = resampled_sums(values[:, None], seed=1, resamples=4000)
    found = percentile_interval(values.mean(), sums[:, 0] / 300)
    expected = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.01)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.01)


def test_every_resample_draws_as_many_pictures_as_there_are():
    sums = resampled_sums(np.ones((17, 1)), seed=1, resamples=250)
    assert sums.tolist() == [[17.0]] * 250


def test_sparse_and_dense_columns_draw_the_same_pictures():
    columns = np.random.default_rng(0).integers(2, size=(40, 3)).astype(float)
    dense = resampled_sums(columns, seed=5, resamples=120)
    assert np.array_equal(dense, resampled_sums(csr_array(columns), seed=5, resamples=120))
    assert not np.array_equal(dense, resampled_sums(columns, seed=6, resamples=120))


def test_flipped_signs_have_no_direction():
    sums = sign_flipped_sums(np.ones((100, 1)), seed=1, resamples=2000)
    assert sums.std() == pytest.approx(10, rel=0.1)  # of 100 coins of +-1
    assert abs(sums.mean()) < 1


def test_five_of_five_is_not_certain():
    # Clopper-Pearson: the lower end p has p^5 = 0.025.
    interval = fraction_interval(5, 5, np.ones(100))
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 5))
    assert fraction_interval(0, 5, np.zeros(100)).high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_interval_holds_its_value_and_passes_over_undefined_resamples():
    interval = percentile_interval(0.5, np.array([0.6, 0.7, np.nan, 0.8]))
    assert (interval.low, interval.value) == (0.5, 0.5)
    assert interval.high == pytest.approx(0.795)
    assert percentile_interval(0.5, np.array([np.nan])).to_dict() == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
    }
