"""Search folders, a training, a classifier and an MLflow store made by commit c16cea8 still work.

README.md says how they were made. The expected numbers are those of c16cea8 itself.
"""

from __future__ import annotations

import base64
import os
import sqlite3
import tarfile
import warnings
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from visiontuner.journal import SearchRecord
from visiontuner.model.classifier import Classifier
from visiontuner.workflow.compare import compare
from visiontuner.workflow.diagnose import diagnose
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.lineage import trace, verify
from visiontuner.workflow.promote import promote
from visiontuner.workflow.sync import sync_search
from visiontuner.workflow.train import resume_training
from visiontuner.workflow.tune import resume_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray", "old_searches")]

ARCHIVE = Path(__file__).with_name("searches.tar.xz")
MADE_IN = "/srv/old"
NAMES_PLACES = (
    "*/experiment.yaml",
    "*/journal.jsonl",
    "mlruns/*/*/artifacts/experiment.yaml",
    "mlruns/*/models/*/artifacts/MLmodel",
)


@pytest.fixture
def old_searches(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that the old commands ran in, at a new place; the working folder of the test."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in (path for pattern in NAMES_PLACES for path in tmp_path.glob(pattern)):
        path.write_text(path.read_text("utf-8").replace(MADE_IN, str(tmp_path)), "utf-8")
    _move_database(tmp_path / "mlflow.db", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    # MLflow keeps stores by URI in a process: that of a relative path would be another test's.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def _move_database(path: Path, place: str) -> None:
    connection = sqlite3.connect(path)
    tables = [
        row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    for table in tables:
        for column in connection.execute(f"PRAGMA table_info({table})").fetchall():
            if "CHAR" in column[2] or "TEXT" in column[2]:
                name = column[1]
                connection.execute(
                    f"UPDATE {table} SET {name} = replace({name}, ?, ?) WHERE instr({name}, ?)",
                    (MADE_IN, place, MADE_IN),
                )
    connection.commit()
    connection.close()


def best_values(folder: Path) -> dict[str, float | None]:
    return {name: trial.best_value for name, trial in SearchRecord.load(folder).trials.items()}


def runs_of(folder: Path) -> list[Run]:
    """The runs that the store holds of a search; the search's own is the first."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        f"tags.`visiontuner.search_id` = '{SearchRecord.load(folder).search_id}'",
    )
    return sorted(runs, key=lambda run: run.data.tags.get("visiontuner.trial_id", ""))


def numbers_of(run: Run) -> dict[str, list[tuple[int, int, float]]]:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return {
        key: sorted(
            (m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)
        )
        for key in run.data.metrics
    }


def test_an_interrupted_search_goes_on() -> None:
    before = SearchRecord.load(Path("interrupted"))
    result = resume_search(Path("interrupted"))
    assert result.tracking_problem is None
    assert result.model == "models:/old-photos-interrupted/1"
    trials = result.record.trials
    for finished in ("t0001", "t0002", "t0003"):
        assert trials[finished] == before.trials[finished]
    assert {name: trial.attempt for name, trial in trials.items()} == {
        "t0001": 1, "t0002": 1, "t0003": 1, "t0004": 2, "t0005": 2, "t0006": 1,
    }  # fmt: skip
    assert {trial.state for trial in trials.values()} == {"completed"}
    last = {name: trial.epochs[-1].metrics["validation_loss"] for name, trial in trials.items()}
    assert last == pytest.approx(
        {
            "t0001": 1.0394139,
            "t0002": 0.5649444,
            "t0003": 0.8441340,
            "t0004": 0.5941255,
            "t0005": 0.5462878,
            "t0006": 0.7513337,
        },
        rel=1e-3,
    )
    parent, *runs = runs_of(result.folder)
    assert parent.data.tags["visiontuner.state"] == "completed"
    names = [run.data.tags["visiontuner.trial_id"] for run in runs]
    assert names == [*sorted(result.record.baselines), *sorted(trials)]
    assert {run.info.status for run in (parent, *runs)} == {"FINISHED"}

    evaluation = evaluate_search(result.folder)
    assert evaluation.choice.best == "t0001"
    assert evaluation.choice.chosen == (result.record.choice or {})["chosen"]
    assert evaluation.report.metrics["accuracy"].value > 0.5
    found = {run.name: [f.rule for f in run.findings] for run in diagnose("interrupted").runs}
    assert found["t0001"] == ["learning_rate_too_low", "loss_not_decreasing"]
    assert found["t0003"] == ["learning_rate_too_low"]


def test_an_interrupted_training_goes_on_from_its_checkpoint() -> None:
    before = SearchRecord.load(Path("training")).trials["t0001"]
    result = resume_training(Path("training"))
    trial = result.record.trials["t0001"]
    assert (trial.state, trial.attempt, len(trial.epochs)) == ("completed", 2, 40)
    assert trial.epochs[:4] == before.epochs[:4]  # the checkpoint of the fifth was not whole
    assert trial.epochs[-1].metrics["train_loss"] == pytest.approx(0.0998107, rel=0.02)
    assert trial.epochs[-1].metrics["validation_loss"] == pytest.approx(0.5117814, rel=0.02)
    assert result.model == "models:/old-photos-training/1"
    assert len(runs_of(result.folder)) == 2


def test_a_search_in_two_stages_is_whole_and_gets_into_mlflow() -> None:
    result = resume_search(Path("stages"))
    assert result.model == "models:/old-photos-stages/1"
    stages = {name: (t.stage, t.starts_from) for name, t in result.record.trials.items()}
    assert stages == {
        "t0001": ("head", None),
        "t0002": ("head", None),
        "t0003": ("network", "t0002"),
    }
    assert len(runs_of(result.folder)) == 4
    assert sync_search(Path("stages")).model == "models:/old-photos-stages/1"
    assert len(runs_of(result.folder)) == 4
    found = {run.name: [f.rule for f in run.findings] for run in diagnose("stages").runs}
    assert found["t0003"] == ["overfit"]


def test_a_whole_search_is_in_its_old_store_and_goes_into_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("whole")
    old_runs = runs_of(folder)
    old_numbers = [numbers_of(run) for run in old_runs]
    assert len(old_runs) == 5
    assert (sync_search(folder).model or "").startswith("models:/old-photos/")
    assert [run.info.run_id for run in runs_of(folder)] == [run.info.run_id for run in old_runs]
    assert [numbers_of(run) for run in runs_of(folder)] == old_numbers

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    assert sync_search(folder).model == "models:/old-photos/1"
    new_runs = runs_of(folder)
    assert [numbers_of(run) for run in new_runs] == old_numbers
    for old, new in zip(old_runs, new_runs, strict=True):
        assert new.info.run_name == old.info.run_name
        assert new.info.status == old.info.status
        assert new.info.start_time == old.info.start_time
        assert new.info.end_time == old.info.end_time
        # What is not set and the space are in experiment.yaml alone now.
        kept = {k: v for k, v in old.data.params.items() if v != "null" and ".space." not in k}
        assert kept.items() <= new.data.params.items()
        names = ("kind", "state", "trial_id", "best_trial", "data_digest", "findings")
        for tag in (f"visiontuner.{name}" for name in names):
            assert new.data.tags.get(tag) == old.data.tags.get(tag)


def test_a_whole_search_is_evaluated_compared_and_diagnosed() -> None:
    frame = compare(["whole"])
    assert next(iter(frame["run"])) == "t0003"
    assert dict(zip(frame["run"], frame["best_validation_accuracy"], strict=True)) == best_values(
        Path("whole")
    )
    of_store = compare([runs_of(Path("whole"))[0].info.run_id])
    assert list(of_store["best_validation_accuracy"]) == list(frame["best_validation_accuracy"])
    found = {run.name: [f.rule for f in run.findings] for run in diagnose("whole").runs}
    assert found == {
        "t0001": [],  # its journal has class_not_predicted, but it is far behind t0003
        "t0002": ["learning_rate_too_low"],
        "t0003": ["learning_rate_too_low"],
        "t0004": ["learning_rate_too_low"],
    }

    evaluation = evaluate_search(Path("whole"))
    assert evaluation.choice.chosen == "t0003"
    assert evaluation.report.temperature == pytest.approx(0.2258158, rel=1e-3)
    assert evaluation.report.metrics["accuracy"].value == pytest.approx(13 / 18)
    assert evaluation.report.metrics["nll"].value == pytest.approx(0.6549035, rel=1e-3)
    assert evaluation.looks == 2
    assert (evaluation.model or "").startswith("models:/old-photos/")


def test_a_registered_model_is_promoted_traced_and_answers() -> None:
    decided = promote("old-photos")
    assert (decided.decision, decided.challenger, decided.changed) == ("promoted", "2", True)
    lineage = trace("old-photos@champion")
    assert (lineage.trial or {})["trial_id"] == "t0003"
    assert (lineage.search or {})["name"] == "whole"
    states = {check.what: check.state for check in verify(lineage)}
    assert states.pop("code") in ("ok", "differs", "unknown")
    assert states.pop("packages") in ("ok", "differs")
    assert states
    assert set(states.values()) == {"ok"}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, about other versions of its requirements
        model = mlflow.pyfunc.load_model("models:/old-photos/2")
    image = Path("photos/test/moss/0.png")
    answers = model.predict(pd.DataFrame({"image": [base64.b64encode(image.read_bytes())]}))
    answer = pd.DataFrame(answers).iloc[0]
    (expected,) = Classifier.load(Path("whole/classifier")).predict([image])
    assert answer["label"] == expected.label
    assert answer["probability"] == pytest.approx(expected.probability, abs=1e-4)


def test_a_classifier_folder_answers_as_it_did() -> None:
    classifier = Classifier.load(Path("whole/classifier"))
    assert classifier.class_names == ("amber", "moss", "slate")
    assert classifier.verify_reference() < 1e-4
    (answer,) = classifier.predict([Path("photos/test/moss/0.png")])
    assert (answer.known, answer.novelty) == (None, None)
