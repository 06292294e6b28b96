"""What the rules look at: the recorded numbers of one training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.training.recording.records import Recording
from visiontuner.training.rules.loss_bounds import LossBounds, loss_bounds


class Curve(NamedTuple):
    """One metric: steps (epochs from 1) in order, and a value for each."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def finite(self) -> Curve:
        """Without the points that are no numbers."""
        rows = [row for row in zip(self.steps, self.values, strict=True) if math.isfinite(row[1])]
        return Curve(tuple(s for s, _ in rows), tuple(v for _, v in rows))


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the best epoch said about the validation pictures.

    Attributes:
        probabilities: float, shape (N, C); rows sum to 1.
        labels: int64, shape (N,), values in [0, C).
        class_names: C names.
    """

    probabilities: NDArray[Any]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @classmethod
    def from_logits(
        cls, logits: NDArray[Any], labels: NDArray[np.int64], class_names: tuple[str, ...]
    ) -> Predictions:
        """Softmax over float logits (N, C).

        Raises:
            ValueError: the shapes do not fit each other.
        """
        if logits.shape != (len(labels), len(class_names)):
            raise ValueError(f"{logits.shape} logits for {len(labels)} pictures")
        shifted: NDArray[Any] = np.exp(logits - logits.max(axis=1, keepdims=True))
        return cls(
            probabilities=shifted / shifted.sum(axis=1, keepdims=True),
            labels=labels,
            class_names=class_names,
        )

    @classmethod
    def load(
        cls, path: Path, labels: NDArray[np.int64], class_names: tuple[str, ...]
    ) -> Predictions:
        """From the logits that a trial kept, `validation_logits.npy`.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or of other pictures.
        """
        try:
            return cls.from_logits(np.load(path, allow_pickle=False), labels, class_names)
        except OSError:
            raise
        except Exception as problem:  # numpy's parser has many for a damaged file
            raise ValueError(f"{path} holds no logits: {problem}") from None

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64, shape (N,)."""
        highest: NDArray[np.int64] = np.argmax(self.probabilities, axis=1)
        return highest

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.labels).mean())

    def support(self) -> NDArray[np.int64]:
        """Validation pictures of each class: int64, shape (C,)."""
        counts: NDArray[np.int64] = np.bincount(self.labels, minlength=len(self.class_names))
        return counts


@dataclass(frozen=True, kw_only=True)
class TrainingHistory:
    """The recorded numbers of one training; a rule uses what is there and passes over the rest.

    Attributes:
        metrics: curves under our own names (`docs/tracking.md`): `train_loss`, `validation_loss`,
            `train_accuracy`, `validation_accuracy`, `gradient_norm`, …
        configuration: what the training was told: `learning_rate`, `batch_size`, `class_weights`, …
        objective: name of the metric that chooses the best epoch.
        num_classes: if it is known; then ln(num_classes) is the loss of guessing.
        class_counts: training pictures of each class, in the order of `class_names`.
        predictions: on the validation pictures, if they were kept.
        times: seconds since the epoch at which the epochs were reported.
        attempts: which attempt of a training that was resumed reported each of them; empty if all
            are of one.
        now: the present time if the training still runs, else None.
        error: what ended a failed training.
        host: the machine it ran on, in a search on several.
        preparation_seconds: that went into its pictures before it started; 0 for a trial of a
            search, whose trials share them.
        recording: tensors, step times and the machine's use, if they were recorded.
    """

    metrics: Mapping[str, Curve] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "validation_accuracy"
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    predictions: Predictions | None = None
    times: tuple[float, ...] = ()
    attempts: tuple[int, ...] = ()
    now: float | None = None
    error: str | None = None
    recording: Recording | None = None
    host: str | None = None
    preparation_seconds: float = 0.0

    def curve(self, name: str) -> Curve:
        """The finite points of a metric; empty if it was not recorded."""
        return self.metrics.get(name, Curve()).finite()

    @property
    def guess_loss(self) -> float | None:
        """Cross-entropy of equal probabilities, ln(classes), in nats; None if they are unknown."""
        return math.log(self.num_classes) if self.num_classes and self.num_classes > 1 else None

    @property
    def training_bounds(self) -> LossBounds | None:
        """Where the training loss lies, label smoothing included; None if that is unknown."""
        if self.guess_loss is None or not self.num_classes:
            return None
        smoothing = self._smoothing
        if not smoothing or self.configuration.get("class_weights") != "balanced":
            return loss_bounds(self.num_classes, smoothing)
        counts = self.class_counts
        fits = len(counts) == self.num_classes and any(counts)
        return loss_bounds(self.num_classes, smoothing, balanced_counts=counts) if fits else None

    @property
    def train_loss_is_plain(self) -> bool:
        """Whether the training loss is a cross-entropy like validation's."""
        return not self._smoothing and not self.mixes_pictures

    @property
    def mixes_pictures(self) -> bool:
        """MixUp or CutMix: how low the training loss can be depends on what is drawn."""
        augmentation = self.configuration.get("augmentation") or {}
        return any(augmentation.get(name) for name in ("mixup", "cutmix"))

    @property
    def _smoothing(self) -> float:
        smoothing = self.configuration.get("label_smoothing") or 0.0
        return smoothing if isinstance(smoothing, float) and 0 <= smoothing < 1 else 0.0

    @property
    def last_step(self) -> int | None:
        steps = [curve.steps[-1] for curve in self.metrics.values() if curve.steps]
        return max(steps, default=None)

    def gaps(self) -> list[float]:
        """Seconds from each epoch to the next one; a break between two attempts is none."""
        attempts = self.attempts or (1,) * len(self.times)
        pairs = pairwise(zip(attempts, self.times, strict=False))
        return [b - a for (earlier, a), (later, b) in pairs if earlier == later]

    def settings(self) -> str:
        """`learning rate 0.003, batch size 128`, as far as it is known."""
        names = ("learning_rate", "batch_size")
        known = [(n.replace("_", " "), self.configuration[n]) for n in names if self._has(n)]
        return ", ".join(f"{name} {_short(value)}" for name, value in known)

    def _has(self, name: str) -> bool:
        return self.configuration.get(name) is not None


def history_of_trial(
    record: SearchRecord,
    trial: TrialRecord,
    *,
    predictions: Predictions | None = None,
    recording: Recording | None = None,
    now: float | None = None,
) -> TrainingHistory:
    """One trial of a search as its journal has it.

    Args:
        now: the present time in seconds since the epoch, if the trial still runs.
    """
    resumed = bool(trial.epochs) and trial.epochs[-1].attempt != trial.attempt
    data = record.started.get("data") or {}
    names = tuple(data.get("class_names") or ())
    counts = (data.get("class_counts") or {}).get("train") or ()
    training = record.started.get("experiment", {}).get("training", {})
    if trial.stage == "head":
        training = {**training, "augmentation": None}  # its features are of pictures as they are
    metrics = {name for epoch in trial.epochs for name in epoch.metrics}
    return TrainingHistory(
        metrics={name: _curve(trial, name) for name in sorted(metrics)},
        configuration={**training, **trial.configuration},
        objective=record.objective,
        num_classes=len(names) or None,
        class_names=names,
        class_counts=tuple(counts),
        predictions=predictions,
        recording=recording,
        times=tuple(epoch.time for epoch in trial.epochs),
        attempts=tuple(epoch.attempt for epoch in trial.epochs),
        now=None if resumed else now,  # its last epoch was before the break
        error=trial.error,
        host=trial.host,
        preparation_seconds=record.preparation_seconds if record.is_training else 0.0,
    )


def times_over(factor: float) -> str:
    """A factor in few digits, however large: `43`, `1.2e+30`."""
    return f"{factor:.0f}" if factor < 1e6 else f"{factor:.2g}"


def _curve(trial: TrialRecord, name: str) -> Curve:
    steps, values = trial.curve(name)
    return Curve(tuple(steps), tuple(values))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
