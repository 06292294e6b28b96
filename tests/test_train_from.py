"""Whose hyperparameters `train --from` takes, and under which name the training goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from visiontuner.cli.search import choose_training
from visiontuner.experiment.schema import Experiment
from visiontuner.workflow.train import find_origin

STAGED = {
    "name": "dogs",
    "data": {"source": "digits"},
    "model": {"train": "last_stage"},
    "training": {"epochs": 7},
    "search": {"stages": {"best": 1, "epochs": 2}},
}


@pytest.fixture(autouse=True)
def _here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new_database: Callable[[Path], str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))


def trial_run(raw: dict[str, Any], *, stage: str | None) -> str:
    """A trial's run of a search with this experiment, as the writer leaves it in MLflow."""
    client = MlflowClient()
    made = client.create_experiment("dogs", artifact_location="artifacts")
    tags = {"visiontuner.kind": "search", "visiontuner.search_id": "s"}
    search = client.create_run(made, tags=tags).info.run_id
    client.log_text(search, Experiment.parse(raw).to_yaml(), "experiment.yaml")
    tags = {
        "visiontuner.kind": "trial",
        "visiontuner.search_id": "s",
        "visiontuner.trial_id": "t0003",
        "mlflow.parentRunId": search,
        **({} if stage is None else {"visiontuner.stage": stage}),
    }
    trial = client.create_run(made, tags=tags).info.run_id
    client.log_param(trial, "learning_rate", "0.003")
    return str(trial)


@pytest.mark.parametrize(
    ("stage", "train", "epochs"), [("head", "head", 7), ("network", "last_stage", 2)]
)
def test_a_run_of_a_search_in_two_stages_means_what_its_stage_trained(stage, train, epochs):
    origin = find_origin(trial_run(STAGED, stage=stage))
    assert origin.configuration == {"learning_rate": 0.003}
    assert origin.experiment["model"]["train"] == train
    assert origin.experiment["training"]["epochs"] == epochs


def test_a_run_of_a_search_in_one_stage_means_its_experiment():
    raw = {**STAGED, "search": {}}
    assert find_origin(trial_run(raw, stage=None)).experiment["training"]["epochs"] == 7


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((None, []), "dogs"),
        (("cats", []), "cats"),
        (("cats", ["name=lions"]), "lions"),
    ],
)
def test_a_training_on_other_images_is_no_version_of_the_origins_model(arguments, name):
    data, overrides = arguments
    run_id = trial_run({**STAGED, "search": {}}, stage=None)
    chosen, _ = choose_training(None, data, overrides, run_id)
    assert chosen.name == name


def test_a_name_that_a_file_gives_stays(tmp_path):
    (tmp_path / "own.yaml").write_text("{name: wolves, data: {source: cats}}")
    run_id = trial_run({**STAGED, "search": {}}, stage=None)
    chosen, _ = choose_training("own.yaml", "cats", [], run_id)
    assert chosen.name == "wolves"
