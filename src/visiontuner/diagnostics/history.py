"""What rules look at: the recorded numbers of one training, as arrays; without torch."""

from __future__ import annotations

import json
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontuner.diagnostics import thresholds as limits
from visiontuner.journal import SearchRecord, StageName, TrialRecord

# What was recorded of one training, as arrays; without torch, since rules and figures read it.
#
# trials/ID/recording.npz        the three records of a trial in one file, no pickle
# trials/ID/trace.json.gz        a profiler's trace of some steps, where one was asked for


Floats = NDArray[np.float32]

RECORDING_FILE = "recording.npz"
TRACE_FILE = "trace.json.gz"

# Weights are those before the step; a layer without a gradient (frozen, or unused) has NaN in the
# statistics of gradients and updates.
TENSOR_STATISTICS: Mapping[str, str] = {
    "weight_norm": "L2 norm of the layer's weight",
    "weight_std": "standard deviation of the layer's weight",
    "weight_absmax": "largest absolute value of the layer's weight",
    "weight_zeros": "share of exact zeros in the layer's weight",
    "weight_unchanged": "share of the weight that one step left within 1e-8 + 1e-5 x its value",
    "gradient_norm": "L2 norm of the weight's gradient, before clipping",
    "gradient_mean": "mean absolute value of the weight's gradient, before clipping",
    "gradient_absmax": "largest absolute value of the weight's gradient, before clipping",
    "gradient_zeros": "share of exact zeros in the weight's gradient",
    "gradient_nonfinite": "share of NaN and infinities in the weight's gradient",
    "update_norm": "L2 norm of what one step added to the weight",
    "update_mean": "mean absolute value of what one step added to the weight",
    "update_absmax": "largest absolute value of what one step added to the weight's sample",
    "update_ratio": "L2 norm of what one step added to the weight, by the weight's own norm",
    "activation_mean": "mean of the layer's output",
    "activation_std": "standard deviation of the layer's output",
    "activation_min": "smallest value of the layer's output",
    "activation_max": "largest value of the layer's output",
    "activation_zeros": "share of exact zeros in the layer's output",
    "activation_saturated": "share of a bounded activation's output in its flat parts",
    "activation_dead": "share of an activation's units that were at most 0 for the whole batch",
    "activation_nonfinite": "share of NaN and infinities in the layer's output",
}
"""Names of the statistics by layer; a share is in [0, 1]."""

STEP_PARTS = ("data", "to_device", "forward", "backward", "optimizer", "reporting")
"""What a training step's time is spent on, in the order of the columns of `StepRecord.seconds`."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """Statistics of the tensors of every layer, at some steps.

    Attributes:
        steps: int64, (S,), optimizer steps, from 1, counted through all epochs.
        layers: L names, in the order in which the layers first ran.
        kinds: L class names: `Conv2d`, `BatchNorm2d`, `ReLU`, …
        values: by name in `TENSOR_STATISTICS`, float32, (S, L); NaN where a layer has none.
        input_mean: float32, (S, C), of what entered the network, by channel.
        input_std: float32, (S, C).
        input_min: float32, (S,).
        input_max: float32, (S,).
        inputs: float16, (N, C, H, W): some of the first recorded batch, as they entered.
        notes: what could not be recorded, and why; a line each.
    """

    steps: NDArray[np.int64]
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: Mapping[str, Floats]
    input_mean: Floats
    input_std: Floats
    input_min: Floats
    input_max: Floats
    inputs: NDArray[np.float16]
    notes: tuple[str, ...] = ()

    def of(self, statistic: str) -> Floats:
        """Float32, (S, L); all NaN if it was not recorded."""
        missing = np.full((len(self.steps), len(self.layers)), np.nan, np.float32)
        return self.values.get(statistic, missing)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Where the time of training steps went.

    Attributes:
        steps: int64, (S,), optimizer steps, from 1; not every one in a long training.
        seconds: float32, (S, 6), by `STEP_PARTS`. On a GPU the parts are its own times.
        images: int64, (S,), in each step's batch.
        startup_seconds: from the training's start to its first step: network, loaders, first batch.
            Images were decoded, or features computed, before.
        device: `cpu` or the GPU's name.
        workers: processes that prepare images.
    """

    steps: NDArray[np.int64]
    seconds: Floats
    images: NDArray[np.int64]
    startup_seconds: float
    device: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class SystemRecord:
    """Use of the machine while the training ran.

    Attributes:
        times: float64, (T,), seconds since the epoch.
        values: by MLflow's names without `system/` (`cpu_utilization_percentage`,
            `system_memory_usage_megabytes`, `gpu_0_utilization_percentage`, …) and
            `process_memory_megabytes` of the training with its workers, without mapped files:
            float32, (T,).
    """

    times: NDArray[np.float64]
    values: Mapping[str, Floats]

    def of(self, name: str) -> Floats:
        """Float32, (T,); all NaN if it was not sampled."""
        return self.values.get(name, np.full(len(self.times), np.nan, np.float32))


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All that was recorded of one training; None for what was not."""

    tensors: TensorRecord | None = None
    steps: StepRecord | None = None
    system: SystemRecord | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a reader may want to know besides, small plain values, where they are known:

    `mean` and `std`, lists by channel: pixels in [0, 1] become network input by (x - mean) / std.
    `steps_per_epoch`: optimizer steps; findings name the epoch that a recorded step was in.
    """

    def save(self, path: Path) -> None:
        """Write one compressed file; a reader meets the old one or the new one, whole."""
        arrays: dict[str, NDArray[Any]] = {}
        words: dict[str, Any] = {"about": dict(self.about)}
        for name in ("tensors", "steps", "system"):
            record = getattr(self, name)
            if record is None:
                continue
            words[name] = {}
            for key, value in vars(record).items():
                if isinstance(value, np.ndarray):
                    arrays[f"{name}/{key}"] = value
                elif key == "values":
                    arrays |= {f"{name}/values/{each}": array for each, array in value.items()}
                else:
                    words[name][key] = value
        arrays["words"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """What `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is not one of ours.
        """
        try:
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
            words = json.loads(arrays.pop("words").tobytes())
            parts = {name: _fields(name, arrays, words) for name in words if name != "about"}
            return cls(
                tensors=TensorRecord(**parts["tensors"]) if "tensors" in parts else None,
                steps=StepRecord(**parts["steps"]) if "steps" in parts else None,
                system=SystemRecord(**parts["system"]) if "system" in parts else None,
                about=words["about"],
            )
        except OSError:
            raise
        except Exception as problem:  # zipfile, zlib and numpy have many for a damaged file
            raise ValueError(f"{path} is no recording of a training: {problem}") from None


def find_recording(folder: Path) -> Recording | None:
    """What was recorded of the trial whose folder this is; None where nothing can be read."""
    try:
        return Recording.load(folder / RECORDING_FILE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        logging.getLogger(__name__).info("%s", problem)
        return None


def _fields(name: str, arrays: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        key.removeprefix(f"{name}/"): array
        for key, array in arrays.items()
        if key.startswith(f"{name}/")
    }
    values = {
        key.removeprefix("values/"): array
        for key, array in own.items()
        if key.startswith("values/")
    }
    plain = {
        key.replace("picture", "image"): array  # as earlier versions called it
        for key, array in own.items()
        if not key.startswith("values/")
    }
    listed = {k: tuple(v) if isinstance(v, list) else v for k, v in words[name].items()}
    return plain | listed | ({"values": values} if name != "steps" else {})


# Where the training loss can lie: what a perfect model has, and what guessing gives.
#
# Without label smoothing these are 0 and ln(classes). Smoothing asks for shares of classes instead
# of labels, and no model has a loss below their entropy.


class LossBounds(NamedTuple):
    """In nats: of a model that knows every share exactly, and of one that finds all alike."""

    least: float
    guess: float


def loss_bounds(
    num_classes: int, smoothing: float, *, balanced_counts: Sequence[int] | None = None
) -> LossBounds:
    """The bounds of torch's cross-entropy with label smoothing.

    Args:
        smoothing: in [0, 1).
        balanced_counts: training images of each class, where the loss weights classes by their
            inverse; torch then weights the smoothed shares too.
    """
    counts = np.ones(num_classes) if balanced_counts is None else np.asarray(balanced_counts, float)
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)
    other = smoothing / num_classes * weights  # asked for of every other class, (C,)
    own = (1 - smoothing) * weights + other  # of an image's own, (C,)
    total = own + other.sum() - other
    # Of one image of each class: total x entropy of the shares that it is asked for.
    least = _x_log_x(total) - (_x_log_x(own) + _x_log_x(other).sum() - _x_log_x(other))
    share = counts / (counts * weights).sum()
    return LossBounds(
        max(0.0, float(share @ least)), float(share @ total) * float(np.log(num_classes))
    )


def _x_log_x(values: NDArray[Any]) -> NDArray[Any]:
    """0 where a value is 0."""
    found: NDArray[Any] = values * np.log(np.where(values > 0, values, 1.0))
    return found


# What the rules look at: the recorded numbers of one training.


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
    """What the best epoch said about the validation images.

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
            raise ValueError(f"{logits.shape} logits for {len(labels)} images")
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
            ValueError: it is damaged, or of other images.
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
        """Validation images of each class: int64, shape (C,)."""
        counts: NDArray[np.int64] = np.bincount(self.labels, minlength=len(self.class_names))
        return counts


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """What the best trial of a search has reached so far.

    Attributes:
        accuracy: the highest validation accuracy of any epoch of any trial.
        loss: the lowest validation loss of any epoch of any trial, in nats.
        learning_rate: of the trial with that accuracy.
    """

    accuracy: float
    loss: float
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingHistory:
    """The recorded numbers of one training; a rule uses what is there and passes over the rest.

    Attributes:
        metrics: curves under our own names (`docs/tracking.md`): `train_loss`, `validation_loss`,
            `train_accuracy`, `validation_accuracy`, `gradient_norm`, …
        configuration: what the training was told: `learning_rate`, `batch_size`, `class_weights`, …
        objective: name of the metric that chooses the best epoch.
        num_classes: if it is known; then ln(num_classes) is the loss of guessing.
        class_counts: training images of each class, in the order of `class_names`.
        predictions: on the validation images, if they were kept.
        times: seconds since the epoch at which the epochs were reported.
        attempts: which attempt of a training that was resumed reported each of them; empty if all
            are of one.
        now: the present time if the training still runs, else None.
        error: what ended a failed training.
        host: the machine it ran on, in a search on several.
        preparation_seconds: that went into its images before it started; 0 for a trial of a
            search, whose trials share them.
        recording: tensors, step times and the machine's use, if they were recorded.
        best: of its search and stage, this training included; None if it is alone.
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
    best: BestTrial | None = None

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
        return not self._smoothing and not self.mixes_images

    @property
    def mixes_images(self) -> bool:
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

    @property
    def stopped_early(self) -> bool:
        """Whether a scheduler, a rule or an interruption ended it before its last epoch."""
        epochs = self.configuration.get("epochs")
        if not isinstance(epochs, int | float) or self.configuration.get("early_stop"):
            return False  # unknown, as other tools may write it, or its own decision
        return len(self.curve("train_loss").values) < epochs

    @property
    def far_from_best(self) -> bool:
        """Whether another trial is so much better that this one's settings must be wrong."""
        accuracy = self.curve("validation_accuracy").values
        loss = self.curve("validation_loss").values
        if self.best is None or not accuracy or not loss:
            return False
        behind = self.best.accuracy - max(accuracy) > limits.FAR_ACCURACY
        return behind or min(loss) > limits.FAR_LOSS * self.best.loss

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
    best: BestTrial | None = None,
    now: float | None = None,
) -> TrainingHistory:
    """One trial of a search as its journal has it.

    Args:
        best: of its search and stage, see `best_trials`.
        now: the present time in seconds since the epoch, if the trial still runs.
    """
    resumed = bool(trial.epochs) and trial.epochs[-1].attempt != trial.attempt
    data = record.started.get("data") or {}
    names = tuple(data.get("class_names") or ())
    counts = (data.get("class_counts") or {}).get("train") or ()
    training = record.started.get("experiment", {}).get("training", {})
    if trial.stage == "head":
        training = {**training, "augmentation": None}  # its features are of images as they are
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
        best=best,
    )


def best_trials(record: SearchRecord) -> dict[StageName | None, BestTrial]:
    """By stage what its best trial has reached; stages without a validation are left out."""
    stages = {trial.stage for trial in record.trials.values()}
    best = {
        stage: best_of(trial for trial in record.trials.values() if trial.stage == stage)
        for stage in stages
    }
    return {stage: found for stage, found in best.items() if found is not None}


def best_of(trials: Iterable[TrialRecord], before: BestTrial | None = None) -> BestTrial | None:
    """What the best of some trials has reached, those that still run included.

    Args:
        before: what others have reached.
    """
    for trial in trials:
        _, accuracies = trial.curve("validation_accuracy")
        _, losses = trial.curve("validation_loss")
        if not accuracies or not losses:
            continue
        rate = trial.configuration.get("learning_rate")
        best = BestTrial(accuracy=max(accuracies), loss=min(losses), learning_rate=rate)
        if before is not None:
            higher = best if best.accuracy > before.accuracy else before
            best = replace(higher, loss=min(best.loss, before.loss))
        before = best
    return before


def times_over(factor: float) -> str:
    """A factor in few digits, however large: `43`, `1.2e+30`."""
    return f"{factor:.0f}" if factor < 1e6 else f"{factor:.2g}"


def _curve(trial: TrialRecord, name: str) -> Curve:
    steps, values = trial.curve(name)
    return Curve(tuple(steps), tuple(values))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# What rules on recordings share: which layers are meant, when, and how they are named.


Layers = NDArray[np.bool_]
"""One truth value a layer, (L,)."""

# A block may be called ConvNeXtBlock or LinearAttention, and a gate HardSigmoid.
CONVOLUTION = r"Conv(Transpose)?\dd"
LINEAR = r"Linear$"
NORM = r"Norm"

_NAMED = 3


def tensors_of(history: TrainingHistory) -> TensorRecord | None:
    """What was recorded of tensors; None where that is nothing."""
    record = history.recording.tensors if history.recording else None
    return record if record is not None and len(record.steps) and len(record.layers) else None


def lasting(holds: NDArray[np.bool_]) -> Layers:
    """Which layers it holds of, (S, L), at the last three recorded steps; none of fewer steps."""
    steps = limits.LAST_STEPS
    if len(holds) < steps:
        return np.zeros(holds.shape[1], bool)
    return np.asarray(holds[-steps:].all(axis=0))


def trained(record: TensorRecord) -> Layers:
    """Layers whose weight got a gradient at some step."""
    return np.asarray((~np.isnan(record.of("gradient_norm"))).any(axis=0))


def of_kind(record: TensorRecord, *patterns: str) -> Layers:
    """Layers in whose class name one of the patterns is found: `CONVOLUTION`, `LINEAR`, …"""
    found = re.compile("|".join(patterns)).search
    return np.array([found(kind) is not None for kind in record.kinds], bool)


def layer_name(record: TensorRecord, layer: int) -> str:
    """`backbone.layer1.0.conv1 (Conv2d)`."""
    return f"{record.layers[layer]} ({record.kinds[layer]})"


def named(record: TensorRecord, layers: Layers) -> str:
    """`first (Conv2d), relu (ReLU) and 3 more`, in the order in which they run."""
    found = np.flatnonzero(layers)
    names = ", ".join(layer_name(record, int(layer)) for layer in found[:_NAMED])
    return names + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def last_step(record: TensorRecord) -> int:
    return int(record.steps[-1])


def epoch_of(history: TrainingHistory, step: int) -> int | None:
    """The epoch, from 1, of an optimizer step, from 1; None if an epoch's length is unknown."""
    steps = history.recording.about.get("steps_per_epoch") if history.recording else None
    return (step - 1) // int(steps) + 1 if steps else None
