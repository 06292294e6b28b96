import itertools
import math

import pytest
import yaml

from visiontuner.experiment.schema import Experiment
from visiontuner.search.space import Suggester, clean, draw_beforehand, to_distributions

EVERYTHING = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "scale": "log"},
    "batch_size": {"low": 8, "high": 64, "scale": "log"},
    "weight_decay": {"low": 0.0, "high": 0.1},
    "dropout": {"values": [0, 0.5]},
    "label_smoothing": {"low": 0.0, "high": 0.2},
    "optimizer": {"values": ["adamw", "sgd"]},
    "epochs": {"low": 2, "high": 6},
}


def experiment(space=EVERYTHING, *, seed: int = 7, **search) -> Experiment:
    search = {"algorithm": "random", "trials": 60, "first": [], "space": space, **search}
    return Experiment.parse({"name": "x", "seed": seed, "search": search})


def test_drawn_values_keep_to_their_bounds_and_kinds():
    for drawn in draw_beforehand(experiment()):
        assert list(drawn) == list(EVERYTHING)
        assert 1e-4 <= drawn["learning_rate"] <= 1e-1
        assert 8 <= drawn["batch_size"] <= 64
        assert 2 <= drawn["epochs"] <= 6
        assert type(drawn["batch_size"]) is type(drawn["epochs"]) is int
        assert 0 <= drawn["weight_decay"] <= 0.1
        assert drawn["dropout"] in (0.0, 0.5)
        assert type(drawn["dropout"]) is float
        assert drawn["optimizer"] in ("adamw", "sgd")


@pytest.mark.parametrize(
    ("images", "sizes", "default"),
    [
        (1000, (32, 64, 128, 256), 128),
        (200, (32, 64, 128), 128),
        (80, (32, 64), 64),
        (20, (20,), 20),
    ],
)
def test_batches_of_more_than_all_images_leave_the_default_space(images, sizes, default):
    fitting = Experiment.parse({}).for_images(images)
    assert fitting.search.space["batch_size"].values == sizes
    assert fitting.first_trials() == [{"learning_rate": 0.003, "batch_size": default}]
    assert Experiment.parse(yaml.safe_load(fitting.to_yaml())).search == fitting.search


@pytest.mark.parametrize(
    "given",
    [
        {"search": {"space": {"batch_size": {"values": [128]}}}},
        {"search": {"first": [{"learning_rate": 0.01, "batch_size": 256}]}},
    ],
)
def test_a_given_space_stays(given):
    chosen = Experiment.parse(given)
    assert chosen.for_images(80) == chosen


def test_a_given_batch_size_stays_in_the_space():
    fitting = Experiment.parse({"training": {"batch_size": 128}}).for_images(80)
    assert fitting.search.space["batch_size"].values == (32, 64, 128)
    assert fitting.first_trials()[0]["batch_size"] == 128


def test_a_log_scale_gives_every_decade_its_share():
    space = {"learning_rate": EVERYTHING["learning_rate"]}
    drawn = [c["learning_rate"] for c in draw_beforehand(experiment(space, trials=600))]
    decades = [sum(math.floor(math.log10(v)) == d for v in drawn) for d in (-4, -3, -2)]
    # 200 expected each; on a linear scale the first decade would get 5.
    assert all(150 < count < 250 for count in decades)


def test_all_whole_numbers_of_a_range_occur_ends_included():
    space = {"epochs": {"low": 2, "high": 4}}
    assert {c["epochs"] for c in draw_beforehand(experiment(space))} == {2, 3, 4}


def test_the_seed_alone_decides_what_is_drawn():
    assert draw_beforehand(experiment()) == draw_beforehand(experiment())
    assert draw_beforehand(experiment()) != draw_beforehand(experiment(seed=8))


def test_a_longer_search_begins_like_the_shorter_one():
    assert draw_beforehand(experiment(trials=60))[:20] == draw_beforehand(experiment(trials=20))


def test_first_leads_and_counts_among_the_trials():
    space = {"learning_rate": EVERYTHING["learning_rate"], "batch_size": {"values": [32, 64]}}
    first = [{"batch_size": 64, "learning_rate": 0.003}]
    drawn = draw_beforehand(experiment(space, trials=5, first=first))
    assert drawn[0] == {"learning_rate": 0.003, "batch_size": 64}
    assert list(drawn[0]) == list(space)
    assert len(drawn) == 5


def test_the_defaults_go_first_where_nothing_is_said():
    space = {"learning_rate": EVERYTHING["learning_rate"], "batch_size": {"values": [64, 128]}}
    drawn = draw_beforehand(experiment(space, trials=2, first=None))
    assert drawn[0] == {"learning_rate": 0.003, "batch_size": 128}


def test_a_grid_is_whole_and_holds_nothing_twice():
    space = {"learning_rate": {"values": [0.1, 0.01]}, "batch_size": {"values": [8, 16, 32]}}
    first = [{"learning_rate": 0.01, "batch_size": 16}]
    drawn = draw_beforehand(experiment(space, algorithm="grid", trials=3, first=first))
    assert drawn[0] == first[0]
    assert sorted((c["learning_rate"], c["batch_size"]) for c in drawn) == sorted(
        itertools.product((0.1, 0.01), (8, 16, 32))
    )


def test_clean_gives_plain_values_in_the_order_of_the_space():
    space = experiment().search.space
    raw = dict.fromkeys(reversed(EVERYTHING), 8) | {"optimizer": "sgd", "batch_size": 8.0}
    cleaned = clean(raw, space)
    assert list(cleaned) == list(EVERYTHING)
    assert {name: type(value) for name, value in cleaned.items()} == {
        "learning_rate": float,
        "batch_size": int,
        "weight_decay": float,
        "dropout": float,
        "label_smoothing": float,
        "optimizer": str,
        "epochs": int,
    }


def test_distributions_hold_what_the_experiment_says():
    distributions = to_distributions(experiment().search.space)
    assert distributions["learning_rate"].log
    assert not distributions["weight_decay"].log
    assert (distributions["epochs"].low, distributions["epochs"].high) == (2, 6)
    assert distributions["dropout"].choices == (0.0, 0.5)


def told(trials: int, objective: str) -> list[float]:
    """Learning rates asked for after `trials` results that say 0.01 is the best one."""
    space = {"learning_rate": EVERYTHING["learning_rate"]}
    search = {"algorithm": "optuna", "space": space}
    chosen = Experiment.parse({"name": "x", "objective": objective, "search": search})
    suggester = Suggester(chosen, trials_told=trials)
    sign = 1 if objective == "validation_loss" else -1
    for number in range(trials):
        rate = 10 ** (-4 + 3 * number / trials)
        suggester.tell(f"t{number}", {"learning_rate": rate}, sign * abs(math.log10(rate) + 2))
    return [suggester.ask(f"n{number}")["learning_rate"] for number in range(20)]


@pytest.mark.parametrize("objective", ["validation_accuracy", "validation_loss"])
def test_optuna_looks_where_told_results_were_good(objective):
    near = [rate for rate in told(40, objective) if abs(math.log10(rate) + 2) < 0.75]
    assert len(near) >= 15  # half of them by chance


def test_a_failed_trial_is_told_and_asked_configurations_hold_all_names():
    suggester = Suggester(experiment(algorithm="optuna"))
    for number in range(15):
        configuration = suggester.ask(f"t{number}")
        assert list(configuration) == list(EVERYTHING)
        suggester.tell(f"t{number}", configuration, None if number % 2 else 0.5)


def test_a_resumed_suggester_does_not_repeat_the_random_start():
    chosen = experiment(algorithm="optuna")
    first = Suggester(chosen)
    asked = [first.ask(f"t{number}") for number in range(3)]
    resumed = Suggester(chosen, trials_told=3)
    for number, configuration in enumerate(asked):
        resumed.tell(f"t{number}", configuration, 0.5)
    assert resumed.ask("t3") not in asked
