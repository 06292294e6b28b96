"""Callbacks of a training: told every part of every step, they change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Part = Literal["data", "to_device", "forward", "backward", "optimizer", "reporting"]
"""What a step's time is spent on: `recording.records.STEP_PARTS`."""


class TrainingCallback:
    """Called with every part of every training step; this base class does nothing.

    Nothing that is seen may be changed, and no random number drawn: a training with a callback
    gives the numbers of one without.
    """

    def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
        """Before the first batch of an epoch, from 1, is asked for."""

    def spent_on(self, part: Part) -> None:
        """What was done since this was last called, or since the epoch began, was this."""

    def step_begins(self, step: int, inputs: Tensor) -> None:
        """The batch of a step, from 1 through all epochs, is there: (B, …), on the device."""

    def passes_begin(self) -> None:
        """Before the first forward pass of a step; again if memory ran out and it is repeated."""

    def gradients_ready(self) -> None:
        """The whole batch's gradients are there, unclipped, and no weight has moved."""

    def weights_moved(self) -> None:
        """The optimizer has taken its step."""

    def step_ends(self) -> None:
        """Everything that belongs to a step is done."""

    def epoch_ends(self) -> None:
        """After the evaluation of an epoch."""


class TrainingCallbacks(TrainingCallback):
    """Several at once, told in order."""

    def __init__(self, callbacks: Sequence[TrainingCallback]) -> None:
        self._callbacks = tuple(callbacks)

    def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
        for callback in self._callbacks:
            callback.epoch_begins(epoch, steps_per_epoch)

    def spent_on(self, part: Part) -> None:
        for callback in self._callbacks:
            callback.spent_on(part)

    def step_begins(self, step: int, inputs: Tensor) -> None:
        for callback in self._callbacks:
            callback.step_begins(step, inputs)

    def passes_begin(self) -> None:
        for callback in self._callbacks:
            callback.passes_begin()

    def gradients_ready(self) -> None:
        for callback in self._callbacks:
            callback.gradients_ready()

    def weights_moved(self) -> None:
        for callback in self._callbacks:
            callback.weights_moved()

    def step_ends(self) -> None:
        for callback in self._callbacks:
            callback.step_ends()

    def epoch_ends(self) -> None:
        for callback in self._callbacks:
            callback.epoch_ends()
