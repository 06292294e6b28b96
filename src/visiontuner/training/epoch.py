"""The numbers of one epoch, without torch: the driver of a search reads them, workers make them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """The numbers of one epoch; `docs/tracking.md` describes each."""

    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    validation_macro_f1: float
    learning_rate: float
    gradient_norm: float
    epoch_seconds: float
    images_per_second: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
