"""Rules on recorded trainings that once fooled them, and on those that they are made for.

`recorded_heads.json` holds heads on features of photographs of 24 dog breeds (EfficientNet-Lite0,
20 training images of each, all 60 where labels are wrong; 240 validation images): curves, and for
each validation image label and answer at the best epoch with the probabilities of both.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visiontuner.diagnostics.history import BestTrial, Curve, Predictions, TrainingHistory
from visiontuner.diagnostics.rules import diagnose_history, not_refuted

RECORDED = json.loads(Path(__file__).with_name("recorded_heads.json").read_text())
CLASSES = tuple(f"breed {i}" for i in range(24))
BEST = BestTrial(
    accuracy=max(RECORDED["best"]["curves"]["validation_accuracy"]),
    loss=min(RECORDED["best"]["curves"]["validation_loss"]),
    learning_rate=RECORDED["best"]["learning_rate"],
)


def recorded(name: str) -> TrainingHistory:
    head = RECORDED[name]
    steps = tuple(range(1, len(head["curves"]["train_loss"]) + 1))
    labels, predicted = np.array(head["labels"]), np.array(head["predicted"])
    rows, of_label = np.arange(len(labels)), np.array(head["of_label"])
    of_predicted = np.array(head["of_predicted"])
    named = of_predicted + np.where(predicted == labels, 0, of_label)
    unnamed = 24 - np.where(predicted == labels, 1, 2)
    table = np.repeat((np.clip(1 - named, 0, 1) / unnamed)[:, None], 24, axis=1)
    table[rows, labels], table[rows, predicted] = of_label, of_predicted
    falling = [0.5 * (1 + math.cos(math.pi * step / head["epochs"])) for step in steps]
    curves = {**head["curves"], "learning_rate": [head["learning_rate"] * f for f in falling]}
    return TrainingHistory(
        metrics={n: Curve(steps, tuple(values)) for n, values in curves.items()},
        configuration={
            "learning_rate": head["learning_rate"],
            "batch_size": head["batch_size"],
            "epochs": head["epochs"],
        },
        num_classes=24,
        class_names=CLASSES,
        class_counts=tuple(head["class_counts"]),
        predictions=Predictions(probabilities=table, labels=labels, class_names=CLASSES),
        best=BEST,
    )


def found(history: TrainingHistory) -> dict[str, Any]:
    return {finding.rule: finding for finding in diagnose_history(history)}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("learning rate 1e-5", "class_not_predicted"),
        ("stopped after 1 epoch", "class_not_predicted"),
        ("stopped after 2 epochs", "label_noise"),
        ("learning rate 0.1", "label_noise"),
    ],
)
def test_a_trial_that_learned_little_does_not_accuse_the_data(name: str, rule: str) -> None:
    history = recorded(name)
    assert rule not in found(history)
    alone = replace(history, best=None, configuration={})
    assert rule in found(alone)  # of what a single training recorded nothing else can be said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learning rate 1e-5", "(learning rate 1e-05, batch size 32), where another trial"),
        ("learning rate 0.1", "(learning rate 0.1, batch size 256), where another trial"),
    ],
)
def test_there_the_learning_rate_is_named(name: str, said: str) -> None:
    finding = found(recorded(name))["learning_rate_to_blame"]
    assert finding.severity == "info"
    assert said in finding.evidence
    assert "another trial with learning rate 0.003 reached 0.912" in finding.evidence


def test_later_trials_refute_what_the_first_one_said_of_the_data() -> None:
    history = recorded("learning rate 0.1")
    first = diagnose_history(replace(history, best=_its_own(history)))
    assert "label_noise" in {finding.rule for finding in first}
    kept = {finding.rule for finding in not_refuted(first, history)}
    assert kept == {finding.rule for finding in first} - {"label_noise"}


def test_a_trial_that_was_stopped_early_says_nothing_of_it() -> None:
    for name in ("stopped after 1 epoch", "stopped after 2 epochs"):
        assert "learning_rate_to_blame" not in found(recorded(name))


def test_the_best_trial_still_accuses_the_data() -> None:
    missing = recorded("a class without training images")
    ran = replace(missing, best=_its_own(missing))
    assert found(ran)["class_not_predicted"].severity == "error"
    noisy = recorded("a fifth of the labels wrong")
    # The lowest loss of this search was 1.34, at a third of this learning rate.
    noisy = replace(noisy, best=BestTrial(accuracy=0.775, loss=1.343, learning_rate=0.003))
    assert "label_noise" in found(noisy)
    assert "learning_rate_to_blame" not in found(noisy)


def _its_own(history: TrainingHistory) -> BestTrial:
    curves = (history.curve(f"validation_{name}").values for name in ("accuracy", "loss"))
    accuracy, loss = curves
    return BestTrial(accuracy=max(accuracy), loss=min(loss))


def test_the_end_of_a_cosine_is_no_overtraining() -> None:
    """Its loss rises from 0.36 to 0.49, its accuracy stays."""
    history = recorded("learning rate 0.03")
    assert "overtraining" not in found(history)
    steps = tuple(range(1, 21))
    constant = {**history.metrics, "learning_rate": Curve(steps, (0.03,) * 20)}
    assert "overtraining" in found(replace(history, metrics=constant))
    fell = (*history.curve("validation_accuracy").values[:-1], 0.85)
    lost = {**history.metrics, "validation_accuracy": Curve(steps, fell)}
    assert "overtraining" in found(replace(history, metrics=lost))


def test_the_best_trial_raises_nothing() -> None:
    assert found(recorded("best")) == {}
