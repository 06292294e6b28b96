"""Whole searches, from images to a registered model, on a real Ray and a real MLflow store."""

import base64
import copy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from visiontuner.errors import DataError, ExperimentError, JournalError, SearchFailed, UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter, SearchRecord, read_events
from visiontuner.model.classifier import Classifier
from visiontuner.search.space import draw_beforehand
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.prepare import prepare
from visiontuner.workflow.run import SearchResult, claim_folder
from visiontuner.workflow.sync import sync_search
from visiontuner.workflow.tune import resume_search, run_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray")]


class Notes(Silent):
    """Remembers what a person would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))


@pytest.fixture
def store(
    monkeypatch: pytest.MonkeyPatch, new_database: Callable[[Path], str]
) -> Callable[[Path], MlflowClient]:
    """Sends tracking to a database and gives a client for it."""

    def use(path: Path) -> MlflowClient:
        if not path.exists():
            new_database(path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        return MlflowClient(f"sqlite:///{path}")

    return use


def experiment_on(root: Path, small: dict[str, Any], **sections: Any) -> Experiment:
    raw = copy.deepcopy(small) | {"data": {"source": str(root)}}
    for name, values in sections.items():
        raw[name] = {**raw[name], **values} if isinstance(values, dict) else values
    return Experiment.parse(raw)


@pytest.fixture
def experiment(images: Path, small_search: dict[str, Any]) -> Callable[..., Experiment]:
    return lambda **sections: experiment_on(images, small_search, **sections)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    shared_cache: Path,
    images: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
) -> tuple[SearchResult, Path, list[str]]:
    """A search that ended, its MLflow database and what was told; tests look, none changes it."""
    home, notes = tmp_path_factory.mktemp("finished"), Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", new_database(home / "mlflow.db"))
        result = run_search(
            experiment_on(images, small_search, search={"baselines": True}),
            output=home / "search",
            observer=notes,
        )
    return result, home / "mlflow.db", notes.notes


def runs_of(client: MlflowClient, name: str = "colours") -> tuple[Run, dict[str, Run]]:
    """The search's parent run, and its trials' runs by trial id."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags.get("visiontuner.kind") == "search"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    trials = [r for r in children if r.data.tags["visiontuner.kind"] == "trial"]
    assert {r.data.tags["visiontuner.kind"] for r in children} <= {"trial", "baseline"}
    by_trial = {r.data.tags["visiontuner.trial_id"]: r for r in trials}
    assert len(by_trial) == len(trials), "a trial is there twice"
    return parent, by_trial


def test_a_search_ends_with_trials_a_classifier_and_a_model(finished, store):
    result, database, notes = finished
    client = store(database)
    assert result.state == "completed"
    assert result.tracking_problem is None
    assert result.best.best_value == 1.0  # three colours
    assert any("ONNX Runtime" in n or "in the cache" in n for n in notes)
    parent, trials = runs_of(client)
    assert parent.info.status == "FINISHED"
    assert sorted(trials) == ["t0001", "t0002", "t0003"]
    for trial_id, run in trials.items():
        record = result.record.trials[trial_id]
        assert run.info.status == "FINISHED"
        assert float(run.data.params["learning_rate"]) == record.configuration["learning_rate"]
        for name in ("train_loss", "validation_accuracy"):
            history = client.get_metric_history(run.info.run_id, name)
            assert ([m.step for m in history], [m.value for m in history]) == record.curve(name)
    drawn = draw_beforehand(Experiment.load(result.folder / "experiment.yaml"))
    assert [result.record.trials[f"t000{n}"].configuration for n in (1, 2, 3)] == drawn


def test_the_classifier_names_new_images(finished, images):
    result, _, _ = finished
    classifier = Classifier.load(result.classifier)
    assert classifier.class_names == ("blue", "green", "red")
    for name in classifier.class_names:
        (prediction,) = classifier.predict([images / "valid" / name / "0.png"])
        assert prediction.label == name


def test_the_registered_model_answers_with_names(finished, store, images, monkeypatch):
    result, database, _ = finished
    store(database)
    # MLflow puts the model's own copy of the code on the path, for good.
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert result.model == "models:/colours/1"
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    try:
        model = mlflow.pyfunc.load_model(result.model)
    finally:
        mlflow.set_tracking_uri(None)
    image = base64.b64encode((images / "valid/green/1.png").read_bytes()).decode()
    answer = model.predict(pd.DataFrame({"image": [image]}))
    assert answer["label"].tolist() == ["green"]
    assert (
        model.metadata.run_id
        == runs_of(MlflowClient(f"sqlite:///{database}"))[1][result.best.trial_id].info.run_id
    )


def copy_of(finished: tuple[SearchResult, Path, list[str]], here: Path) -> tuple[Path, Path]:
    """The finished search's folder and database, to do something to."""
    result, database, _ = finished
    folder = here / "search"
    shutil.copytree(result.folder, folder)
    shutil.copy(database, here / "mlflow.db")
    return folder, here / "mlflow.db"


def looks(client: MlflowClient) -> dict[str, Any]:
    """Everything that must not change when nothing has happened."""
    parent, trials = runs_of(client)
    return {
        "parent": (parent.info.run_id, parent.info.status, parent.info.start_time),
        "trials": {
            name: (run.info.run_id, run.info.status, run.info.end_time, run.data.metrics)
            for name, run in trials.items()
        },
        "versions": [v.version for v in client.search_model_versions("name='colours'")],
    }


def test_resuming_and_syncing_a_finished_search_change_nothing(finished, store, tmp_path):
    folder, database = copy_of(finished, tmp_path)
    client = store(database)
    before, trials = looks(client), SearchRecord.load(folder).trials
    result = resume_search(folder)
    assert result.state == "completed"
    assert result.model == "models:/colours/1"
    assert looks(client) == before
    assert SearchRecord.load(folder).trials == trials
    assert sync_search(folder).model == "models:/colours/1"
    assert looks(client) == before


def test_a_search_written_elsewhere_is_the_same(finished, store, tmp_path):
    folder, database = copy_of(finished, tmp_path)
    here = looks(store(database))
    elsewhere = store(tmp_path / "other.db")
    assert sync_search(folder).model == "models:/colours/1"
    there = looks(elsewhere)
    assert there["versions"] == here["versions"]
    for name, (_, status, ended, metrics) in there["trials"].items():
        assert (status, ended, metrics) == here["trials"][name][1:]


@pytest.mark.usefixtures("finished")
def test_a_second_search_computes_no_features_and_no_baselines_that_take_minutes(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.setattr("visiontuner.evaluation.baselines._MOST_WORK", 0)
    notes = Notes()
    search = {"trials": 1, "baselines": True}
    result = run_search(experiment(search=search), output=tmp_path / "s", observer=notes)
    assert not result.record.baselines
    assert [n for n in notes.notes if "aselines" in n] == [
        "No baselines: 42 images would take them minutes."
    ]
    ready = [e for e in read_events(result.folder).events if e["event"] == "features_ready"]
    assert [event["computed"] for event in ready] == [0]
    assert any("nothing to compute" in note for note in notes.notes)


@pytest.mark.usefixtures("finished")
def test_the_default_space_has_no_batches_of_more_than_all_images_and_that_is_said(
    images, small_search, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    notes = Notes()
    search = {"trials": 1, "baselines": False}
    raw = {**small_search, "search": search, "data": {"source": str(images)}}
    folder = run_search(Experiment.parse(raw), output=tmp_path / "s", observer=notes).folder
    said = "There are 30 training images: the default search space has batch sizes up to that, 30."
    assert said in notes.notes
    (trial,) = SearchRecord.load(folder).trials.values()
    assert trial.configuration["batch_size"] == 30
    assert resume_search(folder).record.trials.keys() == {trial.trial_id}


def test_changed_images_are_refused(finished, store, tmp_path, images):
    folder, database = copy_of(finished, tmp_path)
    store(database)
    changed = tmp_path / "changed"
    shutil.copytree(images, changed)
    shutil.copy(changed / "train/red/0.png", changed / "train/red/new.png")
    path = folder / "experiment.yaml"
    path.write_text(path.read_text().replace(str(images), str(changed)))
    before = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(UserMistake, match="not those this search began with"):
        resume_search(folder)
    assert (folder / "journal.jsonl").read_bytes() == before


def test_a_search_that_another_process_runs_is_refused(finished, store, tmp_path):
    folder, database = copy_of(finished, tmp_path)
    store(database)
    other = JournalWriter(folder, "s")
    try:
        with pytest.raises(JournalError, match="still running"):
            resume_search(folder)
    finally:
        other.close()


def test_a_budget_too_short_for_any_trial_can_be_raised(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    folder = tmp_path / "search"
    with pytest.raises(SearchFailed) as failure:
        run_search(experiment(search={"time_budget": 0.001}), output=folder)
    way_out = f"visiontuner tune --resume {folder} --set search.time_budget=1s"
    assert str(failure.value).endswith(way_out)
    with pytest.raises(UserMistake, match=r"only search\.time_budget can be set"):
        resume_search(folder, overrides=["search.trials=1"])
    result = resume_search(folder, overrides=["search.time_budget=null"])
    assert result.state == "completed"
    assert {trial.state for trial in result.record.trials.values()} == {"completed"}


def test_folders_that_nobody_named_have_names_of_their_own(tmp_path):
    wanted = tmp_path / "searches" / "dogs-20261129-100000"
    assert [claim_folder(wanted).name for _ in range(3)] == [
        "dogs-20261129-100000",
        "dogs-20261129-100000-2",
        "dogs-20261129-100000-3",
    ]


def test_a_trial_that_wants_more_cores_than_there_are_leaves_no_folder(experiment, tmp_path):
    with pytest.raises(ExperimentError, match="cpus_per_trial is 1000, but the machine has"):
        run_search(experiment(search={"cpus_per_trial": 1000}), output=tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_a_folder_that_is_taken_is_refused_before_anything_is_done(experiment, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserMistake, match="taken"):
        run_search(experiment(), output=tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    with pytest.raises(JournalError, match="no search folder"):
        resume_search(tmp_path / "taken")


def test_an_unknown_backbone_leaves_no_folder_and_no_run(experiment, tmp_path):
    with pytest.raises(UserMistake, match="resnet19"):
        run_search(experiment(model={"backbone": "resnet19"}), output=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_an_empty_folder_is_told_as_such(small_search, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        run_search(experiment_on(tmp_path / "empty", small_search), output=tmp_path / "s")


def test_a_search_whose_trials_all_fail_ends_with_their_first_error(experiment, store, tmp_path):
    client = store(tmp_path / "mlflow.db")
    hopeless = experiment(
        training={"optimizer": "sgd", "epochs": 300},
        search={"algorithm": "grid", "space": {"learning_rate": {"values": [1e30, 1e32]}}},
    )
    with pytest.raises(SearchFailed, match=r"All 2 trials failed.*loss is .* at learning rate 1e"):
        run_search(hopeless, output=tmp_path / "s")
    _, trials = runs_of(client)
    assert {run.info.status for run in trials.values()} == {"FAILED"}
    assert not (tmp_path / "s" / "classifier").exists()


def test_mlflow_away_loses_nothing(experiment, store, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    result = run_search(experiment(search={"trials": 2}), output=tmp_path / "s")
    assert result.state == "completed"
    assert result.model is None
    assert "cannot be reached" in result.tracking_problem
    assert result.classifier.is_dir()
    client = store(tmp_path / "mlflow.db")
    assert sync_search(tmp_path / "s").model == "models:/colours/1"
    parent, trials = runs_of(client)
    assert parent.info.status == "FINISHED"
    assert sorted(trials) == ["t0001", "t0002"]


def test_the_run_of_mlflow_run_is_adopted_and_kept_from_the_workers(
    experiment, store, tmp_path, monkeypatch
):
    client = store(tmp_path / "mlflow.db")
    chosen = client.create_experiment("chosen by mlflow run")
    opened = client.create_run(chosen, tags={"mlflow.source.type": "PROJECT"})
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", chosen)
    run_search(experiment(search={"trials": 1}), output=tmp_path / "s")
    parent, trials = runs_of(client, "chosen by mlflow run")
    assert parent.info.run_id == opened.info.run_id
    assert sorted(trials) == ["t0001"]
    assert client.get_experiment_by_name("colours") is None


def test_a_run_left_over_in_the_environment_is_no_search_of_ours(
    experiment, store, tmp_path, monkeypatch
):
    client, notes = store(tmp_path / "mlflow.db"), Notes()
    left = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", left)
    run_search(experiment(search={"trials": 1}), output=tmp_path / "s", observer=notes)
    parent, trials = runs_of(client)
    assert parent.info.status == "FINISHED"
    assert sorted(trials) == ["t0001"]
    untouched = client.get_run(left)
    assert not untouched.data.params
    assert not [tag for tag in untouched.data.tags if tag.startswith("visiontuner.")]
    (said,) = [note for note in notes.notes if left in note]
    assert "`mlflow run` did not open it" in said


def test_prepare_counts_classes_and_finds_broken_images(small_search, tmp_path, images):
    root = tmp_path / "photos"
    shutil.copytree(images, root)
    (root / "train/red/broken.png").write_bytes((root / "train/red/0.png").read_bytes()[:100])
    shutil.copy(root / "train/blue/0.png", root / "valid/blue/copy.png")
    prepared = prepare(experiment_on(root, small_search))
    assert prepared.summary.totals["train"] == 31
    evidence = " ".join(f.evidence for f in prepared.findings)
    assert "broken.png" in evidence
    assert "copy.png" in evidence
