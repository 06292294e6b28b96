"""`visiontuner diagnose` on search folders, and on runs of a real MLflow store."""

import json
import math
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner

from visiontuner.cli.judge import diagnose as command
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter
from visiontuner.tracking.reading import read_history
from visiontuner.workflow.diagnose import diagnose

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def search(tmp_path: Path):
    """Two ended trials, the second with a huge loss, and one that was killed."""
    folder = tmp_path / "searches" / "images"
    journal = JournalWriter(folder, "s")
    experiment = Experiment.parse({"name": "x"}).model_dump(mode="json")
    data = {"class_names": [*"abcdefghij"], "class_counts": {"train": [9] * 10}}
    journal.append("search_started", experiment=experiment, data=data)
    for number, losses in enumerate(([2.0, 1.0], [99.0, 50.0], []), start=1):
        who = {"trial_id": f"t{number:04d}", "attempt": 1}
        journal.append("trial_started", **who, configuration={"learning_rate": 0.1 * number})
        for step, loss in enumerate(losses, start=1):
            journal.append("epoch", **who, step=step, metrics={"train_loss": loss})
        if losses:
            journal.append("trial_ended", **who, state="completed")
    yield folder, journal
    journal.close()


def test_a_search_is_diagnosed_trial_by_trial(search):
    folder, journal = search
    assert "still runs" in diagnose(str(folder)).notes[0]
    journal.close()
    good, bad, killed = diagnose(str(folder)).runs
    assert good.findings == ()
    assert [(f.rule, f.severity) for f in bad.findings] == [("learning_rate_too_high", "error")]
    assert (killed.state, killed.note) == (
        "interrupted",
        "no curves: it ended before its first epoch",
    )


def test_the_newest_search_is_the_default_and_json_is_json(search, monkeypatch):
    folder, journal = search
    journal.close()
    monkeypatch.chdir(folder.parent.parent)
    told = CliRunner().invoke(command, ["--json"])
    assert told.exit_code == 0
    assert json.loads(told.output)["runs"][1]["findings"][0]["rule"] == "learning_rate_too_high"
    shown = CliRunner().invoke(command, []).output
    assert "t0002" in shown
    assert "3 trainings, 1 with errors" in shown


def test_writing_needs_a_run(search):
    with pytest.raises(UserMistake, match="--write goes with a run of MLflow"):
        diagnose(str(search[0]), write=True)


def test_another_tools_runs(tmp_path, monkeypatch, new_database):
    uri = new_database(tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri, uri)
    home = client.create_experiment("other", artifact_location=(tmp_path / "a").as_uri())
    keras, odd, bare, going, far = (client.create_run(home).info.run_id for _ in range(5))
    client.log_param(keras, "lr", "0.5")
    for step in range(3):
        client.log_metric(keras, "train/Loss", math.nan if step == 2 else 1.0, step=step)
        client.log_metric(keras, "val_acc", 0.5, step=step)
    client.log_metric(odd, "rmse", 1.0)
    client.log_metric(going, "loss", 1.0)
    client.log_metric(far, "train_loss", math.inf)
    for name, value in {"smoothing": 0.1, "mixup": 0.2, "batch_size": 32, "lr": None}.items():
        client.log_param(far, name, value)
    for run_id in (keras, odd, bare, far):
        client.set_terminated(run_id)

    history = read_history(uri, keras)
    assert history.configuration["learning_rate"] == 0.5
    assert history.metrics["validation_accuracy"].values == (0.5, 0.5, 0.5)
    runs = {run.run_id: run for run in diagnose("other", write=True).runs}
    assert [f.rule for f in runs[keras].findings] == ["not_a_number"]
    assert "no metric that the rules know, only rmse" in runs[odd].note
    assert runs[bare].note == "no curves: nothing was recorded"
    assert runs[going].note == "still running, 1 epochs so far"
    assert client.get_run(keras).data.tags["visiontuner.findings"] == "not_a_number"
    assert [a.path for a in client.list_artifacts(keras)] == ["findings.json"]
    said = [(finding.rule, finding.evidence) for finding in runs[far].findings]
    assert said == [("not_a_number", "train_loss is inf")]
    assert read_history(uri, far).configuration == {
        "learning_rate": None,
        "batch_size": 32,
        "label_smoothing": 0.1,
        "augmentation": {"mixup": 0.2},
    }
    with pytest.raises(UserMistake, match="has no run"):
        diagnose("0" * 32)


@pytest.mark.parametrize(("attempt", "found"), [("1", ["stalled"]), ("2", [])])
def test_a_break_between_attempts_is_no_stall(tmp_path, monkeypatch, new_database, attempt, found):
    """MLflow holds how many attempts a trial had, not when they were."""
    uri = new_database(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri, uri)
    home = client.create_experiment("own", artifact_location=(tmp_path / "a").as_uri())
    tags = {"visiontuner.search_id": "s", "visiontuner.attempt": attempt}
    run_id = client.create_run(home, tags=tags).info.run_id
    for step, minutes in enumerate((0, 1, 2, 600, 601), start=1):
        client.log_metric(run_id, "train_loss", 1 / step, timestamp=60_000 * minutes, step=step)
    client.set_terminated(run_id)
    (run,) = diagnose(run_id).runs
    assert [finding.rule for finding in run.findings] == found
