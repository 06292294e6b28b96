"""Do the images that `visiontuner suggest` chooses teach more than images drawn at random?

dogs24, on cached features: some labels of each class are drawn, a regression is fitted to
them, and as many images again are labelled, chosen or drawn from the rest of the training and
validation images. A regression on both is judged on the test images.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from measuring import Row, photographs, report, scratch
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample
from visiontuner.evaluation.baselines import logistic_regression
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.suggestions import choose_images
from visiontuner.experiment.schema import Experiment
from visiontuner.model.features import compute_features
from visiontuner.model.onnx import make_engine
from visiontuner.workflow.inputs import Inputs, Silent
from visiontuner.workflow.selection import folds_of
from visiontuner.workflow.suggest import FOLDS

TARGETS = ("10 labels a class grown to 20: at least 1 point better than at random, of 10 seeds",)
SMALL = {"seeds": 1, "name": "flowers5"}
_SPLITS = ("train", "validation", "test")


def measure(*, seeds: int = 10, name: str = "dogs24", labels: int = 10) -> dict[str, Any]:
    """Args:
    seeds: draws of the first labels.
    labels: of each class, at first.
    """
    source = photographs(name)
    with scratch() as folder:
        os.environ.setdefault("VISIONTUNER_CACHE", str(folder))
        pool = _Pool(str(source))
    drawn = [_one(pool, labels, np.random.default_rng(seed)) for seed in range(seeds)]
    first, random, chosen = (np.array(column) for column in zip(*drawn, strict=True))
    gain = 100 * (chosen - random)
    error = gain.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else float("nan")
    row = Row(
        what=f"{name}: {labels} labels a class grown to {2 * labels}, {seeds} draws, test accuracy",
        target="chosen at least 1 point better than drawn",
        result=f"{first.mean():.4f} before, {random.mean():.4f} drawn, {chosen.mean():.4f} chosen: "
        f"{gain.mean():+.2f} points (standard error {error:.2f})",
        met=bool(gain.mean() >= 1),
    )
    return report([row], first=first.tolist(), random=random.tolist(), chosen=chosen.tolist())


class _Pool:
    """Features and labels of all images that could be labelled, and those of test."""

    def __init__(self, source: str) -> None:
        inputs = Inputs(Experiment.parse({"data": {"source": source}}), Silent())
        features = compute_features(
            inputs.dataset,
            backbone=inputs.backbone,
            engine=lambda: make_engine(inputs.backbone, precision="fp32", cache=inputs.cache),
            precision="fp32",
            cache=inputs.cache,
            splits=_SPLITS,
        )
        known = {sample.path: sample for of in inputs.dataset.splits.values() for sample in of}
        train, validation, test = (features.split(name) for name in _SPLITS)
        self.samples: list[Sample] = [known[path] for path in (*train.paths, *validation.paths)]
        self.features = np.concatenate([train.features, validation.features])
        self.labels = np.concatenate([train.labels, validation.labels])
        self.test_features, self.test_labels = np.array(test.features), test.labels
        self.num_classes = len(features.class_names)

    def fit(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
        """Logits of all images, and the accuracy on test."""
        folds = folds_of([self.samples[row] for row in rows], FOLDS)
        fitted = logistic_regression(
            self.features[rows], self.labels[rows], folds, num_classes=self.num_classes
        )
        weights, biases = np.asarray(fitted.weights), np.asarray(fitted.biases)
        answers = (self.test_features @ weights.T + biases).argmax(axis=1)
        return self.features @ weights.T + biases, float((answers == self.test_labels).mean())


def _one(pool: _Pool, labels: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Accuracy with the first labels, with as many more drawn, and with as many chosen."""
    classes = [np.flatnonzero(pool.labels == label) for label in range(pool.num_classes)]
    first = np.concatenate([rng.choice(rows, labels, replace=False) for rows in classes])
    rest = np.setdiff1d(np.arange(len(pool.labels)), first)
    logits, before = pool.fit(first)
    drawn = rng.choice(rest, len(first), replace=False)
    chosen = rest[choose_images(pool.features[rest], probabilities_of(logits[rest]), len(first))]
    return (
        before,
        pool.fit(np.concatenate([first, drawn]))[1],
        pool.fit(np.concatenate([first, chosen]))[1],
    )
