import pytest
import yaml

from visiontuner.evaluation.choice import edges
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord, TrialRecord

LEARNING_RATE = {"low": 1e-4, "high": 1e-1, "scale": "log"}


def find(name, domain, value, *, train=10_000, rivals=(), importance=None):
    """The findings of a search over one value, whose best trial has `value`."""
    space = Experiment.parse({"search": {"space": {name: domain}}}).search.space
    record = SearchRecord(
        started={
            "experiment": {"objective": "validation_accuracy"},
            "data": {"counts": {"train": train}},
        }
    )
    for i, (trial_value, score) in enumerate([(value, 0.9), *((rival, 0.8) for rival in rivals)]):
        record.trials[f"t{i}"] = TrialRecord(
            trial_id=f"t{i}",
            configuration={name: trial_value},
            attempt=1,
            state="completed",
            started=0.0,
            best_value=score,
        )
    return edges(record, space, tied=tuple(record.trials), importance=importance)


def test_a_learning_rate_at_the_edge_is_said_with_the_space_to_try_next():
    (found,) = find("learning_rate", LEARNING_RATE, 0.098)
    assert found.sentence == (
        "learning_rate: the best value 0.098 lies at the upper edge of 0.0001 to 0.1; "
        "search {low: 0.01, high: 1, scale: log} next."
    )
    assert found.side == "upper"


# 5 % of three decades is 0.15: the edges begin at 10^-3.85 and 10^-1.15.
@pytest.mark.parametrize(
    ("value", "side"),
    [
        (1e-4, "lower"),
        (1.4e-4, "lower"),
        (1.5e-4, None),
        (0.003, None),
        (0.07, None),
        (0.072, "upper"),
    ],
)
def test_edges_are_measured_on_the_ranges_own_scale(value, side):
    assert [found.side for found in find("learning_rate", LEARNING_RATE, value)] == (
        [side] if side else []
    )


@pytest.mark.parametrize(
    ("name", "domain", "value", "following"),
    [
        ("learning_rate", LEARNING_RATE, 1e-4, "{low: 1.0e-05, high: 0.001, scale: log}"),
        (
            "learning_rate",
            {"low": 0.01, "high": 0.02, "scale": "log"},
            0.02,
            "{low: 0.01, high: 0.04, scale: log}",
        ),
        # A linear range cannot go below 0, and the learning rate is above it.
        (
            "learning_rate",
            {"low": 0.001, "high": 0.1},
            0.002,
            "{low: 0.0001, high: 0.01, scale: log}",
        ),
        ("dropout", {"low": 0.0, "high": 0.5}, 0.49, "{low: 0.25, high: 0.75}"),
        ("dropout", {"low": 0.1, "high": 0.8}, 0.8, "{low: 0.45, high: 0.9}"),
        ("dropout", {"low": 0.1, "high": 0.5}, 0.1, "{low: 0, high: 0.3}"),
        ("epochs", {"low": 5, "high": 20}, 20, "{low: 12, high: 28}"),
        ("batch_size", {"values": [32, 64, 128, 256]}, 256, "{values: [128, 256, 512, 1024]}"),
        ("batch_size", {"values": [256, 32, 128, 64]}, 32, "{values: [8, 16, 32, 64]}"),
        ("batch_size", {"values": [2, 4, 8]}, 2, "{values: [1, 2, 4]}"),
        ("weight_decay", {"values": [0.0, 0.01, 0.02]}, 0.02, "{values: [0.01, 0.02, 0.04, 0.08]}"),
        ("dropout", {"values": [0.0, 0.2, 0.3]}, 0.3, "{values: [0.2, 0.3, 0.4, 0.5]}"),
        ("epochs", {"values": [10, 11, 12]}, 12, "{values: [11, 12, 13, 14]}"),
    ],
)
def test_the_next_space_reaches_beyond_the_edge(name, domain, value, following):
    (found,) = find(name, domain, value)
    assert found.next == following
    # It can be put into an experiment file as it stands.
    Experiment.parse({"search": {"space": {name: yaml.safe_load(found.next)}}})


@pytest.mark.parametrize(
    ("name", "domain", "value"),
    [
        ("dropout", {"low": 0.0, "high": 0.5}, 0.0),
        ("weight_decay", {"values": [0.0, 0.01, 0.1]}, 0.0),
        ("batch_size", {"values": [1, 2, 4]}, 1),
        ("batch_size", {"values": [32, 64]}, 64),  # of two values one is always at the end
        ("batch_size", {"values": [32, 64, 128]}, 64),
        ("optimizer", {"values": ["adamw", "adam", "sgd"]}, "sgd"),
        ("dropout", {"low": 0.5, "high": 0.95}, 0.94),
    ],
)
def test_where_nothing_lies_beyond_there_is_no_finding(name, domain, value):
    assert find(name, domain, value) == []


def test_a_batch_is_never_larger_than_the_training_split():
    domain = {"values": [32, 64, 128]}
    assert find("batch_size", domain, 128, train=150) == []
    (found,) = find("batch_size", domain, 128, train=300)
    assert found.next == "{values: [64, 128, 256]}"


def test_no_search_beyond_an_edge_where_a_tied_trial_lies_elsewhere():
    assert find("learning_rate", LEARNING_RATE, 0.098, rivals=[0.095, 0.003]) == []
    assert find("learning_rate", LEARNING_RATE, 0.098, rivals=[0.095])


def test_no_search_beyond_the_edge_of_a_value_that_hardly_decides():
    domain = {"values": [32, 64, 128]}
    shares = {"learning_rate": 0.8, "batch_size": 0.2}  # below half of a half
    assert find("batch_size", domain, 32, importance=shares) == []
    shares = {"learning_rate": 0.7, "batch_size": 0.3}
    assert find("batch_size", domain, 32, importance=shares)
    assert find("batch_size", domain, 32, importance={"batch_size": 1.0})


def test_a_search_without_a_usable_trial_has_no_edges():
    space = Experiment.parse({"search": {"space": {"learning_rate": LEARNING_RATE}}}).search.space
    assert edges(SearchRecord(), space) == []
