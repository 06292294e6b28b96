"""Real trainings: made to fail they raise their error, healthy ones raise none.

Features are the digits' 64 pixels seen through 256 fixed random ReLU units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from visiontuner.diagnostics.history import Curve, Predictions, TrainingHistory
from visiontuner.diagnostics.rules import diagnose_history
from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import fit, linear_head

CLASSES = tuple("0123456789")
BEST = 0.01  # of 0.0003 to 0.1; 0.97 in validation


class Split(NamedTuple):
    features: np.ndarray
    labels: np.ndarray

    def only(self, rows: np.ndarray) -> Split:
        return Split(self.features[rows], self.labels[rows])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a product takes longer on several threads, and much longer on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(7)
    hidden = np.maximum(pixels / 16 @ rng.normal(size=(64, 256)) / 8**0.5, 0)
    order = rng.permutation(len(labels))
    every = Split(hidden.astype(np.float32), labels.astype(np.int64)).only(order)
    return every.only(np.arange(1400)), every.only(np.arange(1400, 1797))


def findings(train: Split, valid: Split, **settings: Any) -> dict[str, str]:
    """Severity by rule after a real training."""
    training = Training(**{"learning_rate": BEST, "epochs": 20, **settings})
    batches = [
        FeatureBatches(*map(torch.from_numpy, split), batch_size=training.batch_size)
        for split in (train, valid)
    ]
    epochs: list[Mapping[str, float]] = []
    logits, error = None, None
    try:
        for result in fit(linear_head(256, 10, dropout=0, seed=7), *batches, training,
                          num_classes=10, seed=7):  # fmt: skip
            epochs.append(result.metrics.to_dict())
            logits = result.validation_logits.numpy() if result.is_kept else logits
    except TrialFailed as failure:
        error = str(failure)
    steps = tuple(range(1, len(epochs) + 1))
    history = TrainingHistory(
        metrics={n: Curve(steps, tuple(e[n] for e in epochs)) for n in (epochs or [{}])[0]},
        configuration=training.model_dump(),
        num_classes=10,
        class_names=CLASSES,
        class_counts=tuple(np.bincount(train.labels, minlength=10).tolist()),
        predictions=None
        if logits is None
        else Predictions.from_logits(logits, valid.labels, CLASSES),
        error=error,
    )
    return {finding.rule: finding.severity for finding in diagnose_history(history)}


@pytest.mark.parametrize(
    ("rate", "rule"),
    [
        (1000 * BEST, "learning_rate_too_high"),
        (BEST / 1000, "learning_rate_too_low"),
        (1e-9, "loss_not_decreasing"),
        (1e30, "not_a_number"),
    ],
)
def test_a_wrong_learning_rate(splits, rate, rule):
    assert findings(*splits, learning_rate=rate).get(rule) == "error"


def test_shuffled_labels(splits):
    train, valid = splits
    shuffled = Split(train.features, np.random.default_rng(7).permutation(train.labels))
    assert findings(shuffled, valid).get("label_noise") == "error"


def test_a_class_without_training_images(splits):
    train, valid = splits
    assert findings(train.only(train.labels != 3), valid).get("class_not_predicted") == "error"


def test_ninety_percent_of_one_class(splits):
    train, valid = splits
    one, others = np.flatnonzero(train.labels == 0), np.flatnonzero(train.labels != 0)
    rows = np.concatenate([one, others[: len(one) // 9]])
    assert findings(train.only(rows), valid).get("class_imbalance") == "error"


def test_two_hundred_epochs_on_fifty_images(splits):
    train, valid = splits
    found = findings(train.only(np.arange(50)), valid, epochs=200, batch_size=16)
    assert "error" in (found.get("overfit"), found.get("overtraining"))


def test_healthy_trainings_raise_no_error(splits):
    for number, rate in enumerate(BEST * 3 ** np.linspace(-1, 1, 8)):
        found = findings(
            *splits, learning_rate=float(rate), batch_size=(64, 128, 256)[number % 3], epochs=8
        )
        assert "error" not in found.values(), (rate, found)


@pytest.mark.parametrize("smoothing", [0.1, 0.4, 0.8])
def test_smoothed_labels_are_no_error(splits, smoothing):
    """The training loss stays far above validation's; with 0.4 it ends at 1.45 of 2.3."""
    found = findings(*splits, label_smoothing=smoothing, epochs=40)
    assert "error" not in found.values(), found


def test_a_thousandth_of_the_learning_rate_is_found_with_smoothed_labels_too(splits):
    found = findings(*splits, learning_rate=BEST / 1000, label_smoothing=0.4)
    assert found.get("learning_rate_too_low") == "error"
