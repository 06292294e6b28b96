"""What int8 changes, worked out on a few images by hand."""

import numpy as np
import pytest

from visiontuner.evaluation.baselines import Baseline
from visiontuner.evaluation.calibration import match_temperature, probabilities_of
from visiontuner.evaluation.quantized import (
    Calibration,
    FormAnswers,
    calibrate_int8,
    compare_forms,
)

LABELS = np.array([0, 0, 1, 1])
AS_IT_IS = Calibration(temperature=1.0, threshold=0.7, abstains=False)


def answers(*first: float) -> FormAnswers:
    """Two classes; the first one's logit for each image, the other's is 0."""
    logits = np.array([[value, 0.0] for value in first])
    return FormAnswers(logits=logits, features=np.array([[value] for value in first]))


def test_figures_are_those_of_both_forms_with_their_own_temperature() -> None:
    found = compare_forms(
        answers(2, 1, -1, -2),
        answers(2, -1, -1, 2),
        LABELS,
        class_names=("a", "b"),
        temperatures=(1.0, 2.0),
        calibration=AS_IT_IS,
    )
    assert (found.images, found.agreement.value) == (4, 0.5)
    assert (found.accuracy_fp32.value, found.accuracy_int8.value) == (1.0, 0.5)
    assert found.loss.value == 0.5
    assert found.loss.low < 0 < found.loss.high  # two of four images prove nothing
    losses = [np.log1p(np.exp(-value / 2)) for value in (2, -1, 1, -2)]
    assert found.nll_int8.value == pytest.approx(np.mean(losses))


def test_a_head_that_saw_the_images_is_replaced_in_both_forms() -> None:
    head = Baseline(
        name="other",
        configuration={},
        logits=np.empty((0, 2)),
        seconds=0.0,
        weights=np.float32([[-1], [0]]),
        biases=np.float32([0, 0]),
    )
    found = compare_forms(
        answers(2, 1, -1, -2),
        answers(2, 1, -1, 2),
        LABELS,
        class_names=("a", "b"),
        temperatures=(1.0, 1.0),
        calibration=AS_IT_IS,
        head=head,
    )
    assert (found.accuracy_fp32.value, found.accuracy_int8.value) == (0.0, 0.25)
    assert found.loss.value == -0.25


@pytest.mark.parametrize("temperature", [0.4, 1.0, 6.0])
def test_matched_temperature_gives_the_other_probabilities(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 5)) * 3
    wanted = probabilities_of(logits, 1.5)
    found = match_temperature(logits * temperature / 1.5, wanted)
    assert found == pytest.approx(temperature, rel=1e-3)


def test_calibration_is_fitted_where_the_head_had_not_seen_the_images() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=400)
    logits = rng.normal(size=(400, 3)) + 2 * np.eye(3)[labels]
    sure = 3 * logits  # three times as sure as the evidence
    fitted, kept = (
        calibrate_int8(logits, sure, labels, fitted_before=AS_IT_IS, wanted_precision=wanted)
        for wanted in (0.9, None)
    )
    counted = probabilities_of(sure, fitted.temperature).max(axis=1) >= (fitted.threshold or 2)
    assert (sure.argmax(axis=1) == labels)[counted].mean() >= 0.9
    assert not fitted.abstains
    assert kept.temperature == pytest.approx(3, rel=1e-3)
    assert (kept.threshold, kept.abstains) == (0.7, False)
