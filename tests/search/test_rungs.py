"""The worker's rungs are those of the scheduler that stops it."""

import pytest
from ray.tune.schedulers import ASHAScheduler

from visiontuner.experiment.schema import Experiment
from visiontuner.search.plan import Rungs, settle


@pytest.mark.parametrize("epochs", [1, 2, 3, 8, 9, 10, 20, 27, 54, 100])
def test_rungs_are_where_ray_compares(epochs):
    asha = {"training": {"epochs": epochs}, "search": {"scheduler": "asha"}}
    rungs = Rungs.of(Experiment.parse({"name": "x", **asha}))
    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=rungs.last,
        grace_period=rungs.first,
        reduction_factor=rungs.factor,
    )
    compared = {milestone for milestone, _ in scheduler._brackets[0]._rungs}
    assert {epoch for epoch in range(1, 2 * epochs) if epoch in rungs} == compared


def test_the_longest_trial_counts_where_epochs_are_searched():
    of = {"name": "x", "search": {"scheduler": "asha", "space": {"epochs": {"values": [4, 18]}}}}
    rungs = Rungs.of(Experiment.parse(of))
    assert [epoch for epoch in range(1, 30) if epoch in rungs] == [2, 6, 18]


@pytest.mark.parametrize(
    ("model", "search", "scheduler"),
    [
        ({}, {}, "none"),
        ({"train": "last_stage"}, {}, "asha"),
        ({"train": "last_stage"}, {"stages": {}}, "none"),
        ({}, {"scheduler": "asha"}, "asha"),
    ],
)
def test_networks_are_stopped_early_and_heads_are_not(model, search, scheduler):
    experiment = Experiment.parse({"name": "x", "model": model, "search": search})
    settled = settle(experiment, images=100, own_validation=True)
    assert settled.search.scheduler == scheduler


@pytest.mark.parametrize(
    ("data", "images", "own", "folds"),
    [
        ({}, 100, False, 10),
        ({}, 1000, False, 5),
        ({}, 3000, False, None),
        ({}, 100, True, None),
        ({"validation": "folds"}, 3000, True, 5),
        ({"validation": "folds", "folds": 3}, 100, False, 3),
        ({"validation": "holdout"}, 100, False, None),
    ],
)
def test_few_images_are_judged_by_folds_unless_validation_images_are_given(
    data, images, own, folds
):
    experiment = Experiment.parse({"name": "x", "data": data})
    settled = settle(experiment, images=images, own_validation=own).data
    assert (settled.validation, settled.folds) == ("folds" if folds else "holdout", folds)


def test_without_a_scheduler_there_are_none():
    assert Rungs.of(Experiment.parse({"name": "x", "search": {"scheduler": "none"}})) is None
