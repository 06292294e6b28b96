"""Where a step's time goes: with a clock that is turned by hand, and in real trainings."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from visiontuner.diagnostics.history import STEP_PARTS
from visiontuner.diagnostics.recorder import StepTimes

CPU = torch.device("cpu")


class HandClock:
    """A GPU's kind: what was stamped can be read only when the device has come so far."""

    def __init__(self) -> None:
        self.now = 0.0
        self.device_is_at = float("inf")

    def stamp(self) -> float:
        return self.now

    def passed(self, stamp: float) -> bool:
        return stamp <= self.device_is_at

    def seconds(self, earlier: float, later: float) -> float:
        assert self.passed(later), "it would have waited for the device"
        return later - earlier


def take_step(times: StepTimes, clock: HandClock, number: int, *, images: int = 8) -> None:
    """One, two, … seconds for each part in turn."""
    for seconds, part in enumerate(STEP_PARTS, start=1):
        if part == "forward":
            times.step_begins(number, images)
        clock.now += seconds
        times.spent_on(part)
    times.step_ends()


def times_by_hand(**options) -> tuple[StepTimes, HandClock]:
    clock = HandClock()
    times = StepTimes(CPU, began=time.perf_counter(), workers=2, clock=clock, **options)
    times.epoch_begins()
    return times, clock


def test_each_part_gets_the_time_before_its_end():
    times, clock = times_by_hand()
    take_step(times, clock, 1)
    take_step(times, clock, 2, images=5)
    record = times.record()
    assert record.steps.tolist() == [1, 2]
    assert record.seconds.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    assert record.images.tolist() == [8, 5]
    assert (record.device, record.workers) == ("cpu", 2)


def test_parts_of_a_step_in_pieces_add_up():
    times, clock = times_by_hand()
    times.spent_on("data")
    times.step_begins(1, 8)
    for _ in range(3):
        clock.now += 2
        times.spent_on("forward")
        clock.now += 5
        times.spent_on("backward")
    times.step_ends()
    assert times.record().seconds[0].tolist() == [0, 0, 6, 15, 0, 0]


def test_what_is_done_aside_is_none_of_the_steps():
    times, clock = times_by_hand()
    times.spent_on("data")
    times.step_begins(1, 8)
    clock.now += 1
    with times.aside():
        clock.now += 100
    clock.now += 1
    times.spent_on("forward")
    times.step_ends()
    assert times.record().seconds[0].tolist() == [0, 0, 2, 0, 0, 0]


def test_a_device_that_is_behind_is_not_waited_for():
    times, clock = times_by_hand()
    clock.device_is_at = 0
    for number in (1, 2, 3):
        take_step(times, clock, number)
    assert times.record().steps.tolist() == []
    clock.device_is_at = 42  # 21 seconds a step
    take_step(times, clock, 4)
    assert times.record().steps.tolist() == [1, 2]


def test_the_last_steps_of_a_device_that_is_behind_are_kept():
    times, clock = times_by_hand()
    clock.device_is_at = 0
    for number in (1, 2, 3):
        take_step(times, clock, number)
    clock.device_is_at = clock.now  # evaluation waits for it
    times.epoch_ends()
    assert times.record().steps.tolist() == [1, 2, 3]


def test_an_epochs_evaluation_belongs_to_no_step():
    times, clock = times_by_hand()
    take_step(times, clock, 1)
    clock.now += 1000
    times.epoch_ends()
    times.epoch_begins()
    take_step(times, clock, 2)
    assert times.record().seconds.sum(axis=1).tolist() == [21, 21]
    assert times.other_seconds["evaluation"] > 0


def test_a_long_training_keeps_fewer_of_its_steps():
    times, clock = times_by_hand(most_steps=10)
    for number in range(1, 41):
        take_step(times, clock, number)
    record = times.record()
    assert record.steps.tolist() == [1, 8, 16, 24, 32, 40]
    assert len(record.seconds) == len(record.images) == 6


def test_going_on_drops_what_came_after_the_checkpoint():
    times, clock = times_by_hand()
    for number in (1, 2, 3, 4):
        take_step(times, clock, number)
    again, clock = times_by_hand()
    again.go_on(times.record(), until=2, every=1)
    take_step(again, clock, 3)
    assert again.record().steps.tolist() == [1, 2, 3]
    assert again.record().startup_seconds == times.record().startup_seconds


def test_nothing_is_recorded_of_nothing():
    times, _ = times_by_hand()
    record = times.record()
    assert record.seconds.shape == (0, len(STEP_PARTS))
    assert record.startup_seconds == 0


@pytest.mark.parametrize("part", STEP_PARTS)
def test_a_clock_of_this_machine_counts_seconds(part):
    times = StepTimes(CPU, began=time.perf_counter())
    times.epoch_begins()
    time.sleep(0.02)
    times.spent_on(part)
    times.step_begins(1, 1)
    times.step_ends()
    seconds = times.record().seconds[0]
    assert seconds[STEP_PARTS.index(part)] >= 0.02
    assert np.delete(seconds, STEP_PARTS.index(part)).sum() == 0
