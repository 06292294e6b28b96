"""What a search takes over from an earlier one, worked out by hand."""

import math
import statistics
from typing import Any

import pytest

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.plan import make_plan
from visiontuner.search.space import Suggester, WarmStart, draw_beforehand
from visiontuner.search.warm_start import take_over

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "scale": "log"},
    "batch_size": {"values": [32, 64]},
}


def experiment(**sections: Any) -> Experiment:
    search = {"trials": 8, "algorithm": "optuna", "space": SPACE, **sections.pop("search", {})}
    training = {"batch_size": 32, **sections.pop("training", {})}
    return Experiment.parse({"name": "x", "search": search, "training": training, **sections})


def searched(chosen: Experiment, *trials: tuple[dict[str, Any], float]) -> SearchRecord:
    """The journal of a search whose trials had these configurations and values."""
    raw = chosen.model_dump(mode="json")
    events: list[dict[str, Any]] = [
        {"event": "search_started", "search_id": "s", "experiment": raw}
    ]
    for number, (configuration, value) in enumerate(trials, start=1):
        head = {"trial_id": f"t{number:04d}", "attempt": 1, "time": 0.0}
        events += [
            {"event": "trial_started", **head, "configuration": configuration},
            {"event": "epoch", **head, "step": 1, "metrics": {chosen.objective: value}},
            {
                "event": "trial_ended", **head, "state": "completed", "best_epoch": 1,
                "best_value": value,
            },
        ]  # fmt: skip
    return SearchRecord.of(events)


def rate(learning_rate: float, batch_size: int = 32, **others: Any) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "batch_size": batch_size, **others}


OLD = searched(
    experiment(),
    (rate(0.001), 0.7),
    (rate(0.01), 0.9),
    (rate(0.02, 64), 0.8),
    (rate(0.05), 0.6),
    (rate(0.09), 0.5),
)


def test_the_three_best_are_tried_after_the_defaults_and_all_are_told():
    taken = take_over(OLD, experiment(), experiment(), same_classes=True)
    assert taken.first_trials == ("t0002", "t0003", "t0001")
    assert taken.start.first == (rate(0.01), rate(0.02, 64), rate(0.001))
    assert [(t.trial_id, t.value) for t in taken.start.told] == [
        ("t0001", 0.7), ("t0002", 0.9), ("t0003", 0.8), ("t0004", 0.6), ("t0005", 0.5),
    ]  # fmt: skip
    assert taken.notes == (
        "Tried first: the defaults, then the configurations of t0002, t0003, t0001.",
        "Optuna is told its 5 trials.",
    )


def test_the_lowest_loss_is_the_best_and_the_worse_half_is_not_tried():
    chosen = experiment(objective="validation_loss")
    record = searched(chosen, (rate(0.001), 0.7), (rate(0.01), 0.9), (rate(0.02), 0.3))
    assert take_over(record, chosen, chosen, same_classes=True).first_trials == (
        "t0003", "t0001",
    )  # fmt: skip


def test_what_lies_outside_the_space_is_left_out():
    space = {
        "learning_rate": {"low": 0.005, "high": 0.06, "scale": "log"},
        "batch_size": {"values": [32]},
    }
    taken = take_over(OLD, experiment(), experiment(search={"space": space}), same_classes=True)
    assert taken.first_trials == ("t0002",)  # t0004 is of the worse half
    assert [t.trial_id for t in taken.start.told] == ["t0002", "t0004"]
    assert "2 of its 5 trials; 3 are outside the search space." in taken.notes[1]


def test_a_name_that_only_the_new_space_has_gets_what_the_earlier_search_had_fixed():
    space = {**SPACE, "optimizer": {"values": ["adamw", "sgd"]}}
    old = experiment(training={"optimizer": "sgd"})
    taken = take_over(OLD, old, experiment(search={"space": space}), same_classes=True)
    assert taken.start.first[0] == rate(0.01, optimizer="sgd")
    assert taken.start.told[0].configuration == rate(0.001, optimizer="sgd")
    without = {**SPACE, "optimizer": {"values": ["adamw"]}}
    assert (
        take_over(OLD, old, experiment(search={"space": without}), same_classes=True).start
        == WarmStart()
    )


def test_a_name_that_only_the_earlier_space_has_is_dropped():
    old = experiment(search={"space": {**SPACE, "dropout": {"values": [0.0, 0.5]}}})
    record = searched(old, (rate(0.01, dropout=0.5), 0.9), (rate(0.01, dropout=0.0), 0.8))
    taken = take_over(record, old, experiment(), same_classes=True)
    assert taken.start.first == (rate(0.01),)  # once
    assert [t.configuration for t in taken.start.told] == [rate(0.01), rate(0.01)]


@pytest.mark.parametrize(
    ("changes", "same_classes", "reason"),
    [
        ({}, False, "the classes are others"),
        ({"objective": "validation_loss"}, True, "the objective was validation_accuracy and is"),
        ({"model": {"backbone": "resnet50"}}, True, "the network was efficientnet_lite0 and is"),
        ({"model": {"train": "last_stage"}}, True, "model.train was head and is last_stage"),
        ({"model": {"image_size": 96}}, True, "model.image_size was None and is 96"),
    ],
)
def test_values_that_mean_something_else_are_not_told_and_configurations_stay(
    changes, same_classes, reason
):
    taken = take_over(OLD, experiment(), experiment(**changes), same_classes=same_classes)
    assert taken.first_trials == ("t0002", "t0003", "t0001")
    assert taken.start.told == ()
    assert f"told none of its trials: {reason}" in taken.notes[1]


def test_other_training_is_told_and_said():
    taken = take_over(OLD, experiment(), experiment(training={"epochs": 5}), same_classes=True)
    assert len(taken.start.told) == 5
    assert taken.notes[2] == "They were trained otherwise: epochs 20, now 5."


def with_start(chosen: Experiment, start: WarmStart, *trials: Any) -> SearchRecord:
    record = searched(chosen, *trials)
    record.started["from"] = {"description": "searches/old", **start.to_dict()}
    return record


START = take_over(OLD, experiment(), experiment(), same_classes=True).start


def test_a_plan_begins_with_the_defaults_and_then_what_was_taken_over():
    chosen = experiment()
    plan = make_plan(chosen, with_start(chosen, START))
    defaults = chosen.first_trials()
    assert [p.configuration for p in plan.known] == [*defaults, *START.first]
    assert plan.suggestions == 8 - len(defaults) - 3
    # Resumed: the journal alone says what is left.
    resumed = make_plan(
        chosen, with_start(chosen, START, (defaults[0], 0.5), (START.first[0], 0.9))
    )
    assert [p.configuration for p in resumed.known] == list(START.first[1:])
    few = experiment(search={"trials": 2})
    assert make_plan(few, with_start(few, START)).remaining == 2


def test_a_random_search_begins_with_them_and_draws_other_values_than_the_earlier_one():
    chosen = experiment(search={"algorithm": "random"})
    taken = take_over(OLD, experiment(), chosen, same_classes=True)
    assert taken.start.told == ()
    drawn = draw_beforehand(chosen, taken.start)
    assert drawn[1:4] == list(taken.start.first)
    assert len(drawn) == 8
    assert not {c["learning_rate"] for c in drawn[4:]} & {
        c["learning_rate"] for c in draw_beforehand(chosen)
    }


def test_a_grid_runs_them_first_and_nothing_twice():
    space = {"learning_rate": {"values": [0.001, 0.01, 0.02]}, "batch_size": {"values": [32, 64]}}
    chosen = experiment(search={"algorithm": "grid", "space": space})
    taken = take_over(OLD, experiment(), chosen, same_classes=True)
    drawn = draw_beforehand(chosen, taken.start)
    assert drawn[:3] == [rate(0.01), rate(0.02, 64), rate(0.001)]
    assert len(drawn) == 6 == len({tuple(c.items()) for c in drawn})


def test_told_trials_lead_optuna_to_where_they_were_good():
    """25 trials, the better the nearer to 0.01: suggestions come nearer than without them."""
    rates = [1e-4 * 10 ** (3 * step / 24) for step in range(25)]
    trials = [(rate(r), 1.0 - abs(math.log10(r / 0.01))) for r in rates]
    chosen = experiment()
    start = take_over(searched(chosen, *trials), chosen, chosen, same_classes=True).start
    medians = []
    for known in (start, WarmStart()):
        suggester = Suggester(chosen, start=known)
        asked = [suggester.ask(f"t{n}")["learning_rate"] for n in range(40)]
        medians.append(statistics.median(abs(math.log10(value / 0.01)) for value in asked))
    # In decades of the space's three; 0.41 and 0.67 with this seed.
    assert medians[0] < 0.75 * medians[1]


def test_each_of_several_networks_gets_its_own():
    networks = ["resnet18", "efficientnet_lite0"]
    space = {**SPACE, "backbone": {"values": networks}}
    chosen = experiment(search={"space": space})
    record = searched(
        chosen,
        (rate(0.01, backbone="resnet18"), 0.9),
        (rate(0.02, backbone="efficientnet_lite0"), 0.8),
    )
    start = take_over(record, chosen, chosen, same_classes=True).start
    own = start.for_backbone("resnet18")
    assert own.first == (rate(0.01),)  # the better half of two
    assert [t.configuration for t in own.told] == [rate(0.01)]
    # One network alone: the trials of the other are not told.
    taken = take_over(record, chosen, experiment(), same_classes=True)
    assert taken.first_trials == ("t0001",)
    assert [t.trial_id for t in taken.start.told] == ["t0002"]
    assert "1 are of other networks" in taken.notes[1]
