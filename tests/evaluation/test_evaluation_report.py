import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from visiontuner.evaluation.calibration import (
    ChosenThreshold,
    choose_threshold,
    expected_calibration_error,
    probabilities_of,
)
from visiontuner.evaluation.intervals import Interval
from visiontuner.evaluation.report import EvaluationReport, evaluate_predictions
from visiontuner.evaluation.scores import METRICS


def images(count, classes, *, seed=0, right=0.8):
    """Logits and labels of a classifier that is right about as often as `right` says."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=count)
    answers = np.where(
        generator.random(count) < right, labels, generator.integers(classes, size=count)
    )
    return generator.normal(size=(count, classes)) + 3 * np.eye(classes)[answers], labels


def evaluate(logits, labels, **more):
    logits = np.asarray(logits, dtype=float)
    names = tuple(f"class {i}" for i in range(logits.shape[1]))
    arguments = {"class_names": names, "temperature": 1.0, "threshold": None, "resamples": 200}
    return evaluate_predictions(logits=logits, labels=np.asarray(labels), **{**arguments, **more})


def test_every_number_is_sklearns():
    logits, labels = images(500, 8)
    report = evaluate(logits, labels, temperature=1.7)
    values = {name: interval.value for name, interval in report.metrics.items()}
    before, after = probabilities_of(logits), probabilities_of(logits, 1.7)
    predicted = logits.argmax(axis=1)
    assert list(values) == list(METRICS)
    assert values["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert values["nll"] == pytest.approx(log_loss(labels, after))
    assert values["nll_uncalibrated"] == pytest.approx(log_loss(labels, before))
    assert values["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert values["ece"] == pytest.approx(expected_calibration_error(after, labels))
    assert values["ece_uncalibrated"] == pytest.approx(expected_calibration_error(before, labels))
    assert np.array_equal(report.confusion, confusion_matrix(labels, predicted))
    columns = precision_recall_fscore_support(labels, predicted)
    for score, *expected in zip(report.classes, *columns, strict=True):
        found = [score.precision, score.recall, score.f1, score.support]
        assert found == pytest.approx(expected)
        assert score.predicted == (predicted == int(score.name[-1])).sum()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    many_logits, many_labels = images(200_000, 5, seed=99, right=0.75)
    truth = (many_logits.argmax(axis=1) == many_labels).mean()
    held = 0
    for seed in range(60):
        interval = evaluate(*images(200, 5, seed=seed, right=0.75)).metrics["accuracy"]
        held += interval.low <= truth <= interval.high
    assert held >= 50  # of 60; 57 on average


def test_intervals_of_rare_mistakes_hold_the_truth():
    # 98 % right: percentiles of 100 images held the loss in .77 and macro F1 in .84 of draws.
    generator = np.random.default_rng(5)
    labels = generator.integers(24, size=50_000)
    logits = 0.8 * generator.gumbel(size=(50_000, 24))
    logits[np.arange(50_000), labels] += 9.5 * np.exp(0.5 * generator.normal(size=50_000))
    truth = evaluate(logits, labels, resamples=2).metrics
    assert truth["accuracy"].value == pytest.approx(0.98, abs=0.01)
    held = {"nll": 0, "macro_f1": 0, "accuracy": 0}
    for _ in range(150):
        rows = generator.integers(50_000, size=100)
        found = evaluate(logits[rows], labels[rows]).metrics
        for name in held:
            held[name] += found[name].low <= truth[name].value <= found[name].high
    assert min(held.values()) >= 135, held  # of 150; 142 at 95 %


def test_the_error_of_macro_f1_is_that_of_drawing_the_images_again():
    logits, labels = images(400, 5, right=0.7)
    report = evaluate(logits, labels, resamples=1000)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = generator.integers(400, size=400)
        drawn.append(f1_score(labels[rows], logits[rows].argmax(axis=1), average="macro"))
    interval = report.metrics["macro_f1"]
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(np.std(drawn), rel=0.1)


@pytest.mark.parametrize(("answered", "ends"), [("right", (0.8316, 1.0)), ("wrong", (0, 0.1684))])
def test_twenty_alike_are_not_certain(answered, ends):
    labels = np.arange(20) % 4
    logits = 9.0 * np.eye(4)[labels if answered == "right" else (labels + 1) % 4]
    report = evaluate(logits, labels)
    for name in ("accuracy", "macro_f1"):
        interval = report.metrics[name]
        assert (interval.low, interval.high) == pytest.approx(ends, abs=1e-4)


def test_a_class_wholly_right_and_one_wholly_wrong_have_an_interval():
    labels = np.array([0] * 10 + [1] * 10)
    answers = np.array([0] * 10 + [2] * 10)
    interval = evaluate(9.0 * np.eye(3)[answers], labels).metrics["macro_f1"]
    assert interval.value == pytest.approx(1 / 3)
    assert interval.low <= interval.value <= interval.high


def test_the_same_seed_gives_the_same_report():
    logits, labels = images(100, 7)
    threshold = choose_threshold(probabilities_of(logits), labels, 0.8)
    first, second = (evaluate(logits, labels, threshold=threshold).to_dict() for _ in range(2))
    assert first == second
    assert first != evaluate(logits, labels, threshold=threshold, seed=8).to_dict()


def test_a_report_survives_json():
    logits, labels = images(60, 6)
    labels[labels == 3] = 2
    logits[:, 4] = -99.0
    threshold = ChosenThreshold(wanted_precision=0.97, value=None, precision=math.nan, coverage=0.0)
    report = evaluate(logits, labels, threshold=threshold, notes=["First."])
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = EvaluationReport.from_dict({**json.loads(text), "looks": 1})
    assert again.to_dict() == report.to_dict()
    assert math.isnan(again.classes[4].precision)
    assert math.isnan(again.classes[3].recall)
    assert isinstance(again.metrics["nll"], Interval)
    assert again.confusion.dtype == np.int64
    assert again.notes[0] == "First."


@pytest.mark.parametrize("raw", [{}, {"class_names": None}, [], {"class_names": ["a"]}])
def test_something_else_is_no_report(raw):
    with pytest.raises(ValueError, match="no evaluation"):
        EvaluationReport.from_dict(raw)


def test_a_report_with_damaged_numbers_is_none():
    raw = evaluate(*images(20, 3)).to_dict()
    raw["metrics"]["accuracy"] = "high"
    with pytest.raises(ValueError, match="no evaluation"):
        EvaluationReport.from_dict(raw)


# the threshold on test


def test_threshold_on_test_by_hand():
    # Confidences 0.9, 0.9, 0.8, 0.6: at 0.8 three answers count and two of them are right.
    confidence = np.array([0.9, 0.9, 0.8, 0.6])
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    chosen = ChosenThreshold(wanted_precision=0.9, value=0.8 - 1e-9, precision=0.95, coverage=0.7)
    threshold = evaluate(logits, [0, 1, 0, 0], threshold=chosen).threshold
    assert threshold.precision.value == pytest.approx(2 / 3)
    assert threshold.coverage.value == pytest.approx(3 / 4)
    assert (threshold.validation_precision, threshold.validation_coverage) == (0.95, 0.7)
    assert threshold.precision.low == pytest.approx(0.0943, abs=1e-4)  # 2 of 3, Clopper-Pearson
    assert threshold.coverage.low == pytest.approx(0.1941, abs=1e-4)  # 3 of 4


def test_without_a_threshold_every_answer_abstains():
    chosen = ChosenThreshold(wanted_precision=0.99, value=None, precision=math.nan, coverage=0.0)
    report = evaluate(*images(50, 3), threshold=chosen)
    assert report.threshold.precision is None
    assert report.threshold.coverage == Interval(value=0, low=0, high=0)
    assert any("every answer abstains" in note for note in report.notes)


def test_a_threshold_that_no_test_image_reaches():
    chosen = ChosenThreshold(wanted_precision=0.9, value=1.0, precision=1.0, coverage=0.1)
    report = evaluate(np.zeros((40, 3)), np.zeros(40, dtype=int), threshold=chosen)
    assert report.threshold.precision is None
    assert report.threshold.coverage.value == 0
    assert "No test image reaches the threshold 1.000." in report.notes


def test_a_threshold_that_breaks_its_word_is_said():
    logits, labels = images(400, 4, right=0.3)
    chosen = ChosenThreshold(wanted_precision=0.9, value=0.5, precision=0.95, coverage=0.9)
    assert any(
        "on test it does not" in note for note in evaluate(logits, labels, threshold=chosen).notes
    )


# days on which there is little to see


def finite(report):
    for name, interval in report.metrics.items():
        assert math.isfinite(interval.value), name
        assert interval.low <= interval.value <= interval.high, name
    json.dumps(report.to_dict(), allow_nan=False)
    return report


def test_one_image():
    report = finite(evaluate([[2.0, 0.0, 0.0]], [0]))
    assert report.metrics["accuracy"].value == 1
    assert report.metrics["accuracy"].low == pytest.approx(0.025)  # 1 of 1, exact
    assert report.notes[0].startswith("Only 1 test image:")


def test_a_class_without_test_images_is_said_and_left_out_of_macro_f1():
    logits, labels = np.eye(3)[[0, 0, 1, 1]] * 5, [0, 0, 1, 1]
    report = finite(evaluate(logits, labels))
    assert report.metrics["macro_f1"].value == 1.0
    assert "No test images of class 2: recall is unknown there." in report.notes
    assert math.isnan(report.classes[2].recall)
    assert report.classes[2].recall_interval is None


def test_a_class_that_nobody_predicts_is_said():
    report = finite(evaluate(np.eye(3)[[0, 0, 0]] * 5, [0, 1, 2]))
    assert "Never predicted on test: class 1, class 2." in report.notes
    assert math.isnan(report.classes[1].precision)
    assert report.classes[1].f1 == 0


def test_many_missing_classes_are_one_short_note():
    report = finite(evaluate(np.eye(40)[[0, 1]], [0, 1]))
    (note,) = [note for note in report.notes if note.startswith("No test images")]
    assert "38 classes (class 2, class 3, class 4, class 5, class 6, …)" in note


@pytest.mark.parametrize("right", [True, False])
def test_all_right_and_all_wrong(right):
    labels = np.arange(60) % 3
    report = finite(evaluate(np.eye(3)[labels if right else (labels + 1) % 3] * 4, labels))
    accuracy = report.metrics["accuracy"]
    assert accuracy.value == float(right)
    assert accuracy.high - accuracy.low == pytest.approx(1 - 0.025 ** (1 / 60))
    assert any("Every test image was classified" in note for note in report.notes)


def test_one_class_alone():
    report = finite(evaluate(np.zeros((5, 1)), np.zeros(5, dtype=int)))
    assert report.metrics["nll"].value == 0
    assert "top5_accuracy" not in report.metrics
    assert "All test images are of one class, class 0." in report.notes


def test_two_classes_and_huge_logits():
    labels = np.arange(40) % 2
    logits = np.eye(2)[labels] * 1e4
    logits[0] = logits[0][::-1]
    report = finite(evaluate(logits, labels, temperature=0.05))
    # One of 40 is wrong by 1e4 / 0.05 nats.
    assert report.metrics["nll"].value == pytest.approx(2e5 / 40)


@pytest.mark.parametrize(
    ("logits", "labels", "more", "message"),
    [
        (np.zeros((0, 3)), [], {}, "empty"),
        (np.zeros((2, 3)), [0, 3], {}, r"labels must be in \[0, 3\)"),
        (np.zeros((2, 3)), [0, -1], {}, r"labels must be in \[0, 3\)"),
        (np.zeros((3, 3)), [0, 1], {}, "shape"),
        (np.zeros((2, 3)), [0, 1], {"class_names": ["a"]}, "shape"),
        (np.full((2, 3), np.nan), [0, 1], {}, "finite"),
        (np.zeros((2, 3)), [0, 1], {"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, more, message):
    with pytest.raises(ValueError, match=message):
        evaluate(logits, np.array(labels, dtype=int), **more)


@settings(max_examples=30, deadline=None)
@example(count=21, classes=5, scale=0.0, seed=0)  # probabilities that are all alike
@given(
    count=st.integers(1, 40),
    classes=st.integers(1, 8),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
def test_any_predictions_give_finite_numbers(count, classes, scale, seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, classes)) * scale
    labels = generator.integers(classes, size=count)
    threshold = choose_threshold(probabilities_of(logits), labels, 0.6)
    report = finite(evaluate(logits, labels, threshold=threshold, resamples=30))
    assert report.confusion.sum() == count
    assert report.metrics["accuracy"].value == pytest.approx(np.trace(report.confusion) / count)
