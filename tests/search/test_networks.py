"""Successive halving over networks: whose turn it is, and who gets no more trials."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visiontuner.errors import ExperimentError
from visiontuner.experiment.schema import OFFLINE_BACKBONES, Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.plan import SCORES_FILE, Stores, TrialTask, make_plan, stage_of
from visiontuner.search.run import NetworkRace, is_behind

IMAGES = 100


def experiment_over(*names: str, **search: Any) -> Experiment:
    space = {"backbone": {"values": list(names)}}
    return Experiment.model_validate(
        {"name": "x", "search": {"trials": 24, "algorithm": "random", "space": space, **search}}
    )


class Race:
    """A search whose networks answer as many of 100 images as they are given."""

    def __init__(self, folder: Path, right: dict[str, int], **search: Any) -> None:
        self.folder = folder
        self.right = right
        self.experiment = experiment_over(*right, **search)
        self.record = SearchRecord()
        self.apply("search_started", experiment=self.experiment.model_dump(mode="json"))
        self.race = self.begin()

    def begin(self) -> NetworkRace:
        return NetworkRace(
            self.experiment,
            self.record,
            list(self.right),
            folder=self.folder,
            labels=lambda: np.zeros(IMAGES, np.int64),
            stop=lambda name, reason, trials: self.apply(
                "network_stopped", backbone=name, reason=reason, trials=trials
            ),
        )

    def apply(self, event: str, **fields: Any) -> None:
        self.record.apply({"event": event, "search_id": "s", "time": 1.0, **fields})

    def run(self, trials: int) -> list[str]:
        """The networks of the next trials, one at a time."""
        return [self.one() for _ in range(trials)]

    def one(self) -> str:
        trial_id = f"t{len(self.record.trials) + 1:04d}"
        configuration = self.race.ask(trial_id)
        name = str(configuration["backbone"])
        self.apply("trial_started", trial_id=trial_id, attempt=1, configuration=configuration)
        right = self.right[name]
        metrics = {"validation_accuracy": right / IMAGES, "validation_loss": 1 - right / IMAGES}
        self.apply("epoch", trial_id=trial_id, attempt=1, step=1, metrics=metrics)
        place = self.folder / "trials" / trial_id
        place.mkdir(parents=True)
        correct = np.arange(IMAGES) < right
        np.savez(place / SCORES_FILE, correct=correct, log_loss=np.where(correct, 0.1, 3.0))
        self.apply(
            "trial_ended",
            trial_id=trial_id,
            attempt=1,
            state="completed",
            best_epoch=1,
            best_value=right / IMAGES,
        )
        self.race.tell(trial_id, configuration, right / IMAGES)
        return name


def test_networks_take_turns_and_one_far_behind_gets_three_trials(tmp_path: Path) -> None:
    race = Race(tmp_path, {"small": 60, "middle": 90, "large": 91})
    assert race.run(9) == ["small", "middle", "large"] * 3
    assert race.run(15) == ["middle", "large"] * 7 + ["middle"]
    assert list(race.record.stopped) == ["small"]
    assert race.record.stopped["small"]["reason"] == (
        "its best of 3 trials, 0.6000 (t0001), is behind 0.9100 (t0003, large) beyond noise"
    )


def test_networks_that_the_images_cannot_tell_apart_all_go_on(tmp_path: Path) -> None:
    race = Race(tmp_path, {"small": 89, "middle": 90, "large": 91})
    assert race.run(24) == ["small", "middle", "large"] * 8
    assert not race.record.stopped


def test_no_more_than_half_of_the_networks_leave_at_once(tmp_path: Path) -> None:
    race = Race(tmp_path, {"small": 40, "middle": 60, "large": 95})
    race.run(12)
    assert list(race.record.stopped) == ["small"]
    race.run(12)  # the other one is judged again when six of its trials have ended
    assert list(race.record.stopped) == ["small", "middle"]
    assert [t.configuration["backbone"] for t in race.record.trials.values()].count("middle") == 6


def test_resumed_race_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    right = {"small": 60, "middle": 90, "large": 91}
    whole, killed = Race(tmp_path / "whole", right), Race(tmp_path / "killed", right)
    whole.run(24)
    killed.run(11)
    killed.race = killed.begin()
    killed.run(13)
    expected, got = (
        [trial.configuration for trial in race.record.trials.values()] for race in (whole, killed)
    )
    assert got == expected


def test_every_network_tries_the_configurations_of_a_search_over_it_alone(tmp_path: Path) -> None:
    race = Race(tmp_path, {"small": 89, "middle": 90})
    race.run(8)
    by_network = {
        name: [
            {k: v for k, v in t.configuration.items() if k != "backbone"}
            for t in race.record.trials.values()
            if t.configuration["backbone"] == name
        ]
        for name in ("small", "middle")
    }
    alone = make_plan(race.experiment.for_backbone("small"), SearchRecord()).known
    assert by_network["small"] == [planned.configuration for planned in alone][:4]
    assert by_network["middle"] == by_network["small"]
    assert by_network["small"][0] == {"learning_rate": 0.003, "batch_size": 128}


def test_network_that_was_left_out_gets_no_trial(tmp_path: Path) -> None:
    race = Race(tmp_path, {"small": 89, "middle": 90})
    race.apply("network_left_out", backbone="small", reason="no connection")
    race.race = race.begin()
    assert race.run(3) == ["middle"] * 3


@pytest.mark.parametrize(
    ("changed", "behind"),
    # Of 100 images: gap 0.02, standard error of the mean 0.0141: 1.42 of them. Then 0.03: 1.75.
    [(2, False), (3, True)],
)
def test_behind_is_more_than_one_sided_noise(changed: int, behind: bool) -> None:
    leader = np.ones(IMAGES)
    own = np.where(np.arange(IMAGES) < changed, 0.0, 1.0)
    assert is_behind(own, leader) is behind
    assert not is_behind(leader, own)


# What the experiment says of it.


def test_networks_alone_are_searched_with_the_default_heads() -> None:
    space = experiment_over("small", "large").search.space
    assert set(space) == {"backbone", "learning_rate", "batch_size"}
    fitted = experiment_over("small", "large").for_images(40).search.space
    assert str(fitted["batch_size"]) == "32"


def test_offline_stands_for_the_networks_without_a_download() -> None:
    assert experiment_over("offline").search.backbones == OFFLINE_BACKBONES
    assert experiment_over("resnet18", "offline").search.backbones == (
        "resnet18",
        *OFFLINE_BACKBONES,
    )


def test_every_network_begins_with_the_defaults_and_with_first() -> None:
    experiment = experiment_over("small", "large")
    assert [trial["backbone"] for trial in experiment.first_trials()] == ["small", "large"]
    first = [
        {"learning_rate": 0.01, "batch_size": 32},
        {"backbone": "large", "learning_rate": 0.02, "batch_size": 64},
    ]
    given = experiment_over("small", "large", first=first)
    assert given.first_trials() == [
        {"backbone": "small", "learning_rate": 0.01, "batch_size": 32},
        {"backbone": "large", "learning_rate": 0.01, "batch_size": 32},
        {"backbone": "large", "learning_rate": 0.02, "batch_size": 64},
    ]


def test_grid_runs_every_combination_of_every_network() -> None:
    space = {"backbone": {"values": ["small", "large"]}, "batch_size": {"values": [32, 64]}}
    experiment = experiment_over("small", algorithm="grid", space=space)
    known = make_plan(experiment, SearchRecord()).known
    assert [(p.configuration["backbone"], p.configuration["batch_size"]) for p in known] == [
        ("small", 32),
        ("small", 64),
        ("large", 32),
        ("large", 64),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"space": {"backbone": {"low": 1, "high": 2}}}}, "networks have no order"),
        ({"search": {"space": {"backbone": {"values": ["a", "a"]}}}}, "the same value twice"),
        ({"search": {"space": {"backbone": {"values": []}}}}, "must be {values"),
        (
            {"search": {"trials": 1, "space": {"backbone": {"values": ["a", "b"]}}}},
            "search.trials must be >= 2, the number of networks",
        ),
        ({"model": {"train": "all"}}, "search.space.backbone is for heads on features"),
        ({"model": {"weights": "my.pth"}}, "are weights of one network"),
        ({"model": {"backbone": "c"}}, "'c' is not in search.space.backbone"),
    ],
)
def test_impossible_searches_over_networks_are_refused(
    change: dict[str, Any], message: str
) -> None:
    raw = {"name": "x", "search": {"space": {"backbone": {"values": ["a", "b"]}}}, **change}
    with pytest.raises(ExperimentError, match=message):
        Experiment.parse(raw)


def test_experiment_over_networks_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    experiment = experiment_over("resnet18", "offline")
    (tmp_path / "experiment.yaml").write_text(experiment.to_yaml())
    assert Experiment.load(tmp_path / "experiment.yaml") == experiment


# What a trial is handed.


def test_trial_trains_on_the_features_of_its_own_network(tmp_path: Path) -> None:
    experiment = experiment_over("small", "large")
    folders = {name: tmp_path / name for name in ("small", "large")}
    task = TrialTask(
        experiment=experiment,
        search_folder=tmp_path,
        threads=1,
        features_folder=folders["small"],
        features_of=folders,
    )
    own = task.for_trial({"backbone": "large", "learning_rate": 0.1})
    assert own.features_folder == folders["large"]
    assert own.experiment.model.backbone == "large"
    assert task.for_trial({"learning_rate": 0.1}) is task


def test_stores_and_stage_are_those_of_the_trials_network() -> None:
    events = [
        {"event": "features_ready", "backbone": "small", "folder": "/s"},
        {"event": "features_ready", "backbone": "large", "folder": "/l"},
    ]
    assert Stores.of(events, "small").features == Path("/s")
    assert Stores.of(events).features == Path("/l")
    record = SearchRecord()
    began = {"event": "trial_started", "time": 1.0, "attempt": 1, "trial_id": "t0001"}
    record.apply({**began, "configuration": {"backbone": "large"}})
    stage = stage_of(experiment_over("small", "large"), record.trials["t0001"])
    assert stage.experiment.model.backbone == "large"
