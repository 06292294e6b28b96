"""Who watches a training from within: it is told every part of every step, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Part = Literal["data", "to_device", "forward", "backward", "optimizer", "reporting"]
"""What a step's time is spent on: `recording.records.STEP_PARTS`."""


class Watch:
    """Told what a training does, as it does it; this one takes no notice.

    Nothing that is seen may be changed, and no random number drawn: a training that is watched
    gives the numbers of one that is not.
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


class Watches(Watch):
    """Several at once, told in order."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = tuple(watches)

    def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
        for watch in self._watches:
            watch.epoch_begins(epoch, steps_per_epoch)

    def spent_on(self, part: Part) -> None:
        for watch in self._watches:
            watch.spent_on(part)

    def step_begins(self, step: int, inputs: Tensor) -> None:
        for watch in self._watches:
            watch.step_begins(step, inputs)

    def passes_begin(self) -> None:
        for watch in self._watches:
            watch.passes_begin()

    def gradients_ready(self) -> None:
        for watch in self._watches:
            watch.gradients_ready()

    def weights_moved(self) -> None:
        for watch in self._watches:
            watch.weights_moved()

    def step_ends(self) -> None:
        for watch in self._watches:
            watch.step_ends()

    def epoch_ends(self) -> None:
        for watch in self._watches:
            watch.epoch_ends()
