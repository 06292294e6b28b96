"""Heads first, then the best of them as networks: what each stage runs, and after a kill."""

from typing import Any

import pytest

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.plan import (
    plan_stage,
    remaining_trials,
    stage_of,
    stages_of,
    starting_heads,
)
from visiontuner.search.space import draw_beforehand

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "scale": "log"},
    "batch_size": {"values": [32, 64]},
}


def experiment(*, trials: int = 4, stages: dict[str, Any] | None = None, **search: Any):
    stages = {"best": 2, "epochs": 3, **(stages or {})}
    search = {"trials": trials, "algorithm": "random", "space": SPACE, "stages": stages, **search}
    return Experiment.parse(
        {
            "name": "x",
            "model": {"train": "last_stage"},
            "training": {"augmentation": "strong", "epochs": 20},
            "search": search,
        }
    )


def record(chosen: Experiment, heads: dict[str, Any], networks: dict[str, Any] | None = None):
    """A journal whose heads and networks ended with these values; None: interrupted."""
    described = chosen.model_dump(mode="json")
    events: list[dict[str, Any]] = [
        {"event": "search_started", "search_id": "s", "experiment": described}
    ]
    drawn = draw_beforehand(chosen.head_stage())
    for trial_id, value in heads.items():
        configuration = drawn[int(trial_id[1:]) - 1]
        events += trial(trial_id, value, configuration=configuration, stage="head")
    for trial_id, value in (networks or {}).items():
        events += trial(trial_id, value, configuration={}, stage="network", starts_from="t0001")
    return SearchRecord.of(events)


def trial(trial_id: str, value: float | str | None, **started: Any) -> list[dict[str, Any]]:
    who = {"trial_id": trial_id, "attempt": 1, "time": 0.0}
    ended: dict[str, Any] = {"state": "completed", "best_epoch": 1, "best_value": value}
    if value is None:
        ended = {"state": "interrupted"}
    if isinstance(value, str):
        ended = {"state": value}
    return [
        {"event": "trial_started", **who, **started},
        {"event": "trial_ended", **who, **ended},
    ]


def test_without_stages_there_is_one_and_it_is_the_experiment():
    chosen = Experiment.parse({"name": "x", "model": {"train": "all"}})
    (only,) = stages_of(chosen)
    assert (only.name, only.experiment) == (None, chosen)
    assert only.on_images
    plan = plan_stage(only, SearchRecord())
    assert {planned.stage for planned in plan.known} == {None}
    assert "stage" not in plan.known[0].to_config()


def test_the_first_stage_searches_heads_on_features_and_the_second_trains_what_was_asked_for():
    head, network = stages_of(experiment())
    assert (head.name, network.name) == ("head", "network")
    assert (head.on_images, network.on_images) == (False, True)
    assert head.experiment.model.train == "head"
    assert head.experiment.training.epochs == 20
    assert network.experiment.model.train == "last_stage"
    assert network.experiment.training.epochs == 3
    assert network.experiment.search.scheduler == "none"
    assert not network.experiment.augmentation.is_off


def test_the_second_stage_takes_the_best_heads_and_those_of_first():
    rows = [{"learning_rate": 0.002, "batch_size": 32}, {"learning_rate": 0.02, "batch_size": 64}]
    chosen = experiment(trials=5, first=rows)
    held = record(
        chosen, {"t0001": 0.5, "t0002": 0.9, "t0003": 0.8, "t0004": 0.7, "t0005": "failed"}
    )
    assert [t.trial_id for t in starting_heads(chosen, held)] == ["t0002", "t0003", "t0001"]
    plan = plan_stage(stages_of(chosen)[1], held)
    assert [(p.trial_id, p.starts_from, p.attempt) for p in plan.known] == [
        ("t0006", "t0002", 1),
        ("t0007", "t0003", 1),
        ("t0008", "t0001", 1),
    ]
    assert [p.configuration for p in plan.known] == [
        held.trials[p.starts_from].configuration for p in plan.known
    ]
    assert plan.known[0].to_config()["stage"] == "network"


def test_the_stages_own_learning_rate_and_epochs_take_the_place_of_the_heads():
    space = {**SPACE, "epochs": {"values": [10, 20]}}
    chosen = experiment(space=space, stages={"learning_rate": 0.0005}, first=[])
    held = record(chosen, {"t0001": 0.5, "t0002": 0.9, "t0003": 0.8, "t0004": 0.7})
    configuration = plan_stage(stages_of(chosen)[1], held).known[0].configuration
    assert configuration["learning_rate"] == 0.0005
    assert configuration["epochs"] == 3
    assert configuration["batch_size"] == held.trials["t0002"].configuration["batch_size"]


def test_a_searched_value_that_is_not_in_the_space_is_given_to_networks_too():
    chosen = experiment(
        space={"batch_size": {"values": [32, 64]}}, stages={"learning_rate": 0.0005}, first=[]
    )
    held = record(chosen, dict.fromkeys(["t0001", "t0002", "t0003", "t0004"], 0.5))
    known = plan_stage(stages_of(chosen)[1], held).known
    assert all(planned.configuration["learning_rate"] == 0.0005 for planned in known)


def test_a_resumed_second_stage_runs_what_has_not_finished_under_the_same_names():
    chosen = experiment(stages={"best": 4}, first=[])
    heads = {"t0001": 0.9, "t0002": 0.8, "t0003": 0.7, "t0004": 0.6}
    held = record(chosen, heads, {"t0005": 0.99, "t0006": None})
    plan = plan_stage(stages_of(chosen)[1], held)
    assert [(p.trial_id, p.attempt, p.starts_from) for p in plan.known] == [
        ("t0006", 2, "t0002"),
        ("t0007", 1, "t0003"),
        ("t0008", 1, "t0004"),
    ]
    assert plan_stage(stages_of(chosen)[0], held).remaining == 0
    assert remaining_trials(chosen, held) == 3
    whole = record(chosen, heads, dict.fromkeys(["t0005", "t0006", "t0007", "t0008"], 0.5))
    assert remaining_trials(chosen, whole) == 0


def test_a_resumed_first_stage_counts_the_second_with_the_most_it_may_have():
    chosen = experiment(first=[{"learning_rate": 0.002, "batch_size": 32}])
    held = record(chosen, {"t0001": 0.5, "t0002": None})
    plan = plan_stage(stages_of(chosen)[0], held)
    assert [(p.trial_id, p.attempt, p.stage) for p in plan.known] == [
        ("t0002", 2, "head"),
        ("t0003", 1, "head"),
        ("t0004", 1, "head"),
    ]
    assert remaining_trials(chosen, held) == 3 + 2 + 1


def test_without_a_usable_head_there_is_nothing_to_go_on_with():
    chosen = experiment(trials=1)
    assert remaining_trials(chosen, record(chosen, {"t0001": "failed"})) == 0


@pytest.mark.parametrize(("stage", "epochs"), [("head", 20), ("network", 3)])
def test_a_trials_epochs_and_stage_are_known_from_the_journal(stage, epochs):
    chosen = experiment()
    held = record(chosen, {"t0001": 0.5}, {"t0005": 0.6})
    asked = held.trials["t0001" if stage == "head" else "t0005"]
    assert held.epochs_of(asked) == epochs
    assert stage_of(chosen, asked).name == stage


def test_the_best_is_the_best_of_both_stages_and_the_space_was_searched_by_the_first():
    chosen = experiment()
    held = record(chosen, {"t0001": 0.5, "t0002": 0.7}, {"t0005": 0.6})
    assert held.best is not None
    assert held.best.trial_id == "t0002"
    assert sorted(held.searching().trials) == ["t0001", "t0002"]
    better = record(chosen, {"t0001": 0.5, "t0002": 0.7}, {"t0005": 0.8})
    assert better.best is not None
    assert better.best.trial_id == "t0005"


def epochs_of_attempts(*attempts: list[int]) -> list[tuple[int, int]]:
    """(step, attempt) of the epochs that a trial has after attempts with these steps."""
    events: list[dict[str, Any]] = []
    for attempt, steps in enumerate(attempts, start=1):
        who = {"trial_id": "t0001", "attempt": attempt, "time": 0.0}
        events += [
            {"event": "search_resumed", "search_id": "s", "time": 0.0},
            {"event": "trial_started", **who, "configuration": {}},
            *({"event": "epoch", **who, "step": step, "metrics": {}} for step in steps),
        ]
    trial = SearchRecord.of(events).trials["t0001"]
    return [(epoch.step, epoch.attempt) for epoch in trial.epochs]


def test_a_trial_that_went_on_from_a_checkpoint_keeps_the_epochs_before_it():
    assert epochs_of_attempts([1, 2, 3], [3, 4]) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    # Killed again before its first epoch, and a third time.
    assert epochs_of_attempts([1, 2], [], [3], [4]) == [(1, 1), (2, 1), (3, 3), (4, 4)]


def test_a_trial_that_began_anew_has_its_last_attempts_epochs_alone():
    assert epochs_of_attempts([1, 2, 3], [1]) == [(1, 2)]
    assert epochs_of_attempts([1, 2, 3], []) == []
