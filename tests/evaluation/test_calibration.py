import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.calibration import calibration_curve

from visiontuner.evaluation.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    calibration_notes,
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    image_losses,
    probabilities_of,
    reliability,
    risk_coverage,
)


def drawn_from(logits, seed=0):
    """Labels that follow the softmax of the logits: these logits are calibrated."""
    generator = np.random.default_rng(seed)
    chances = softmax(logits, axis=1).cumsum(axis=1)
    return np.minimum((generator.random((len(logits), 1)) > chances).sum(1), logits.shape[1] - 1)


def two_classes(confidences, right):
    """Probabilities whose first column is the answer, and labels that make it right or wrong."""
    first = np.array(confidences, dtype=float)
    return np.stack([first, 1 - first], axis=1), np.where(right, 0, 1)


# temperature


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_temperature_undoes_a_factor_on_calibrated_logits(factor):
    logits = np.random.default_rng(1).normal(size=(4000, 6)) * 2
    labels = drawn_from(logits)
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.06)


def test_temperature_is_the_likeliest_one_where_there_are_many_images():
    logits = np.random.default_rng(2).normal(size=(3000, 5)) * 6
    labels = drawn_from(logits / 3)
    likeliest = minimize_scalar(
        lambda t: image_losses(logits, labels, t).mean(), bounds=(0.5, 10), method="bounded"
    ).x
    assert fit_temperature(logits, labels) == pytest.approx(likeliest, rel=0.01)


def test_temperature_stays_one_where_images_do_not_tell():
    logits = np.random.default_rng(3).normal(size=(150, 5)) * 2
    labels = drawn_from(logits)
    assert fit_temperature(logits, labels) == 1.0
    assert "No temperature fits" in calibration_notes(logits, labels, 1.0)[0]


LOGITS = st.tuples(st.integers(1, 40), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-1e4, 1e4))
)


@settings(max_examples=60, deadline=None)
@given(logits=LOGITS, seed=st.integers(0, 9))
def test_temperature_never_raises_the_loss_it_is_fitted_on(logits, seed):
    labels = np.random.default_rng(seed).integers(logits.shape[1], size=len(logits))
    temperature = fit_temperature(logits, labels)
    assert LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE
    before, after = (image_losses(logits, labels, t).mean() for t in (1.0, temperature))
    assert after <= before
    assert np.isfinite(after)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_temperature_of_a_few_images_is_sensible(right, count):
    # One image that is right by a hair proves nothing, nor does one that is wrong by a hair.
    logits = np.tile([[0.1, 0.0]], (count, 1))
    assert fit_temperature(logits, np.full(count, 0 if right else 1)) == 1.0


def test_temperature_is_kept_from_zero_where_all_are_right():
    generator = np.random.default_rng(4)
    labels = generator.integers(4, size=300)
    logits = generator.normal(size=(300, 4)) * 0.3 + 4 * np.eye(4)[labels]
    assert (logits.argmax(1) == labels).all()
    temperature = fit_temperature(logits, labels)
    # The likeliest temperature is the lowest; one later mistake of 4 would cost 4 / 0.05 nats.
    assert 0.15 < temperature < 1
    assert "no mistake to fit it to" in calibration_notes(logits, labels, temperature)[0]


def test_wildly_wrong_logits_get_the_highest_temperature():
    logits = np.array([[1e4, 0.0], [1e4, 0.0]])
    labels = np.array([1, 1])
    assert fit_temperature(logits, labels) == HIGHEST_TEMPERATURE
    notes = calibration_notes(logits, labels, HIGHEST_TEMPERATURE)
    assert [note.split(":")[0] for note in notes] == [
        "One class in validation",
        "The temperature 20 lies at the end of the range allowed for it.",
    ]


@pytest.mark.parametrize(
    "logits",
    [np.zeros((0, 3)), np.ones((5, 1)), np.full((4, 3), np.nan), np.full((4, 3), np.inf)],
)
def test_nothing_to_fit_is_temperature_one(logits):
    assert fit_temperature(logits, np.zeros(len(logits), dtype=int)) == 1.0


def test_losses_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4)
    logits = np.array([[0.0, math.log(3)]] * 2)
    assert image_losses(logits, np.array([1, 0])) == pytest.approx([-math.log(0.75), math.log(4)])


# calibration error


def test_calibration_error_is_zero_when_confidence_equals_accuracy():
    probabilities, labels = two_classes([0.75] * 4, [True, True, True, False])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0)


def test_calibration_error_by_hand():
    # Confidence 0.9 and half right: 0.4 off for 2 of 4; confidence 0.6 and all right: 0.4 off.
    probabilities, labels = two_classes([0.9, 0.9, 0.6, 0.6], [True, False, True, True])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.4)


@pytest.mark.parametrize("num_classes", [2, 7])
def test_reliability_and_calibration_error_are_sklearns(num_classes):
    generator = np.random.default_rng(5)
    probabilities = softmax(generator.normal(size=(400, num_classes)) * 2, axis=1)
    labels = generator.integers(num_classes, size=400)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    accuracies, confidences = calibration_curve(correct, confidence, n_bins=15)
    table = reliability(probabilities, labels)
    filled = table.count > 0
    assert table.accuracy[filled] == pytest.approx(accuracies)
    assert table.confidence[filled] == pytest.approx(confidences)
    counts = np.histogram(confidence, bins=15, range=(0, 1))[0]
    assert table.count.tolist() == counts.tolist()
    expected = (np.abs(accuracies - confidences) * counts[filled]).sum() / 400
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_no_images_have_no_calibration_error():
    with pytest.raises(ValueError, match="empty"):
        expected_calibration_error(np.zeros((0, 2)), np.zeros(0, dtype=int))


def test_reliability_by_hand():
    probabilities, labels = two_classes([1.0, 0.8, 0.7, 0.55], [True, True, False, True])
    table = reliability(probabilities, labels, bins=2)
    assert table.count.tolist() == [0, 4]
    assert math.isnan(table.confidence[0])
    assert table.confidence[1] == pytest.approx((1 + 0.8 + 0.7 + 0.55) / 4)
    assert table.accuracy[1] == pytest.approx(3 / 4)


# threshold


def test_threshold_is_the_lowest_confidence_that_is_precise_enough():
    # Sure answers, 40, all right; unsure ones, 20, half right. 0.9 holds for the first with one
    # wrong added (40 / 41) and for no more of them all: 50 / 61.
    confidences = np.concatenate([np.linspace(0.9, 0.99, 40), np.linspace(0.6, 0.7, 20)])
    right = np.concatenate([np.ones(40), np.arange(20) % 2]).astype(bool)
    chosen = choose_threshold(*two_classes(confidences, right), 0.9)
    assert chosen.value is not None
    assert chosen.precision >= 0.9
    assert chosen.coverage >= 40 / 60
    assert chosen.value <= 0.9


def test_one_confident_image_makes_no_threshold():
    probabilities, labels = two_classes([0.999, *[0.8] * 50], [True, *[False, True] * 25])
    assert choose_threshold(probabilities, labels, 0.9).value is None


@pytest.mark.parametrize(("images", "reached"), [(32, False), (33, True)])
def test_threshold_needs_as_many_images_as_carry_a_mistake(images, reached):
    # All right, and 0.97 must hold with one wrong added: 33 / 34 = 0.9706, but 32 / 33 = 0.9697.
    probabilities, labels = two_classes([0.9] * images, [True] * images)
    chosen = choose_threshold(probabilities, labels, 0.97)
    assert (chosen.value is not None) == reached
    assert chosen.coverage == (1.0 if reached else 0.0)
    assert chosen.precision == 1.0 or math.isnan(chosen.precision)


def test_equal_confidences_are_not_parted():
    # The 20 answers at 0.8 hold the mistakes: none of them may be picked out.
    confidences, right = [0.9] * 40 + [0.8] * 20, [True] * 40 + [True] * 10 + [False] * 10
    chosen = choose_threshold(*two_classes(confidences, right), 0.95)
    assert (chosen.value, chosen.coverage) == (0.9, 40 / 60)


@pytest.mark.parametrize("wanted", [0.0, 1.0, 97.0, -1.0, float("nan")])
def test_wanted_precision_is_a_fraction(wanted):
    with pytest.raises(ValueError, match="wanted_precision must be"):
        choose_threshold(*two_classes([0.9], [True]), wanted)


def test_no_images_give_no_threshold():
    assert choose_threshold(np.zeros((0, 2)), np.zeros(0, dtype=int), 0.9).value is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 200),
    classes=st.integers(1, 6),
    wanted=st.floats(0.05, 0.995),
)
def test_threshold_keeps_its_word_on_the_images_it_was_chosen_on(seed, count, classes, wanted):
    generator = np.random.default_rng(seed)
    probabilities = softmax(generator.normal(size=(count, classes)) * 3, axis=1).round(2)
    labels = generator.integers(classes, size=count)
    chosen = choose_threshold(probabilities, labels, wanted)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    kept = {value: confidence >= value for value in set(confidence)}
    holding = [
        value
        for value, answered in kept.items()
        if answered.sum() >= 10 and correct[answered].sum() / (answered.sum() + 1) >= wanted
    ]
    assert chosen.value == min(holding, default=None)
    if chosen.value is None:
        assert chosen.coverage == 0
    else:
        answered = kept[chosen.value]
        assert chosen.coverage == answered.mean()
        assert chosen.precision == pytest.approx(correct[answered].mean())
        assert chosen.precision >= wanted


# risk and coverage


def test_risk_coverage_by_hand():
    probabilities, labels = two_classes([0.9, 0.8, 0.7, 0.6], [True, False, True, True])
    curve = risk_coverage(probabilities, labels)
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert curve.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_risk_of_equal_confidences_is_one_point():
    probabilities = np.ones((4, 1))
    curve = risk_coverage(probabilities, np.zeros(4, dtype=int))
    assert (curve.coverage.tolist(), curve.risk.tolist(), curve.area) == ([1.0], [0.0], 0.0)


def test_probabilities_of_huge_logits_are_finite():
    probabilities = probabilities_of(np.array([[1e4, -1e4], [0.0, 0.0]]), 0.05)
    assert probabilities.tolist() == [[1.0, 0.0], [0.5, 0.5]]
