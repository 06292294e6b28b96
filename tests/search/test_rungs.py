"""The worker's rungs are those of the scheduler that stops it."""

import pytest
from ray.tune.schedulers import ASHAScheduler

from visiontuner.experiment.schema import Experiment
from visiontuner.search.plan import Rungs


@pytest.mark.parametrize("epochs", [1, 2, 3, 8, 9, 10, 20, 27, 54, 100])
def test_rungs_are_where_ray_compares(epochs):
    rungs = Rungs.of(Experiment.parse({"name": "x", "training": {"epochs": epochs}}))
    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=rungs.last,
        grace_period=rungs.first,
        reduction_factor=rungs.factor,
    )
    compared = {milestone for milestone, _ in scheduler._brackets[0]._rungs}
    assert {epoch for epoch in range(1, 2 * epochs) if epoch in rungs} == compared


def test_the_longest_trial_counts_where_epochs_are_searched():
    of = {"name": "x", "search": {"space": {"epochs": {"values": [4, 18]}}}}
    rungs = Rungs.of(Experiment.parse(of))
    assert [epoch for epoch in range(1, 30) if epoch in rungs] == [2, 6, 18]


def test_without_a_scheduler_there_are_none():
    assert Rungs.of(Experiment.parse({"name": "x", "search": {"scheduler": "none"}})) is None
