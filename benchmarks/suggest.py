"""Do the images that `visiontuner suggest` chooses teach more than images drawn at random?

dogs24, on cached features: some labels of each class are drawn, a regression is fitted to
them, and as many images again are labelled, chosen or drawn from the rest of the training and
validation images. A regression on both is judged on the test images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from measuring import Row, cache_of_its_own, photographs, report
from numpy.typing import NDArray
from suspects import Images, load_images

from visiontuner.evaluation.baselines import logistic_regression
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.suggestions import choose_images
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
    photographs(name)  # before anything is computed
    with cache_of_its_own():
        pool = load_images(name)
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


def _fit(pool: Images, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """A regression on some images: logits of all, and the accuracy on test."""
    folds = folds_of([pool.samples[row] for row in rows], FOLDS)
    fitted = logistic_regression(
        pool.features[rows], pool.labels[rows], folds, num_classes=pool.num_classes
    )
    weights, biases = np.asarray(fitted.weights), np.asarray(fitted.biases)
    answers = (pool.test_features @ weights.T + biases).argmax(axis=1)
    return pool.features @ weights.T + biases, float((answers == pool.test_labels).mean())


def _one(pool: Images, labels: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Accuracy with the first labels, with as many more drawn, and with as many chosen."""
    classes = [np.flatnonzero(pool.labels == label) for label in range(pool.num_classes)]
    first = np.concatenate([rng.choice(rows, labels, replace=False) for rows in classes])
    rest = np.setdiff1d(np.arange(len(pool.labels)), first)
    logits, before = _fit(pool, first)
    drawn = rng.choice(rest, len(first), replace=False)
    chosen = rest[choose_images(pool.features[rest], probabilities_of(logits[rest]), len(first))]
    return (
        before,
        _fit(pool, np.concatenate([first, drawn]))[1],
        _fit(pool, np.concatenate([first, chosen]))[1],
    )
