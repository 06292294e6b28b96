"""What a search is compared with: logistic regression and nearest neighbours on the same features.

They are judged by the same images as the trials: by folds, or by the validation images, which then
are the one fold, and training images are of none (-1). Both take seconds, and no torch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from visiontuner.evaluation.calibration import image_losses

REGRESSION = "logistic_regression"
NEIGHBOURS = "nearest_neighbours"

# C in units of one over the mean squared length of the features, whose scale backbones differ in.
# On photographs 10^2.5 to 10^4.5 were chosen; smaller values are no better for fewer images.
PENALTIES = tuple(10**exponent for exponent in np.arange(1.5, 5.51, 0.5))
_FIXED_PENALTY = PENALTIES[3]
_NEIGHBOURS = (1, 3, 5, 10, 20)
# Products of numbers that a fit takes about: 4e7 were 0.1 s on one core.
_MOST_WORK = 5e9
_NEVER = -100.0  # bias of a class without an image: it is never answered
_MOST_NEIGHBOURS = 20_000  # images: their similarities are its square


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """A baseline's answers to the images that trials are judged by.

    Args:
        name: `REGRESSION` or `NEIGHBOURS`.
        configuration: what was chosen for it.
        logits: float64, shape (M, C), of the M images with a fold, in order.
        path_losses, path_correct: shape (M, P), of all values that were tried, for the correction
            of the estimate; None where nothing was.
        weights, biases: float32, (C, D) and (C,), fitted to all images; None if it is no head.
        seconds: what it took.
    """

    name: str
    configuration: Mapping[str, Any]
    logits: NDArray[np.float64]
    seconds: float
    path_losses: NDArray[np.float64] | None = field(default=None, repr=False)
    path_correct: NDArray[np.bool_] | None = field(default=None, repr=False)
    weights: NDArray[np.float32] | None = field(default=None, repr=False)
    biases: NDArray[np.float32] | None = field(default=None, repr=False)


def is_affordable(images: int, feature_dim: int, classes: int) -> bool:
    """Whether baselines take seconds rather than minutes."""
    return float(images) * feature_dim * classes <= _MOST_WORK and images <= _MOST_NEIGHBOURS


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """All matrix products of this process on one thread.

    A second thread gains nothing on products of 20 ms, and threads that wait for one another beside
    other programs took 17 times as long. And baselines are computed while Ray starts, which forks:
    a fork joins OpenBLAS's threads, and waits forever for one that is given work meanwhile
    (https://github.com/OpenMathLib/OpenBLAS/issues/2270).
    """
    # A second to import, which a search need not wait for as it begins. It brings SciPy's own
    # OpenBLAS, so it comes first.
    import sklearn.linear_model  # noqa: F401

    with threadpool_limits(limits=1):
        yield


@_one_blas_thread()
def logistic_regression(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
    *,
    num_classes: int,
    refit: bool = True,
    between_fits: Callable[[], None] = lambda: None,
) -> Baseline:
    """scikit-learn's, with the C of a path that has the lowest loss on the judging images.

    Args:
        features: float32, shape (N, D).
        labels: int64, shape (N,).
        folds: int64, shape (N,): which part of the path an image is judged by, -1 for none.
        refit: fit the weights to all images; otherwise to those of no fold.
        between_fits: called before each of some fifty fits; what it raises ends them.
    """
    began = time.monotonic()
    judged = folds >= 0
    penalties = [float(c) / _mean_square(features) for c in PENALTIES]
    answers = np.empty((len(penalties), len(labels), num_classes))
    for fold in range(int(folds.max()) + 1):
        own = folds == fold
        for place, (weights, biases) in enumerate(
            _path(features[~own], labels[~own], penalties, num_classes, between_fits)
        ):
            answers[place, own] = features[own] @ weights.T + biases
    answers, truth = answers[:, judged], labels[judged]
    losses = np.stack([image_losses(logits, truth) for logits in answers], axis=1)
    best = int(losses.mean(axis=0).argmin())
    chosen = np.ones(len(labels), dtype=bool) if refit else ~judged
    path = _path(features[chosen], labels[chosen], penalties[: best + 1], num_classes, between_fits)
    weights, biases = path[-1]
    return Baseline(
        name=REGRESSION,
        configuration={"C": float(f"{penalties[best]:.4g}")},
        logits=answers[best],
        path_losses=losses,
        path_correct=truth[:, None] == answers.argmax(axis=2).T,
        weights=weights.astype(np.float32),
        biases=biases.astype(np.float32),
        seconds=time.monotonic() - began,
    )


@_one_blas_thread()
def fixed_regression(
    features: NDArray[np.float32], labels: NDArray[np.int64], *, num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """scikit-learn's, with a C in the middle of the path: nothing is chosen by other images.

    Args:
        features: float32, shape (N, D).
        labels: int64, shape (N,).

    Returns:
        Weights (C, D) and biases (C,); a class without an image is never answered.
    """
    penalty = float(_FIXED_PENALTY) / _mean_square(features)
    return _path(features, labels, [penalty], num_classes)[0]


@_one_blas_thread()
def nearest_neighbours(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
    *,
    num_classes: int,
) -> Baseline:
    """Smoothed shares of the classes among the k most similar images (cosine) of other folds.

    Args: as of `logistic_regression`.
    """
    began = time.monotonic()
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    judged = np.flatnonzero(folds >= 0)
    logits = np.empty((len(_NEIGHBOURS), len(judged), num_classes))
    for start in range(0, len(judged), 1024):
        rows = judged[start : start + 1024]
        similar = unit[rows] @ unit.T
        similar[folds[rows][:, None] == folds[None]] = -np.inf
        nearest = np.argsort(-similar, axis=1, kind="stable")[:, : max(_NEIGHBOURS)]
        votes = np.eye(num_classes)[labels[nearest]].cumsum(axis=1)  # (rows, k, C)
        for place, k in enumerate(_NEIGHBOURS):
            seen = votes[:, min(k, votes.shape[1]) - 1]
            shares = (seen + 1 / num_classes) / (seen.sum(axis=1, keepdims=True) + 1)
            logits[place, start : start + len(rows)] = np.log(shares)
    truth = labels[judged]
    losses = [image_losses(answers, truth).mean() for answers in logits]
    best = int(np.argmin(losses))
    return Baseline(
        name=NEIGHBOURS,
        configuration={"neighbours": _NEIGHBOURS[best]},
        logits=logits[best],
        seconds=time.monotonic() - began,
    )


def _mean_square(features: NDArray[np.float32]) -> float:
    square = float(np.einsum("nd,nd->n", features, features).mean())
    return square or 1.0


def _path(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    penalties: list[float],
    num_classes: int,
    between_fits: Callable[[], None] = lambda: None,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Weights (C, D) and biases (C,) for each C; each fit begins where the last one ended.

    A penalised regression's weights lie in the span of its images, so fewer images than features
    are first written in a basis of that span: the same answer from a smaller problem.
    """
    from sklearn.linear_model import LogisticRegression  # a second; see above

    values = features.astype(np.float64)
    basis = None
    if values.shape[0] < values.shape[1]:
        basis = np.linalg.qr(values.T)[0]  # (D, N)
        values = values @ basis
    present = np.unique(labels)
    heads = []
    model = LogisticRegression(max_iter=500, tol=1e-3, warm_start=True)
    for penalty in penalties:
        between_fits()
        weights, biases = np.zeros((1, values.shape[1])), np.zeros(1)
        if len(present) > 1:
            with warnings.catch_warnings():
                # The loss on other images decides.
                warnings.filterwarnings("ignore", "lbfgs failed to converge")
                model.set_params(C=penalty).fit(values, labels)
            weights, biases = model.coef_, model.intercept_
        if len(present) == 2:  # one score: the second class against the first
            weights, biases = np.concatenate([0 * weights, weights]), np.array([0, biases[0]])
        weights = weights if basis is None else weights @ basis.T
        head = np.zeros((num_classes, features.shape[1])), np.full(num_classes, _NEVER)
        head[0][present], head[1][present] = weights, biases
        heads.append(head)
    return heads
