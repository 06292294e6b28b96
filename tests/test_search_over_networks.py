"""Searches over several pretrained networks, from the images to the model that is kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from visiontuner.errors import BackboneError, UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import Event, SearchRecord, read_events
from visiontuner.model.classifier import Classifier
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.lineage import trace
from visiontuner.workflow.selection import ValidationAnswers
from visiontuner.workflow.train import find_origin, one_training
from visiontuner.workflow.tune import resume_search, run_search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("running_ray", "own_place"),
]

NETWORKS = ("timm:test_efficientnet.r160_in1k", "timm:test_resnet.r160_in1k")


class Notes(Silent):
    """Keeps what is said, and presses Ctrl-C after a number of trials."""

    def __init__(self, stop_after: int = 0) -> None:
        self.said: list[str] = []
        self._left = stop_after

    def note(self, text: str) -> None:
        self.said.append(text)

    def event(self, event: Event) -> None:
        self._left -= event["event"] == "trial_ended"
        if self._left == 0 and event["event"] == "trial_ended":
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def raw(images_with_test: Path) -> dict[str, Any]:
    return {
        "name": "colours",
        "data": {"source": str(images_with_test)},
        "model": {"weights": "none", "image_size": 32},
        "training": {"epochs": 2},
        "search": {
            "trials": 6,
            "algorithm": "random",
            "space": {"backbone": {"values": list(NETWORKS)}},
        },
    }


def configurations(folder: Path) -> list[Any]:
    """With their values; which network comes first depends on what each pass took."""
    trials = SearchRecord.load(folder).trials.values()
    return sorted((*map(str, t.configuration.values()), t.best_value) for t in trials)


def test_interrupted_search_over_networks_ends_as_an_uninterrupted_one(
    raw: dict[str, Any], tmp_path: Path, uri: str
) -> None:
    raw["search"] |= {"trials": 4, "baselines": False}
    experiment, notes = Experiment.parse(raw), Notes()
    whole = run_search(experiment, output=tmp_path / "whole", observer=notes)
    stopped = run_search(experiment, output=tmp_path / "stopped", observer=Notes(stop_after=2))
    assert stopped.state == "interrupted"
    resumed = resume_search(tmp_path / "stopped", observer=Notes())
    assert resumed.state == whole.state == "completed"
    assert configurations(tmp_path / "stopped") == configurations(tmp_path / "whole")

    # What each takes is said before, and each network looks at the images once.
    ready = [e for e in read_events(whole.folder).events if e["event"] == "features_ready"]
    assert sorted(event["backbone"] for event in ready) == sorted(NETWORKS)
    told = [text for text in notes.said if "images/s, about" in text or "in the cache" in text]
    assert [text.startswith(name) for text, name in zip(told, NETWORKS, strict=True)] == [True] * 2

    _has_every_network_in_mlflow(uri)
    _is_chosen_by_its_cost(tmp_path / "whole")
    _is_the_network_of_what_is_kept(tmp_path / "whole")


def _has_every_network_in_mlflow(uri: str) -> None:
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "colours"]
    runs = client.search_runs([experiment.experiment_id])
    trials = [run for run in runs if run.data.tags["visiontuner.kind"] == "trial"]
    assert len(trials) == 8
    for run in trials:
        assert run.data.params["backbone"] in NETWORKS
        assert run.data.tags["visiontuner.backbone"] == run.data.params["backbone"]
    (first, *_) = [run for run in runs if run.data.tags["visiontuner.kind"] == "search"]
    assert first.data.params["model.backbone"] == ", ".join(NETWORKS)


def _is_chosen_by_its_cost(folder: Path) -> None:
    """By milliseconds that are given here, and by those that are measured."""
    record = SearchRecord.load(folder)
    answers = ValidationAnswers(folder, record, Experiment.load(folder / "experiment.yaml"))
    one, other = NETWORKS
    for fast, slow in ((one, other), (other, one)):
        choice = answers.choose("fastest", milliseconds={fast: 1.0, slow: 2.0}, within=0.99)
        assert answers.network_of(choice.chosen) == fast
        assert choice.reason.startswith(f"{fast} is the fastest of 2 networks")
        limited = answers.choose("best", milliseconds={fast: 1.0, slow: 2.0}, max_latency_ms=1.5)
        assert answers.network_of(limited.chosen) == fast
    with pytest.raises(UserMistake, match=r"No network of this search answers in 0\.5 ms"):
        answers.choose("best", milliseconds={one: 1.0, other: 2.0}, max_latency_ms=0.5)

    result = evaluate_search(folder, prefer="fastest", within=0.99)
    rows = json.loads((folder / "evaluation" / "report.json").read_text())["networks"]
    assert sorted(row["backbone"] for row in rows) == sorted(NETWORKS)
    chosen = answers.network_of(result.choice.chosen)
    (fastest,) = [row for row in rows if row["backbone"] == chosen]
    assert fastest["ms_one_thread"] == min(row["ms_one_thread"] for row in rows)
    assert fastest["on_front"]
    assert all(row["memory_mb"] > 20 and row["megabytes"] > 0.1 for row in rows)
    assert {"networks.csv", "networks.png"} <= {p.name for p in (folder / "evaluation").iterdir()}
    assert all(name in (folder / "report.html").read_text() for name in NETWORKS)


def _is_the_network_of_what_is_kept(folder: Path) -> None:
    """In the classifier, evaluated, in its lineage and in a training from it."""
    record = SearchRecord.load(folder)
    classifier = Classifier.load(folder / "classifier")
    trial = record.named(classifier.metadata["trial_id"])
    assert trial is not None
    backbone = trial.configuration["backbone"]
    assert classifier.metadata["backbone"] == backbone
    assert (trace(str(folder)).network or {})["backbone"] == backbone
    origin = find_origin(str(folder))
    assert record.best is not None
    training = one_training(origin.experiment, (), origin, where="the search")
    assert training.model.backbone == record.best.configuration["backbone"]
    assert "backbone" not in training.search.space


def test_network_that_cannot_be_had_is_left_out_and_the_last_one_ends_the_search(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A closed port stands for a machine without internet.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    raw["model"] |= {"weights": "default"}
    raw["search"] |= {"trials": 2, "baselines": False}
    raw["search"]["space"]["backbone"]["values"] = ["resnet18", "efficientnet_lite0"]
    notes = Notes()
    result = run_search(Experiment.parse(raw), output=tmp_path / "search", observer=notes)
    assert [t.configuration["backbone"] for t in result.record.trials.values()] == [
        "efficientnet_lite0"
    ] * 2
    assert "no connection" in result.record.left_out["resnet18"]
    assert any(text.startswith("warning: resnet18 is left out") for text in notes.said)

    raw["search"]["space"]["backbone"]["values"] = ["resnet18", "resnet34"]
    with pytest.raises(BackboneError, match="None of the 2 networks can be used"):
        run_search(Experiment.parse(raw), output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_unknown_network_is_refused_before_there_is_a_folder(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["search"]["space"]["backbone"]["values"] = ["efficientnet_lite0", "resnet19"]
    with pytest.raises(BackboneError, match="Unknown backbone 'resnet19'"):
        run_search(Experiment.parse(raw), output=tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_choice_compares_networks_image_by_image(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["search"] |= {"trials": 4, "algorithm": "optuna"}
    result = run_search(Experiment.parse(raw), output=tmp_path / "search", observer=Silent())
    choice = result.record.choice or {}
    compared = {choice["best"], *choice["tied"]}
    assert compared <= {*result.record.trials, *result.record.baselines}
    networks = {t.configuration["backbone"] for t in result.record.trials.values()}
    assert networks == set(NETWORKS)
    best = result.record.best
    assert best is not None
    regression = result.record.baselines["logistic_regression"]
    assert regression.configuration["backbone"] == best.configuration["backbone"]
    answers = [
        np.load(path)["correct"] for path in sorted((tmp_path / "search").rglob("*_scores.npz"))
    ]
    assert len({len(each) for each in answers if each.ndim == 1}) == 1
