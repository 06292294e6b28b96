"""The learning rate range test: one short training in which the learning rate only grows.

The loss first stays where it is, then falls, then rises: where it falls is where to search. Source:
Smith 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3,
https://arxiv.org/abs/1506.01186; smoothing and stopping as in fastai's `lr_find`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import (
    Batches,
    failing_out_of_memory,
    join_last_single,
    needs_joining,
)
from visiontuner.training.loop import TrainingStep
from visiontuner.training.metrics import balanced_class_weights
from visiontuner.training.optimisation import ParameterGroup, make_optimizer

LOWEST, HIGHEST = 1e-6, 10.0
SMOOTHING = 0.9
STOP_AT = 4.0  # times the best smoothed loss
_FEWEST_STEPS = 20
# Shares of the whole fall: the range begins where it has begun, and ends where most of it is done.
# What is left of it, down to the lowest loss, is a small batch set being learned by heart.
_BEGUN, _DONE = 0.1, 0.9
# A fall smaller than this share of the first loss is noise.
_MIN_RELATIVE_FALL = 0.02


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What a range test proposes: one learning rate, and a range to search around it."""

    learning_rate: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The curve of a range test.

    Attributes:
        learning_rates: rising geometrically, one for each step that was made.
        losses: each step's own training loss, before the step.
        smoothed: their exponential mean, with bias correction.
        stopped: the loss grew to `STOP_AT` times its best before the highest learning rate.
        suggestion: None where the loss never fell.
        notes: a line for every time that memory ran out.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    stopped: bool
    suggestion: Suggestion | None
    notes: tuple[str, ...] = ()


def range_test(
    network: nn.Module,
    train: Batches,
    settings: Training,
    *,
    num_classes: int,
    seed: int,
    low: float = LOWEST,
    high: float = HIGHEST,
    steps: int = 100,
    parameter_groups: Sequence[ParameterGroup] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
) -> RangeTest:
    """Train `network` for at most `steps` steps, from learning rate `low` to `high`.

    The network is spoilt afterwards: throw it away.

    Args:
        low, high: of `training.learning_rate`; other parameter groups keep their ratio to it.
        parameter_groups: as `fit` takes them; default: every trained parameter alike.
        on_step: called with (step from 1, learning rate, smoothed loss).

    Raises:
        TrialFailed: the loss is not finite at the first step, or memory runs out.
    """
    _check_range(low, high, steps)
    torch.manual_seed(seed)
    optimizer = make_optimizer(network, settings, parameter_groups)
    rates = geometric(low, high, steps)
    take_step = TrainingStep(
        network,
        optimizer,
        _growing(optimizer, rates, settings),
        settings,
        class_weights=_class_weights(train, settings, num_classes),
    )
    network.train()
    joins = needs_joining(network, samples=len(train.labels), batch_size=settings.batch_size)
    batches = _endless(train, torch.Generator().manual_seed(seed), joins_last_single=joins)
    losses, stopped = _take_steps(take_step, islice(batches, steps), rates, settings, on_step)
    notes = tuple(take_step.micro_batches.take_notes())
    return _curve(rates, losses, stopped=stopped, notes=notes)


def _take_steps(
    take_step: TrainingStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    settings: Training,
    on_step: Callable[[int, float, float], None] | None,
) -> tuple[list[float], bool]:
    """The losses, and whether they ended before the batches: the loss had grown too much."""
    losses: list[float] = []
    for inputs, labels in batches:
        with failing_out_of_memory(settings.batch_size):
            loss = float(take_step(inputs, labels).loss)
        if not math.isfinite(loss):
            return losses, True
        losses.append(loss)
        smoothed = smooth(losses)
        if on_step is not None:
            on_step(len(losses), rates[len(losses) - 1], smoothed[-1])
        if smoothed[-1] > STOP_AT * min(smoothed):
            return losses, True
    return losses, False


def _curve(
    rates: Sequence[float], losses: Sequence[float], *, stopped: bool, notes: tuple[str, ...]
) -> RangeTest:
    if not losses:
        raise TrialFailed(
            "The loss is not finite before the first step. Look at the images "
            "(`visiontuner prepare --data DATA`) and at the backbone's weights."
        )
    made, smoothed = tuple(rates[: len(losses)]), tuple(smooth(losses))
    return RangeTest(
        learning_rates=made,
        losses=tuple(losses),
        smoothed=smoothed,
        stopped=stopped,
        suggestion=suggest(made, smoothed),
        notes=notes,
    )


def geometric(low: float, high: float, steps: int) -> list[float]:
    """`steps` learning rates from `low` to `high`, each the same factor above the last."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential mean with the bias correction of Adam: the first value is the first loss.

    Source: Kingma and Ba 2015, section 3, https://arxiv.org/abs/1412.6980
    """
    mean, means = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**count))
    return means


def suggest(learning_rates: Sequence[float], smoothed: Sequence[float]) -> Suggestion | None:
    """A learning rate and a range from the curve; None where the loss never fell.

    The range goes from where a tenth of the fall is done to where nine tenths are; the learning
    rate is where it falls most steeply over the logarithm of the learning rate.
    """
    values: NDArray[np.float64] = np.asarray(smoothed, dtype=np.float64)
    lowest = int(values.argmin())
    # The first values are means of a few steps, and noisy: their median is the level.
    start = float(np.median(values[: max(3, lowest // 4)]))
    fall = start - float(values[lowest])
    if lowest < 2 or fall < _MIN_RELATIVE_FALL * start:
        return None
    before = values[: lowest + 1]
    # The last place above the threshold: noise at the start must not count as a beginning.
    begun = int(np.flatnonzero(before >= start - _BEGUN * fall)[-1])
    after = before[begun:]
    done = begun + max(1, int(np.flatnonzero(after <= start - _DONE * fall)[0]))
    steepest = begun + int(np.argmin(np.gradient(before)[begun : done + 1]))
    return Suggestion(
        learning_rate=_two_digits(learning_rates[steepest]),
        low=_two_digits(learning_rates[begun]),
        high=_two_digits(learning_rates[done]),
    )


def _check_range(low: float, high: float, steps: int) -> None:
    if not 0 < low < high:
        raise ValueError(f"low must be > 0 and < high, got {low:g} and {high:g}")
    if steps < _FEWEST_STEPS:
        raise ValueError(f"steps must be >= {_FEWEST_STEPS}, got {steps}")


def _growing(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], settings: Training
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that gives step n the n-th rate; other groups keep their ratio to the first."""

    def factor(step: int) -> float:
        return rates[min(step, len(rates) - 1)] / settings.learning_rate

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _endless(
    train: Batches, order: torch.Generator, *, joins_last_single: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, each in an order of its own."""
    while True:
        batches = train.shuffled(order)
        yield from join_last_single(batches) if joins_last_single else batches


def _class_weights(train: Batches, settings: Training, num_classes: int) -> Tensor | None:
    if settings.class_weights == "none":
        return None
    return balanced_class_weights(train.labels, num_classes).to(train.labels.device)


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
