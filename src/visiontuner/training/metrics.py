"""From logits and labels to the numbers of one evaluation.

Every search worker imports this before its first trial. torchmetrics imports torchvision and the
compiler with it, several seconds a worker, so the two scores a trial needs are written out here and
held against torchmetrics by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Loss in nats an image; accuracy and macro F1 as fractions in [0, 1]."""

    loss: float
    accuracy: float
    macro_f1: float


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Plain cross-entropy, top-1 accuracy and macro F1.

    The loss has neither label smoothing nor class weights, so that trials which train with them
    can be compared.

    Args:
        logits: float, shape (num_samples, num_classes).
        labels: int64, shape (num_samples,), values in [0, num_classes).

    Raises:
        ValueError: if there are no samples.
    """
    if len(labels) == 0:
        raise ValueError("cannot score an empty split")
    predicted = logits.argmax(dim=1)
    return Scores(
        loss=float(functional.cross_entropy(logits, labels)),
        accuracy=int((predicted == labels).sum()) / len(labels),
        macro_f1=macro_f1(predicted, labels, num_classes=logits.shape[1]),
    )


def macro_f1(predicted: Tensor, labels: Tensor, *, num_classes: int) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN).

    Classes that occur neither in `labels` nor in `predicted` are left out, as in torchmetrics.

    Args:
        predicted: int64, shape (num_samples,), values in [0, num_classes).
        labels: the same.
    """
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes)
    seen = torch.bincount(labels, minlength=num_classes)
    seen = seen + torch.bincount(predicted, minlength=num_classes)  # 2 TP + FP + FN
    present = seen > 0
    return float((2 * hits[present] / seen[present]).mean())


def balanced_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights that give every class the same say: num_samples / (num_classes present * count).

    Returns:
        float32, shape (num_classes,); 0 for a class without samples.

    Source: King and Zeng 2001; `class_weight="balanced"` of scikit-learn.
    """
    counts = torch.bincount(labels, minlength=num_classes).float()
    present = int((counts > 0).sum())
    return torch.where(counts > 0, len(labels) / (present * counts.clamp(min=1)), 0.0)
