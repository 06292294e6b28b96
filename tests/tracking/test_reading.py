"""Runs read back from MLflow: the same rows as from the journal, and other tools' runs."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from visiontuner.errors import TrackingError, UserMistake
from visiontuner.evaluation.compare import default_columns, runs_of_record, sort, table
from visiontuner.journal import SearchRecord
from visiontuner.tracking.reading import Reader
from visiontuner.tracking.store import TrackingRefused
from visiontuner.tracking.writer import MlflowWriter

# MLflow 3.17 uses an option that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture
def uri(
    tmp_path: Path, new_database: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.chdir(tmp_path)
    return new_database(tmp_path / "mlflow.db")


@pytest.fixture
def search(new_search: Callable[..., Any]) -> Any:
    """Four trials: two good, one failed, one with a finding and still running."""
    search = new_search("images-20261122")
    search.begin()
    search.trial(1)
    search.trial(2, state="stopped_early", reason="asha")
    search.start(3)
    search.epoch(3, 1)
    search.end(3, state="failed", error="loss is NaN", best_value=None, best_epoch=None)
    search.start(4)
    search.epoch(4, 1)
    search.append(
        "finding", trial_id="t0004", attempt=1, rule="overfit", severity="warning",
        evidence="", advice="",
    )  # fmt: skip
    return search


def write(folder: Path, uri: str) -> MlflowWriter:
    with MlflowWriter(folder, tracking_uri=uri, draw=False) as writer:
        writer.catch_up()
    return writer


def comparable(rows: Any) -> list[tuple[Any, ...]]:
    """What a journal and MLflow must agree on."""
    frame = sort(table(rows)).drop(columns=["run_id"])
    params = [name for name in frame.attrs["params"] if name in frame]
    names = [*default_columns(frame), *params, frame.attrs["score"], "started", "findings"]
    return [tuple(map(str, row)) for row in frame[list(dict.fromkeys(names))].to_numpy()]


def test_mlflow_and_the_journal_give_the_same_table(search, uri):
    parent = write(search.folder, uri).parent_run_id
    record = SearchRecord.load(search.folder)
    from_journal = runs_of_record(record, name="images-20261122", running=True)
    from_mlflow = Reader(uri).runs(parent)
    assert comparable(from_mlflow) == comparable(from_journal)
    states = {run.run: run.state for run in from_mlflow}
    assert states == {
        "t0001": "completed", "t0002": "stopped_early", "t0003": "failed", "t0004": "running",
    }  # fmt: skip
    found = {run.run: run for run in from_mlflow}
    assert found["t0004"].findings == ("overfit",)
    assert found["t0003"].reason == "loss is NaN"
    assert found["t0001"].params["training.epochs"] == "20"


def test_a_search_is_found_by_run_experiment_and_name(search, uri):
    parent = write(search.folder, uri).parent_run_id
    for target in (parent, "images", "images-20261122"):
        runs = Reader(uri).runs(target)
        assert [run.run for run in runs] == ["t0001", "t0002", "t0003", "t0004"], target
        assert {run.search for run in runs} == {"images-20261122"}


def test_one_trial_alone_keeps_its_objective_and_its_searchs_settings(search, uri):
    run_id = write(search.folder, uri).run_ids["t0001"]
    (run,) = Reader(uri).runs(run_id)
    assert (run.objective, run.best_value) == ("validation_accuracy", pytest.approx(0.53))
    assert run.params["model.backbone"] == "efficientnet_lite0"
    steps, values = Reader(uri).curve(run_id, "validation_accuracy")
    assert steps == [1, 2, 3]
    assert values == sorted(values)
    assert Reader(uri).curve(run_id, "no such metric") == ([], [])


def test_a_model_means_the_run_that_made_it(search, uri):
    run_id = write(search.folder, uri).run_ids["t0002"]
    client = MlflowClient(uri)
    client.create_registered_model("dogs")
    client.create_model_version("dogs", f"runs:/{run_id}/model", run_id=run_id)
    client.set_registered_model_alias("dogs", "champion", "1")
    for target in ("models:/dogs/1", "models:/dogs@champion"):
        (run,) = Reader(uri).runs(target)
        assert run.run == "t0002"
    for target in ("models:/dogs/7", "models:/cats/1", "models:/dogs@nobody"):
        with pytest.raises(UserMistake, match="has no model models:/"):
            Reader(uri).runs(target)
    with pytest.raises(UserMistake, match="write models:/NAME/VERSION"):
        Reader(uri).runs("models:/dogs")


def test_runs_of_other_tools_are_rows_too(uri):
    client = MlflowClient(uri)
    experiment = client.create_experiment("theirs")
    full = client.create_run(experiment, run_name="full", start_time=1000).info.run_id
    client.log_param(full, "lr", "0.1")
    client.log_param(full, "some name/with: all", "=1+1")
    for number, value in enumerate((0.5, math.nan, 0.7)):
        client.log_metric(full, "val/acc", value, timestamp=number, step=0)
    client.set_terminated(full, end_time=3000)
    child = client.create_run(experiment, run_name="child", tags={"mlflow.parentRunId": full})
    client.set_tag(child.info.run_id, "visiontuner.best_epoch", "<b>")
    bare = client.create_run(experiment, run_name="bare", start_time=500).info.run_id

    runs = {run.run: run for run in Reader(uri).runs("theirs")}
    assert set(runs) == {"full", "child", "bare"}
    assert (runs["full"].state, runs["full"].seconds) == ("finished", 2.0)
    assert (runs["bare"].state, runs["bare"].seconds) == ("running", None)
    assert runs["child"].best_epoch is None
    frame = sort(table(list(runs.values())), "val/acc")
    assert frame["run"].iloc[0] == "full"
    # All logged at step 0: numbered by time.
    assert Reader(uri).curve(full, "val/acc")[0] == [1, 2, 3]
    assert [run.run for run in Reader(uri).runs(full)] == ["child"]
    assert [run.run for run in Reader(uri).runs(bare)] == ["bare"]


def test_what_is_not_there_is_said_in_one_line(search, uri):
    write(search.folder, uri)
    client = MlflowClient(uri)
    with pytest.raises(UserMistake, match=f"has no run {'f' * 32}"):
        Reader(uri).runs("f" * 32)
    with pytest.raises(UserMistake, match=r"'pictres' is no search folder.*Nearest: images"):
        Reader(uri).runs("pictres")
    with pytest.raises(UserMistake, match="no search folder"):
        Reader(uri).runs('it\'s "so"; DROP TABLE runs')
    run = Reader(uri).runs("images")[0]
    client.delete_run(run.run_id)
    assert len(Reader(uri).runs("images")) == 3
    with pytest.raises(TrackingRefused, match=f"mlflow runs restore --run-id {run.run_id}"):
        Reader(uri).runs(run.run_id)
    client.delete_experiment(client.get_experiment_by_name("images").experiment_id)
    with pytest.raises(TrackingRefused, match="mlflow experiments restore"):
        Reader(uri).runs("images")


def test_reading_makes_no_database(tmp_path):
    with pytest.raises(TrackingRefused, match="no MLflow database"):
        Reader(f"sqlite:///{tmp_path}/mlflow.db").runs("images")
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_without_runs_and_a_search_without_trials_are_empty(uri, new_search):
    MlflowClient(uri).create_experiment("nothing")
    assert Reader(uri).runs("nothing") == []
    search = new_search("begun")
    search.begin()
    assert Reader(uri).runs(write(search.folder, uri).parent_run_id) == []


def test_more_runs_than_a_page_are_all_read_once(uri, new_search, monkeypatch):
    search = new_search("many")
    search.begin()
    for number in range(1, 8):
        search.trial(number, epochs=1)
    write(search.folder, uri)
    monkeypatch.setattr("visiontuner.tracking.reading._PAGE", 3)
    assert [run.run for run in Reader(uri).runs("images")] == [f"t000{n}" for n in range(1, 8)]


@pytest.fixture
def server(tmp_path: Path, uri: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real `mlflow server` on the test's database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", uri],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(address: str) -> None:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
def test_a_server_gives_the_same_runs_and_one_line_when_it_is_gone(search, uri, server):
    parent = write(search.folder, uri).parent_run_id
    address, process = server
    reader = Reader(address)
    assert reader.runs(parent) == Reader(uri).runs(parent)
    run_id = reader.runs(parent)[0].run_id
    assert reader.curve(run_id, "train_loss") == Reader(uri).curve(run_id, "train_loss")
    with pytest.raises(UserMistake, match=f"has no run {'e' * 32}"):
        reader.runs("e" * 32)
    with pytest.raises(UserMistake, match="has no model"):
        reader.runs("models:/dogs/1")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(TrackingError, match="compare search folders") as error:
        reader.runs(parent)
    assert "\n" not in str(error.value)
