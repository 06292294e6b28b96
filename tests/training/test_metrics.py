import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from visiontuner.training.metrics import balanced_class_weights, macro_f1, score

# torchmetrics, the reference, brings a package that says it uses an old way of naming its parts.
pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources is deprecated")


def test_scores_by_hand():
    # Two classes, logits 0 and ln 3: the softmax is 1/4 and 3/4.
    ln3 = float(torch.log(torch.tensor(3.0)))
    logits = torch.tensor([[0.0, ln3], [ln3, 0.0], [0.0, ln3]])
    scores = score(logits, torch.tensor([1, 0, 0]))
    assert scores.accuracy == pytest.approx(2 / 3)
    # -(ln 3/4 + ln 3/4 + ln 1/4) / 3
    assert scores.loss == pytest.approx(0.653884, abs=1e-5)
    # Class 0: TP 1, FN 1, FP 0 -> 2/3; class 1: TP 1, FP 1 -> 2/3.
    assert scores.macro_f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_classes", [2, 5, 40])
def test_scores_equal_torchmetrics(seed, num_classes):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, num_classes, generator=generator)
    # With 40 classes and 60 samples some classes never occur.
    labels = torch.randint(num_classes, (60,), generator=generator)
    scores = score(logits, labels)
    micro = multiclass_accuracy(logits, labels, num_classes=num_classes, average="micro")
    f1 = multiclass_f1_score(logits, labels, num_classes=num_classes, average="macro")
    assert scores.accuracy == pytest.approx(float(micro))
    assert scores.macro_f1 == pytest.approx(float(f1), abs=1e-6)
    assert scores.loss == pytest.approx(float(functional.cross_entropy(logits, labels)))


def test_macro_f1_leaves_out_classes_that_never_occur():
    labels = torch.tensor([0, 0, 1])
    assert macro_f1(labels, labels, num_classes=10) == 1.0


def test_an_empty_split_cannot_be_scored():
    with pytest.raises(ValueError, match="empty"):
        score(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0, 1, 2, 2], [1] * 99 + [0, 2]])
def test_class_weights_are_sklearns_balanced(labels):
    tensor = torch.tensor(labels)
    expected = compute_class_weight("balanced", classes=tensor.unique().numpy(), y=tensor.numpy())
    assert balanced_class_weights(tensor, 3).tolist() == pytest.approx(expected.tolist())


def test_a_class_without_samples_weighs_nothing():
    # 4 samples of 2 classes present: 4 / (2 * 3) and 4 / (2 * 1).
    weights = balanced_class_weights(torch.tensor([0, 0, 0, 2]), 4)
    assert weights.tolist() == pytest.approx([2 / 3, 0, 2, 0])
