from typing import Any

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.plan import make_plan, trial_name
from visiontuner.search.space import draw_beforehand


def experiment(trials: int = 5, algorithm: str = "random", **search: Any) -> Experiment:
    search = {"trials": trials, "algorithm": algorithm, **search}
    return Experiment.parse({"name": "x", "search": search})


def record(chosen: Experiment, states: dict[str, str], values: dict[str, float] | None = None):
    """A journal in which these trials, of the drawn configurations, ended so."""
    events: list[dict[str, Any]] = [
        {"event": "search_started", "search_id": "s", "experiment": chosen.model_dump(mode="json")}
    ]
    drawn = draw_beforehand(chosen)
    for trial_id, state in states.items():
        head = {"trial_id": trial_id, "attempt": 1, "time": 0.0}
        configuration = drawn[int(trial_id[1:]) - 1]
        events.append({"event": "trial_started", **head, "configuration": configuration})
        value = (values or {}).get(trial_id, 0.5)
        metrics = {"validation_accuracy": value}
        events.append({"event": "epoch", **head, "step": 1, "metrics": metrics})
        if state != "running":
            ended = {"state": state, "best_epoch": 1, "best_value": value}
            events.append({"event": "trial_ended", **head, **ended})
    return SearchRecord.of(events)


def test_a_fresh_search_plans_what_was_drawn():
    chosen = experiment()
    plan = make_plan(chosen, SearchRecord())
    assert [p.trial_id for p in plan.known] == ["t0001", "t0002", "t0003", "t0004", "t0005"]
    assert [p.configuration for p in plan.known] == draw_beforehand(chosen)
    assert {p.attempt for p in plan.known} == {1}
    assert plan.remaining == 5


def test_finished_trials_stay_and_begun_ones_keep_their_id_with_the_next_attempt():
    chosen = experiment(6)
    states = {
        "t0001": "completed", "t0002": "stopped_early", "t0003": "failed",
        "t0004": "interrupted", "t0005": "running",
    }  # fmt: skip
    plan = make_plan(chosen, record(chosen, states))
    assert [(p.trial_id, p.attempt) for p in plan.known] == [
        ("t0004", 2),
        ("t0005", 2),
        ("t0006", 1),
    ]
    assert [p.configuration for p in plan.known] == draw_beforehand(chosen)[3:]


def test_trials_that_began_out_of_order_leave_no_gap():
    chosen = experiment(4)
    plan = make_plan(chosen, record(chosen, {"t0003": "completed", "t0001": "interrupted"}))
    assert sorted(p.trial_id for p in plan.known) == ["t0001", "t0002", "t0004"]


def test_a_finished_search_has_nothing_left():
    chosen = experiment(2)
    plan = make_plan(chosen, record(chosen, {"t0001": "completed", "t0002": "failed"}))
    assert plan.remaining == 0


def test_a_grid_is_planned_whole_whatever_trials_says():
    space = {"learning_rate": {"values": [0.1, 0.01]}, "batch_size": {"values": [8, 16]}}
    plan = make_plan(experiment(1, "grid", space=space), SearchRecord())
    assert plan.remaining == len(plan.known) == 4


def test_optuna_knows_the_first_trials_and_is_asked_for_the_rest():
    plan = make_plan(experiment(5, "optuna"), SearchRecord())
    assert [p.trial_id for p in plan.known] == ["t0001"]
    assert (plan.suggestions, plan.next_number) == (4, 2)


def test_optuna_resumed_never_gives_a_number_twice():
    chosen = experiment(6, "optuna")
    states = {"t0001": "completed", "t0002": "completed", "t0003": "interrupted"}
    plan = make_plan(chosen, record(chosen, states))
    assert [(p.trial_id, p.attempt) for p in plan.known] == [("t0003", 2)]
    assert (plan.suggestions, plan.next_number) == (3, 4)


def test_trial_names_sort_as_they_were_made():
    assert [trial_name(n) for n in (1, 42, 9999)] == ["t0001", "t0042", "t9999"]
