"""Heads side by side, each blind to a fold: the same as trained apart, on what it may see."""

import numpy as np
import pytest
import torch

from visiontuner.data.folds import assign_folds, folds_for
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.cross_validation import FoldedBatches, FoldedHead
from visiontuner.training.loop import Fit, linear_head

CLASSES, DIM, FOLDS = 3, 6, 4
IMAGES = 48
FOLD_OF = torch.arange(IMAGES) // 4 % FOLDS


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the images are of the first class, in every fold."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 1, 2]).repeat(IMAGES // 4)
    centres = 2 * torch.eye(CLASSES, DIM)
    return centres[labels] + torch.randn(IMAGES, DIM, generator=generator), labels


def folded(settings: Training) -> list:
    features, labels = points()
    batches = FoldedBatches(features, labels, FOLD_OF, batch_size=settings.batch_size)
    head = FoldedHead(linear_head(DIM, CLASSES, dropout=settings.dropout, seed=7), FOLDS)
    return list(Fit(head, batches, batches, settings, num_classes=CLASSES, seed=7).epochs())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"class_weights": "balanced"},
        {"label_smoothing": 0.2},
        {"gradient_clip": 0.05},
        {"optimizer": "sgd"},
        {"ema_decay": 0.9},
    ],
)
def test_an_out_of_fold_answer_is_that_of_a_head_trained_without_the_fold(change):
    """Whole-set steps, in which the batches of a head without its fold are the same."""
    settings = Training(epochs=8, batch_size=IMAGES, learning_rate=0.1, **change)
    logits = folded(settings)[-1].validation_logits
    features, labels = points()
    for fold in range(FOLDS):
        own = fold == FOLD_OF
        alone = Fit(
            linear_head(DIM, CLASSES, dropout=0.0, seed=7),
            FeatureBatches(features[~own], labels[~own], batch_size=IMAGES),
            FeatureBatches(features[own], labels[own], batch_size=IMAGES),
            settings,
            num_classes=CLASSES,
            seed=7,
        )
        expected = list(alone.epochs())[-1].validation_logits
        assert torch.allclose(logits[own], expected, atol=1e-4)


def test_an_image_has_no_say_in_its_own_answer():
    """With its label swapped, an image's own out-of-fold logits stay what they were."""
    settings = Training(epochs=3, batch_size=8, learning_rate=0.1)
    features, labels = points()
    answers = []
    for changed in (labels, torch.where(torch.arange(IMAGES) == 5, (labels + 1) % CLASSES, labels)):
        batches = FoldedBatches(features, changed, FOLD_OF, batch_size=8)
        head = FoldedHead(linear_head(DIM, CLASSES, dropout=0.0, seed=7), FOLDS)
        training = Fit(head, batches, batches, settings, num_classes=CLASSES, seed=7)
        answers.append(list(training.epochs())[-1].validation_logits)
    assert torch.equal(answers[0][5], answers[1][5])
    assert not torch.equal(answers[0][0], answers[1][0])


def test_the_numbers_of_an_epoch_are_means_over_all_images_with_the_spread_of_the_folds():
    last = folded(Training(epochs=3, batch_size=8, learning_rate=0.05))[-1]
    _, labels = points()
    right = (last.validation_logits.argmax(dim=1) == labels).double()
    by_fold = torch.stack([right[fold == FOLD_OF].mean() for fold in range(FOLDS)])
    assert last.metrics.validation_accuracy == pytest.approx(float(right.mean()))
    assert last.metrics.validation_accuracy_spread == pytest.approx(float(by_fold.std()))
    assert 0 <= last.metrics.train_accuracy <= 1


def test_a_batch_in_pieces_gives_the_numbers_of_a_whole_one():
    whole, pieces = (
        folded(Training(epochs=3, batch_size=20, learning_rate=0.05, micro_batch_size=size))[-1]
        for size in (None, 7)
    )
    assert torch.allclose(whole.validation_logits, pieces.validation_logits, atol=1e-5)
    assert whole.metrics.train_loss == pytest.approx(pieces.metrics.train_loss, abs=1e-5)


def test_folds_hold_every_class_alike_and_do_not_depend_on_the_order():
    labels = np.repeat([0, 1, 2], [20, 9, 6])
    digests = [f"{row * 7919 % 1000:04}" for row in range(35)]
    folds = assign_folds(labels, digests, folds=5)
    counts = np.array([np.bincount(folds[labels == label], minlength=5) for label in range(3)])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    assert np.ptp(np.bincount(folds)) == 0
    order = np.random.default_rng(0).permutation(35)
    again = assign_folds(labels[order], [digests[i] for i in order], folds=5)
    assert np.array_equal(again, folds[order])


def test_a_group_is_never_parted():
    groups = [f"dog {row // 3}" if row < 30 else f"cat {row}" for row in range(40)]
    folds = assign_folds(np.arange(40) % 2, [f"{row:02}" for row in range(40)], folds=5,
                         groups=groups)  # fmt: skip
    for group in set(groups):
        assert len({folds[row] for row in range(40) if groups[row] == group}) == 1
    assert set(folds) == set(range(5))


def test_small_sets_get_ten_folds_larger_ones_five_and_large_ones_a_hold_out():
    assert [folds_for(n) for n in (6, 54, 500, 501, 2000, 2001)] == [6, 10, 10, 5, 5, None]
    with pytest.raises(ValueError, match="5 folds of 3 images"):
        assign_folds([0, 1, 0], ["a", "b", "c"], folds=5)
