"""Epochs -> EpochResult: one training loop, for feature vectors and for pictures.

`fit` knows neither Ray nor MLflow: it yields after every epoch and stops when it is no longer
asked. `Fit` is the same with a state that can be saved between two epochs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visiontuner.errors import TrialFailed
from visiontuner.experiment import Training
from visiontuner.training.batches import (
    Batches,
    FeatureBatches,
    join_last_single,
    needs_joining,
)
from visiontuner.training.ema import WeightAverage
from visiontuner.training.evaluate import evaluate
from visiontuner.training.metrics import balanced_class_weights
from visiontuner.training.micro_batches import MicroBatches, failing_out_of_memory
from visiontuner.training.optimisation import (
    ParameterGroup,
    make_optimizer,
    make_schedule,
)
from visiontuner.training.results import EpochResult, StepDone, StepLoss
from visiontuner.training.state import (
    identity_of,
    load_optimizer,
    random_state,
    require_fitting,
    require_same,
    set_random_state,
)
from visiontuner.training.step import TrainingStep
from visiontuner.training.train_epoch import Trained, train_epoch
from visiontuner.training.watch import Watch

__all__ = [
    "Batches",
    "EpochResult",
    "FeatureBatches",
    "Fit",
    "StepDone",
    "StepLoss",
    "evaluate",
    "fit",
    "linear_head",
    "make_optimizer",
    "make_schedule",
]


def linear_head(feature_dim: int, num_classes: int, *, dropout: float, seed: int) -> nn.Sequential:
    """Dropout and one linear layer, initialised from the seed alone.

    Maps float32 (B, feature_dim) to logits (B, num_classes); the layer is `head[1]`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, num_classes))


def fit(
    network: nn.Module,
    train: Batches,
    validation: Batches,
    settings: Training,
    *,
    num_classes: int,
    seed: int,
    objective: str = "validation_accuracy",
    mode: Literal["min", "max"] = "max",
    parameter_groups: Sequence[ParameterGroup] | None = None,
) -> Iterator[EpochResult]:
    """Train `network` in place and yield once an epoch; `Fit` says more."""
    yield from Fit(
        network,
        train,
        validation,
        settings,
        num_classes=num_classes,
        seed=seed,
        objective=objective,
        mode=mode,
        parameter_groups=parameter_groups,
    ).epochs()


class Fit:
    """One training: `epochs()` runs it, `state_dict()` between two epochs is all it needs to go on.

    The same seed gives the same numbers on the same machine with the same number of threads, and so
    does a training that was interrupted and went on from its state.

    Args:
        network: trained in place, on the device of `train`'s batches. Its convolutions' weights
            are laid out channels last.
        parameter_groups: learning rates and decays of parts of the network; default: one group.
        on_step: called after every optimizer step.
        watch: told what is done within a step.

    Raises:
        ExperimentError: nothing of the network is trained.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Batches,
        validation: Batches,
        settings: Training,
        *,
        num_classes: int,
        seed: int,
        objective: str = "validation_accuracy",
        mode: Literal["min", "max"] = "max",
        parameter_groups: Sequence[ParameterGroup] | None = None,
        on_step: Callable[[StepDone], None] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.settings = settings
        self.epoch = 0
        """Whole epochs trained so far."""
        self._train, self._validation = train, validation
        self._num_classes, self._seed = num_classes, seed
        self._identity = identity_of(settings, seed=seed, num_classes=num_classes) | {
            "objective": objective
        }
        self._objective, self._sign = objective, 1 if mode == "max" else -1
        self._on_step, self._watch = on_step, watch or Watch()
        self._best, self._epochs_without_better = -math.inf, 0
        self._order = torch.Generator().manual_seed(seed)
        self._random: dict[str, Tensor] | None = None
        self._joins_last_single = needs_joining(
            network, samples=len(train.labels), batch_size=settings.batch_size
        )
        self.steps_per_epoch = (
            math.ceil(len(train.labels) / settings.batch_size) - self._joins_last_single
        )
        decay = settings.ema_decay
        self._average = None if decay is None else WeightAverage(network, decay)
        self._step = self._make_step(parameter_groups)
        self._evaluation = MicroBatches(None, where="evaluation")

    def _make_step(self, parameter_groups: Sequence[ParameterGroup] | None) -> TrainingStep:
        settings, labels = self.settings, self._train.labels
        optimizer = make_optimizer(self.network, settings, parameter_groups)
        steps = self.steps_per_epoch * settings.epochs
        weights = (
            balanced_class_weights(labels, self._num_classes).to(self._device)
            if settings.class_weights == "balanced"
            else None
        )
        return TrainingStep(
            self.network,
            optimizer,
            make_schedule(optimizer, settings, total_steps=steps),
            settings,
            class_weights=weights,
            average=self._average,
            watch=self._watch,
        )

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `early_stop` of them without a better one."""
        patience = self.settings.early_stop
        stopped = patience is not None and self._epochs_without_better >= patience
        return stopped or self.epoch >= self.settings.epochs

    def epochs(self) -> Iterator[EpochResult]:
        """Train on from the last whole epoch, and yield once an epoch.

        Raises:
            TrialFailed: the loss is not finite (the message has the epoch and the learning rate),
                or one picture is more than memory holds.
        """
        while not self.finished:
            with failing_out_of_memory(self.settings.batch_size):
                result = self._run_epoch()
            yield result

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: tensors, numbers and text in plain containers.

        The tensors are the live ones, so save or copy them before the next epoch.
        """
        return {
            "identity": self._identity,
            "epoch": self.epoch,
            "best": self._best if self.epoch else None,
            "epochs_without_better": self._epochs_without_better,
            "network": dict(self.network.state_dict()),
            "average": None if self._average is None else dict(self._average.state_dict()),
            "optimizer": self._step.optimizer.state_dict(),
            "schedule": self._step.schedule.state_dict(),
            "order": self._order.get_state(),
            "random": self._random,
            "micro_batch_size": self._step.micro_batches.size,
            "evaluation_batch_size": self._evaluation.size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: it is of another network or was made with other settings.
        """
        require_same(state["identity"], self._identity)
        require_fitting(state["network"], self.network)
        self.network.load_state_dict(state["network"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        load_optimizer(self._step.optimizer, state["optimizer"])
        self._step.schedule.load_state_dict(dict(state["schedule"]))
        self._order.set_state(state["order"].cpu())
        self._random = state["random"]
        self.epoch = state["epoch"]
        self._best = -math.inf if state["best"] is None else state["best"]
        self._epochs_without_better = state["epochs_without_better"]
        self._step.micro_batches.limit(state["micro_batch_size"])
        self._evaluation.limit(state["evaluation_batch_size"])

    def _run_epoch(self) -> EpochResult:
        if self._random is None:
            torch.manual_seed(self._seed)  # dropout draws from the global generator
        else:  # whatever was drawn between two epochs
            set_random_state(self._random, self._device)
        epoch, started = self.epoch + 1, time.perf_counter()
        self._watch.epoch_begins(epoch, self.steps_per_epoch)
        trained = self._train_epoch()
        _require_finite(trained.loss, "training loss", epoch, trained.learning_rate)
        seconds = time.perf_counter() - started
        network = self.network if self._average is None else self._average.module
        logits, scores = evaluate(network, self._validation, self._evaluation)
        self._watch.epoch_ends()
        _require_finite(scores.loss, "validation loss", epoch, trained.learning_rate)
        metrics = trained.joined_with(scores, seconds=seconds)
        is_best = self._count(self._sign * metrics.to_dict()[self._objective])
        self.epoch = epoch
        self._random = random_state(self._device)
        return EpochResult(
            epoch=epoch,
            metrics=metrics,
            is_best=is_best,
            validation_logits=logits,
            network=network,
            step_losses=trained.step_losses,
            notes=(*self._step.micro_batches.take_notes(), *self._evaluation.take_notes()),
        )

    def _count(self, value: float) -> bool:
        """Whether this epoch's value is the best so far."""
        is_best = value > self._best
        self._best = max(self._best, value)
        self._epochs_without_better = 0 if is_best else self._epochs_without_better + 1
        return is_best

    def _train_epoch(self) -> Trained:
        batches: Iterable[tuple[Tensor, Tensor]] = self._train.shuffled(self._order)
        if self._joins_last_single:
            batches = join_last_single(batches)
        return train_epoch(
            self._step,
            batches,
            epoch=self.epoch + 1,
            steps_per_epoch=self.steps_per_epoch,
            log_every_steps=self.settings.log_every_steps,
            on_step=self._on_step,
        )

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def _require_finite(loss: float, what: str, epoch: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise TrialFailed(
            f"The {what} is {loss} in epoch {epoch} at learning rate {learning_rate:.3g}; "
            "try a smaller learning rate.",
            comes_back=True,
        )
