"""Each rule has a history that fires it and one nearby that does not."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from visiontuner.diagnostics.history import (
    BestTrial,
    Curve,
    Predictions,
    TrainingHistory,
    history_of_trial,
    loss_bounds,
)
from visiontuner.diagnostics.rules import (
    LASTING_RULES,
    RECORDED_RULES,
    RULES,
    diagnose_curves,
    diagnose_history,
)
from visiontuner.diagnostics.rules_search import few_steps, similar_across_runs
from visiontuner.errors import ExperimentError
from visiontuner.experiment.schema import STOPPING_RULES, Experiment
from visiontuner.journal import EpochRecord, Finding, SearchRecord, TrialRecord
from visiontuner.training.metrics import balanced_class_weights

GUESS = math.log(10)  # 2.303


def history(**parts: Any) -> TrainingHistory:
    """Ten classes; a list of numbers is the curve of that name, one value an epoch from 1."""
    curves = {n: v for n, v in parts.items() if isinstance(v, list)}
    rest = {n: v for n, v in parts.items() if n not in curves}
    return TrainingHistory(
        metrics={n: Curve(tuple(range(1, len(v) + 1)), tuple(v)) for n, v in curves.items()},
        **{"num_classes": 10, **rest},
    )


def falling(start: float, end: float, epochs: int = 20) -> list[float]:
    """Geometric steps."""
    return [float(value) for value in np.geomspace(start, end, epochs)]


def predictions(predicted: list[int], labels: list[int], sure: float = 0.9) -> Predictions:
    """`sure` for the predicted class, the rest shared by the others; as many classes as needed."""
    classes = max(*predicted, *labels) + 1
    table = np.full((len(labels), classes), (1 - sure) / (classes - 1))
    table[np.arange(len(labels)), predicted] = sure
    return Predictions(
        probabilities=table,
        labels=np.array(labels),
        class_names=tuple("abcdefghijklmnopqrstuvwxyz"[:classes]),
    )


def shuffled(accuracy: float) -> TrainingHistory:
    return history(
        train_loss=falling(2.45, 1.6),
        validation_loss=[2.32, 2.35, 2.41, *[2.45] * 17],
        train_accuracy=[0.5] * 20,
        validation_accuracy=[accuracy] * 20,
    )


def fifty_epochs_idle(rise: float) -> TrainingHistory:
    return history(validation_loss=[*falling(2.0, 1.0, 20), *[1.0 + rise] * 60])


def missed(rare_recall: float, **parts: Any) -> TrainingHistory:
    """100, 100 and 5 training images; ten of the rare class in validation."""
    right = round(10 * rare_recall)
    labels = [0] * 10 + [1] * 10 + [2] * 10
    said = labels[:20] + [2] * right + [0] * (10 - right)
    return history(
        class_names=("a", "b", "c"),
        class_counts=(100, 100, 5),
        num_classes=3,
        predictions=predictions(said, labels, sure=0.6),
        **parts,
    )


def never_named(others_right: int) -> TrainingHistory:
    """Two classes of ten; the second is never predicted, the first `others_right` times of ten."""
    labels = [0] * 10 + [1] * 10 + [2] * 10
    said = [0] * others_right + [2] * (10 - others_right) + [0] * 10 + [2] * 10
    return history(predictions=predictions(said, labels, sure=0.6), num_classes=3)


def behind(loss: float, accuracy: float) -> TrainingHistory:
    """A class is never named; another trial reached accuracy 1 and loss 1."""
    return replace(
        history(validation_loss=[loss], validation_accuracy=[accuracy]),
        predictions=never_named(10).predictions,
        best=BestTrial(accuracy=1.0, loss=1.0, learning_rate=0.01),
    )


def doubtful(wrong: int, sure: float = 0.995) -> TrainingHistory:
    """100 validation images of ten classes, `wrong` of them confidently another one."""
    labels = [n % 10 for n in range(100)]
    said = [(label + 1) % 10 if n < wrong else label for n, label in enumerate(labels)]
    return history(predictions=predictions(said, labels, sure=sure))


def of_shape(images: int, classes: int) -> Predictions:
    return Predictions(
        probabilities=np.full((images, classes), 1 / classes),
        labels=np.zeros(images, np.int64),
        class_names=tuple("abc"[:classes]),
    )


SMOOTHED = {"label_smoothing": 0.4}  # a perfect model then has 1.444, a guess still 2.303
MIXED = {"augmentation": {"mixup": 0.2, "cutmix": 0.0}}


def mixed(train_loss: float, accuracy: float, validation_loss: float = 1.5) -> TrainingHistory:
    """Eleven epochs with MixUp, all the same."""
    return history(
        train_loss=[train_loss] * 11,
        validation_loss=[validation_loss] * 11,
        validation_accuracy=[accuracy] * 11,
        configuration=MIXED,
    )


def memorised(**configuration: Any) -> TrainingHistory:
    """0.99 in training, 0.6 in validation, and a training loss above validation's."""
    return history(
        train_loss=[1.5] * 20,
        validation_loss=[1.3] * 20,
        train_accuracy=[0.99] * 20,
        validation_accuracy=[0.6] * 20,
        configuration=configuration,
    )


PAIRS: dict[str, tuple[str, TrainingHistory, TrainingHistory]] = {
    "not_a_number: a metric": (
        "error",
        history(train_loss=[1.0, math.nan]),
        history(train_loss=[1.0, 1e30], num_classes=None, gradient_norm=[1.0]),
    ),
    "not_a_number: the end": (
        "error",
        history(error="The training loss is nan in epoch 1 at learning rate 9."),
        history(error="MemoryError: the nanny is infinitely busy"),
    ),
    "loss_not_decreasing: flat": (
        "error",
        history(train_loss=[GUESS] * 11),
        history(train_loss=falling(GUESS, GUESS * 0.99, 11)),
    ),
    "loss_not_decreasing: rising": (
        "error",
        history(train_loss=falling(2.0, 2.2, 5)),
        history(train_loss=falling(2.2, 2.0, 5)),
    ),
    "loss_not_decreasing: but learned": (
        "error",
        history(train_loss=[1.2] * 11),
        history(train_loss=[1.1] * 11),  # below half of 2.303
    ),
    "loss_not_decreasing: with smoothed labels": (
        "error",
        history(train_loss=[1.89] * 11, configuration=SMOOTHED),  # 0.446 of 0.858 above the least
        history(train_loss=[1.85] * 11, configuration=SMOOTHED),
    ),
    "loss_not_decreasing: with smoothed labels of rare classes": (
        "error",
        history(train_loss=[1.84] * 11, num_classes=2),
        history(
            train_loss=[1.84] * 11,  # halfway between 1.308 and 2.392
            configuration={"label_smoothing": 0.1, "class_weights": "balanced"},
            class_counts=(100, 1),
            num_classes=2,
        ),
    ),
    "loss_not_decreasing: with mixed images": ("error", mixed(1.9, 0.4), mixed(1.9, 0.56)),
    "loss_not_decreasing: with mixed images, by the loss": (
        "error",
        mixed(1.9, 0.4),
        mixed(1.9, 0.4, validation_loss=1.1),
    ),
    "overfit": (
        "error",
        history(
            train_loss=falling(2, 0.01),
            validation_loss=[1.0] * 20,
            train_accuracy=[0.99] * 20,
            validation_accuracy=[0.7] * 20,
        ),
        history(
            train_loss=falling(2, 0.01),
            validation_loss=[1.0] * 20,
            train_accuracy=[0.99] * 20,
            validation_accuracy=[0.9] * 20,
        ),
    ),
    "overfit: no accuracies": (
        "warning",
        history(train_loss=falling(2, 0.1), validation_loss=[*falling(2, 1, 10), *[1.2] * 10]),
        history(train_loss=falling(2, 0.1), validation_loss=[*falling(2, 1, 10), *[1.05] * 10]),
    ),
    "overfit: with smoothed labels": ("error", memorised(**SMOOTHED), memorised()),
    "overtraining": ("error", fifty_epochs_idle(0.05), fifty_epochs_idle(0.005)),
    "learning_rate_too_high: error": (
        "error",
        history(train_loss=[10.1 * GUESS, 5.0, 1.0]),
        history(train_loss=[2.9 * GUESS, 5.0, 1.0]),
    ),
    "learning_rate_too_high: warning": (
        "warning",
        history(train_loss=[3.1 * GUESS, 5.0, 1.0]),
        history(train_loss=[2.9 * GUESS, 5.0, 1.0]),
    ),
    "learning_rate_too_high: jumps": (
        "warning",
        history(train_loss=[2.0, 1.0, 1.5, 0.9, 1.4, 0.8]),
        history(train_loss=[2.0, 1.0, 1.5, 0.9, 0.85, 0.8]),
    ),
    "learning_rate_too_low": (
        "error",
        history(train_loss=falling(GUESS, 2.2), validation_loss=falling(GUESS, 2.21)),
        history(train_loss=falling(GUESS, 1.3), validation_loss=falling(GUESS, 1.31)),
    ),
    "learning_rate_too_low: with smoothed labels": (
        "warning",
        history(
            train_loss=falling(2.25, 2.0), validation_loss=falling(2.2, 2.0), configuration=SMOOTHED
        ),
        history(
            train_loss=falling(2.25, 1.9), validation_loss=falling(2.2, 2.0), configuration=SMOOTHED
        ),
    ),
    "learning_rate_too_low: with mixed images": (
        "error",
        history(
            train_loss=falling(2.3, 2.2), validation_loss=falling(2.3, 2.2), configuration=MIXED
        ),
        history(
            train_loss=falling(2.3, 2.2), validation_loss=falling(2.3, 1.2), configuration=MIXED
        ),
    ),
    "learning_rate_too_low: validation must fall too": (
        "error",
        history(train_loss=falling(GUESS, 2.2), validation_loss=falling(GUESS, 2.21)),
        history(train_loss=falling(GUESS, 2.2), validation_loss=falling(2.21, GUESS)),
    ),
    "learning_rate_too_high: jumps, but not near the least of smoothed labels": (
        "warning",
        history(train_loss=[2.0, 1.45, 1.55, 1.45, 1.55, 1.45], configuration=SMOOTHED),
        history(train_loss=[2.0, 1.445, 1.52, 1.445, 1.52, 1.445], configuration=SMOOTHED),
    ),
    "exploding_gradient": (
        "error",
        history(gradient_norm=[2.0, 1.0, 201.0]),
        history(gradient_norm=[2.0, 1.0, 19.0]),
    ),
    "exploding_gradient: noise near the end": (
        "warning",
        history(gradient_norm=[2.0, 1.0, 21.0]),
        history(gradient_norm=[2.0, 1e-6, 1e-9, 1e-2]),
    ),
    "stalled: now": (
        "error",
        history(times=(0.0, 10.0, 20.0), now=1900.0),
        history(times=(0.0, 10.0, 20.0), now=1800.0),
    ),
    "stalled: slow epochs are none": (
        "error",
        history(times=(0.0, 1000.0, 2000.0), now=5100.0),
        history(times=(0.0, 1000.0, 2000.0), now=4900.0),
    ),
    "stalled: once": (
        "warning",
        history(times=(0.0, 10.0, 20.0, 2000.0)),
        history(times=(0.0, 10.0, 20.0, 1000.0)),
    ),
    "stalled: not by a break between two attempts": (
        "warning",
        history(times=(0.0, 10.0, 20.0, 30.0, 9000.0), attempts=(1, 1, 1, 2, 2)),
        history(times=(0.0, 10.0, 20.0, 9000.0, 9010.0), attempts=(1, 1, 1, 2, 2)),
    ),
    "class_imbalance: it shows": (
        "error",
        missed(0.2),
        replace(missed(0.2), class_counts=(50, 50, 5)),
    ),
    "class_imbalance: in numbers": (
        "warning",
        missed(0.4),
        replace(missed(0.4), class_counts=(50, 50, 5)),
    ),
    "class_imbalance: weighted": (
        "error",
        missed(0.2, configuration={"class_weights": "balanced"}),
        missed(0.4, configuration={"class_weights": "balanced"}),
    ),
    "class_not_predicted": (
        "error",
        never_named(10),
        replace(never_named(10), predictions=predictions([0, 1], [0, 1])),
    ),
    "learning_rate_to_blame": ("info", behind(1.0, 0.94), behind(1.0, 0.96)),
    "learning_rate_to_blame: by the loss": ("info", behind(1.51, 1.0), behind(1.49, 1.0)),
    "label_noise: labels say nothing": ("error", shuffled(0.1), shuffled(0.4)),
    "label_noise: with smoothed labels": (
        "error",
        replace(
            shuffled(0.1),
            configuration={"label_smoothing": 0.9},
            metrics={
                **shuffled(0.1).metrics,
                "train_loss": Curve((1, 2, 3, 4), (2.3, 2.29, 2.28, 2.275)),
            },
        ),
        replace(
            shuffled(0.1),
            metrics={
                **shuffled(0.1).metrics,
                "train_loss": Curve((1, 2, 3, 4), (2.3, 2.29, 2.28, 2.275)),
            },
        ),
    ),
    "label_noise: confident": ("error", doubtful(30), doubtful(7)),
    "label_noise: some": ("warning", doubtful(9), doubtful(9, sure=0.8)),
}


def found(case: str, of: TrainingHistory) -> Finding | None:
    return RULES[case.split(":")[0]](of)


@pytest.mark.parametrize("case", PAIRS)
def test_a_rule_fires(case: str) -> None:
    severity, fires, _ = PAIRS[case]
    finding = found(case, fires)
    assert finding is not None
    assert (finding.rule, finding.severity) == (case.split(":")[0], severity)
    assert finding.evidence
    assert finding.advice.endswith(".")
    assert "\n" not in finding.evidence + finding.advice


@pytest.mark.parametrize("case", PAIRS)
def test_a_rule_is_silent_nearby(case: str) -> None:
    assert found(case, PAIRS[case][2]) is None


def test_every_rule_on_curves_has_a_pair() -> None:
    assert {case.split(":")[0] for case in PAIRS} == set(RULES) - set(RECORDED_RULES)


def test_what_a_weak_model_never_names_is_a_warning() -> None:
    """Nine classes right of ten is luck excluded; a model as bad as that misses a class easily."""
    labels = [n % 10 for n in range(50)]
    weak = predictions([0 if n % 3 else label for n, label in enumerate(labels)], labels)
    finding = RULES["class_not_predicted"](history(predictions=weak))
    assert finding is None or finding.severity == "warning"


def test_a_model_surer_than_it_is_right_judges_no_labels() -> None:
    """12 % wrong at certainty: the loss is above a guess's, so it knows no probabilities."""
    assert RULES["label_noise"](doubtful(20, sure=1 - 1e-9)) is None


def test_evidence_names_the_learning_rate_and_the_batch_size() -> None:
    settings = {"learning_rate": 3.0, "batch_size": 128}
    finding = RULES["learning_rate_too_high"](history(train_loss=[99.0], configuration=settings))
    assert finding is not None
    assert "43 times the 2.3 of guessing (learning rate 3, batch size 128)" in finding.evidence


@pytest.mark.parametrize(
    ("rule", "huge"),
    [
        ("learning_rate_too_high", history(train_loss=[1.0, 1e300])),
        ("exploding_gradient", history(gradient_norm=[1.0, 1e300])),
        ("loss_not_decreasing", history(train_loss=[3.0, 3.0, 3.0, 1e300])),
    ],
)
def test_evidence_stays_short(rule: str, huge: TrainingHistory) -> None:
    finding = RULES[rule](huge)
    assert finding is not None
    assert len(finding.evidence) < 150


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "odd",
    [
        TrainingHistory(),
        TrainingHistory(num_classes=1, class_counts=(5,), class_names=("a",)),
        history(train_loss=[0.0] * 20, validation_loss=[0.0] * 20, gradient_norm=[0.0] * 20),
        history(train_loss=[math.inf] * 20, validation_loss=[math.nan] * 20),
        history(train_loss=[-1.0] * 20, num_classes=None),
        history(class_counts=(0, 0, 0)),
        history(predictions=of_shape(0, 3)),
        history(predictions=of_shape(4, 1)),
    ],
    ids=["empty", "one class", "zeros", "not finite", "negative", "no images", "none", "one"],
)
def test_no_rule_fails_on_an_odd_history(rule: str, odd: TrainingHistory) -> None:
    finding = RULES[rule](odd)
    assert finding is None or finding.rule == rule


def test_findings_come_with_errors_first() -> None:
    both = history(
        train_loss=[3.1 * GUESS, 1.0], gradient_norm=[1.0, 300.0], class_counts=(100, 1),
        class_names=("a", "b"),
    )  # fmt: skip
    assert [(f.rule, f.severity) for f in diagnose_history(both)] == [
        ("exploding_gradient", "error"),
        ("learning_rate_too_high", "warning"),
        ("class_imbalance", "warning"),
    ]
    assert {f.rule for f in diagnose_curves(both)} <= set(LASTING_RULES)


def trial(rate: float, losses: list[float], **settings: Any) -> TrainingHistory:
    return history(
        train_loss=losses,
        validation_loss=losses,
        configuration={"learning_rate": rate, **settings},
    )


def test_trials_with_other_settings_and_the_same_curves_are_similar() -> None:
    one, two = trial(0.1, [3, 2, 1], batch_size=64), trial(0.1, [3, 2, 1, 0.5], batch_size=128)
    found = similar_across_runs({"t1": one, "t2": two})
    assert set(found) == {"t2"}
    assert "t1" in found["t2"].evidence
    assert "batch_size 64 and 128" in found["t2"].evidence


def test_more_epochs_are_no_setting_without_effect() -> None:
    """A constant schedule: the first epochs are the same whatever the number of epochs."""
    short = trial(0.1, [3, 2, 1], epochs=3, batch_size=64)
    longer = trial(0.1, [3, 2, 1, 0.5], epochs=4, batch_size=64)
    assert similar_across_runs({"t1": short, "t2": longer}) == {}
    other = trial(0.1, [3, 2, 1, 0.5], epochs=4, batch_size=128)
    found = similar_across_runs({"t1": short, "t2": other})["t2"]
    assert found.evidence.endswith("with other settings: batch_size 64 and 128")


@pytest.mark.parametrize(
    "other",
    [
        trial(0.2, [3, 2, 1.0001]),
        trial(0.1, [3, 2, 1]),  # the same trial again
        trial(0.2, [3, 2]),  # too short to say
        trial(0.2, [2, 2, 2]),
    ],
)
def test_trials_are_not_similar(other: TrainingHistory) -> None:
    assert similar_across_runs({"t1": trial(0.1, [3, 2, 1]), "t2": other}) == {}


def test_similar_needs_curves_that_move() -> None:
    flat = [trial(rate, [2.0, 2.0, 2.0]) for rate in (0.1, 0.2)]
    assert similar_across_runs(dict(zip("ab", flat, strict=True))) == {}


def test_what_can_stop_a_trial_is_a_rule_that_sees_something_while_it_runs() -> None:
    assert set(STOPPING_RULES) <= set(RULES)
    assert set(LASTING_RULES) <= set(STOPPING_RULES)
    needs_the_end = {"class_not_predicted", "learning_rate_to_blame", "class_imbalance", "stalled"}
    assert set(RULES) - set(RECORDED_RULES) - set(STOPPING_RULES) == needs_the_end


@pytest.mark.parametrize(
    ("images", "changed", "said"),
    [
        (80, {"batch_size": 128}, "batch size 128 an epoch of 80 training images is 1 step, and a"),
        (80, {"batch_size": 128, "epochs": 39}, "1 step, and a training 39"),
        (80, {"batch_size": 128, "epochs": 40}, None),
        (160, {"batch_size": 128}, None),
        (160, {"batch_size": 128, "epochs": 19}, "2 steps, and a training 38"),
    ],
)
def test_trainings_of_few_steps_are_said(
    images: int, changed: dict[str, int], said: str | None
) -> None:
    space = {name: {"values": [1, value]} for name, value in changed.items()}
    for given in ({"training": changed, "search": {"space": {"dropout": {"values": [0.1]}}}},
                  {"search": {"space": space}}):  # fmt: skip
        finding = few_steps(Experiment.parse(given), images)
        assert said in finding.evidence if said and finding else finding is said


def test_an_experiment_names_rules_that_stop() -> None:
    experiment = Experiment.parse({"rules": {"stop_on": ["overfit"]}})
    assert experiment.rules.stop_on == ("overfit",)
    assert Experiment.parse({"rules": None}).rules.stop_on == ()
    assert Experiment.parse({"rules": {"stop_on": None}}).rules.stop_on == ()


@pytest.mark.parametrize(
    ("stop_on", "told"),
    [
        (["overfitt"], "no rule 'overfitt' that can stop a trial; did you mean overfit?"),
        (["class_imbalance"], "no rule 'class_imbalance' that can stop a trial"),
        ("overfit", "rules.stop_on must be a list of rules, got 'overfit'"),
        ([3], "no rule 3 that can stop a trial"),
        ({"overfit": True}, "must be a list of rules"),
    ],
)
def test_an_experiment_refuses_other_rules(stop_on: Any, told: str) -> None:
    with pytest.raises(ExperimentError, match=r"rules\.stop_on") as error:
        Experiment.parse({"rules": {"stop_on": stop_on}})
    assert told in str(error.value)


@pytest.mark.parametrize("counts", [None, (30, 5, 1), (30, 5, 0)])
def test_the_least_loss_is_what_a_perfect_model_has(counts: tuple[int, ...] | None) -> None:
    """Against torch: the logits of each class's images fitted until the loss falls no more."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts or (7, 7, 7)))
    weights = balanced_class_weights(labels, 3) if counts else None
    logits = torch.zeros(3, 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(
            logits[labels], labels, weight=weights, label_smoothing=0.3
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value

    bounds = loss_bounds(3, 0.3, balanced_counts=counts)
    assert bounds.guess == pytest.approx(loss().item(), rel=1e-5)
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    assert bounds.least == pytest.approx(loss().item(), rel=1e-4)


def test_a_trial_that_was_resumed_and_has_no_new_epoch_is_not_stalled() -> None:
    trial = TrialRecord(trial_id="t", configuration={}, attempt=1, state="running", started=0.0)
    trial.epochs = [EpochRecord(step=n, time=10.0 * n, attempt=1, metrics={}) for n in (1, 2)]
    record = SearchRecord(started={})
    assert RULES["stalled"](history_of_trial(record, trial, now=40_000.0)) is not None
    resumed = replace(trial, attempt=2)
    assert RULES["stalled"](history_of_trial(record, resumed, now=40_000.0)) is None


def test_what_a_training_waited_for_its_images_counts_for_a_single_one_alone() -> None:
    events = [
        {"event": "search_started", "search_id": "s", "trained_on": "train"},
        {"event": "images_ready", "seconds": 1500.0},
        {"event": "trial_started", "trial_id": "t", "attempt": 1, "configuration": {}, "time": 1.0},
        {"event": "search_resumed"},
        {"event": "images_ready", "seconds": 0.5},
    ]
    training = SearchRecord.of(events)
    assert history_of_trial(training, training.trials["t"]).preparation_seconds == 1500.0
    search = SearchRecord.of([{"event": "search_started", "search_id": "s"}, *events[1:]])
    assert history_of_trial(search, search.trials["t"]).preparation_seconds == 0.0


def test_the_head_of_a_staged_search_sees_no_mixed_images() -> None:
    started = {"experiment": {"training": MIXED}, "data": {"class_names": ["a", "b"]}}
    head, network = (
        TrialRecord(
            trial_id="t", configuration={}, attempt=1, state="running", started=0.0, stage=stage
        )
        for stage in ("head", "network")
    )
    record = SearchRecord(started=started)
    assert not history_of_trial(record, head).mixes_images
    assert history_of_trial(record, network).mixes_images


def test_logits_of_another_shape_are_no_predictions() -> None:
    with pytest.raises(ValueError, match="logits for 3 images"):
        Predictions.from_logits(np.zeros((2, 2)), np.zeros(3, np.int64), ("a", "b"))


def test_logits_become_probabilities() -> None:
    logits = np.log([[1.0, 3.0]]) + 1000  # large ones do not overflow
    of = Predictions.from_logits(logits, np.array([1]), ("a", "b"))
    assert of.probabilities[0].tolist() == pytest.approx([0.25, 0.75])
    assert of.accuracy == 1.0
    assert of.support().tolist() == [0, 1]


def test_logits_of_a_damaged_file_are_no_predictions(tmp_path: Path) -> None:
    path = tmp_path / "validation_logits.npy"
    np.save(path, np.zeros((3, 2), np.float32))
    whole, labels = path.read_bytes(), np.zeros(3, np.int64)
    assert Predictions.load(path, labels, ("a", "b")).accuracy == 1.0
    for damaged in (b"", whole[:-1], whole.replace(b"(3, 2)", b"(3, 2,")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="holds no logits"):
            Predictions.load(path, labels, ("a", "b"))
