"""Baselines, against scikit-learn used plainly."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_info

from visiontuner.errors import SearchInterrupted
from visiontuner.evaluation.baselines import (
    PENALTIES,
    is_affordable,
    logistic_regression,
    nearest_neighbours,
)


def clouds(images: int, classes: int, dim: int = 12, seed: int = 0):
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = 1.2 * generator.normal(size=(classes, dim))
    features = (centres[labels] + generator.normal(size=(images, dim))).astype(np.float32)
    return features, labels, np.arange(images) // classes % 4


@pytest.mark.parametrize(("images", "classes"), [(80, 4), (80, 2), (9, 3)])
def test_out_of_fold_answers_are_those_of_a_regression_without_the_fold(images, classes):
    features, labels, folds = clouds(images, classes)
    baseline = logistic_regression(features, labels, folds, num_classes=classes)
    assert baseline.logits.shape == (images, classes)
    scale = float((features.astype(np.float64) ** 2).sum(axis=1).mean())
    chosen = baseline.configuration["C"]
    assert chosen == pytest.approx(
        min((c / scale for c in PENALTIES), key=lambda c: abs(c - chosen)), rel=1e-3
    )
    for fold in np.unique(folds):
        own = folds == fold
        model = LogisticRegression(C=chosen, max_iter=5000, tol=1e-8)
        model.fit(features[~own], labels[~own])
        shares = np.exp(baseline.logits[own] - baseline.logits[own].max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        # The path is fitted less exactly than this model.
        assert np.abs(shares - model.predict_proba(features[own])).mean() < 0.02


def test_the_head_is_fitted_to_all_images_or_to_those_of_no_fold():
    features, labels, _ = clouds(60, 3)
    hold_out = np.where(np.arange(60) < 45, -1, 0)
    for refit, seen in ((True, np.ones(60, bool)), (False, hold_out < 0)):
        baseline = logistic_regression(features, labels, hold_out, num_classes=3, refit=refit)
        assert len(baseline.logits) == 15
        model = LogisticRegression(C=baseline.configuration["C"], max_iter=5000, tol=1e-8)
        model.fit(features[seen], labels[seen])
        logits = features @ baseline.weights.T + baseline.biases
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        assert np.abs(shares - model.predict_proba(features)).mean() < 0.02


def test_a_regression_ends_between_two_fits():
    features, labels, folds = clouds(40, 2)
    asked = []

    def stop_at_the_third():
        asked.append(None)
        if len(asked) == 3:
            raise SearchInterrupted("Stopped.")

    with pytest.raises(SearchInterrupted):
        logistic_regression(features, labels, folds, num_classes=2, between_fits=stop_at_the_third)
    assert len(asked) == 3


def test_products_take_one_thread_throughout_so_that_a_process_can_fork_beside_them():
    """OpenBLAS joins its threads in a fork, which waits forever for one that just got work."""
    features, labels, folds = clouds(80, 4)
    seen = set()

    def look():
        seen.update(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas")

    logistic_regression(features, labels, folds, num_classes=4, between_fits=look)
    assert seen == {1}


def test_a_class_without_an_image_is_never_answered():
    features, labels, folds = clouds(40, 2)
    baseline = logistic_regression(features, labels, folds, num_classes=3)
    assert set(baseline.logits.argmax(axis=1)) <= {0, 1}
    assert np.isfinite(baseline.logits).all()


def test_neighbours_are_those_of_other_folds():
    features, labels, folds = clouds(80, 4)
    baseline = nearest_neighbours(features, labels, folds, num_classes=4)
    k = baseline.configuration["neighbours"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for fold in np.unique(folds):
        own = folds == fold
        model = KNeighborsClassifier(k).fit(unit[~own], labels[~own])
        shares = model.predict_proba(unit[own])
        smoothed = np.log((k * shares + 1 / 4) / (k + 1))
        assert baseline.logits[own] == pytest.approx(smoothed, abs=1e-6)


def test_what_would_take_minutes_is_not_affordable():
    assert is_affordable(2_000, 1280, 133)
    assert not is_affordable(300_000, 1280, 1000)
