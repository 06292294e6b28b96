"""What MLflow's pages show of a search: the view behind the printed link, and descriptions."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run

from visiontuner.tracking.view import VIEW_TAG, link_of, shared_view, view_link
from visiontuner.tracking.writer import MlflowWriter

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NOTE = "mlflow.note.content"


def write(folder: Path, uri: str) -> dict[str, Run]:
    """The runs that a store holds afterwards, by name."""
    with MlflowWriter(folder, tracking_uri=uri, draw=False) as writer:
        writer.catch_up()
    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(ids)}


@pytest.fixture
def search(new_search: Any) -> Any:
    made = new_search()
    made.begin()
    for number in range(1, 8):
        made.trial(number)
    made.finish()
    return made


@pytest.fixture
def uri(tmp_path: Path, new_database: Callable[[Path], str], monkeypatch: Any) -> str:
    monkeypatch.chdir(tmp_path)
    return new_database(tmp_path / "mlflow.db")


def evaluate(folder: Path, trial_id: str) -> None:
    """The part of an evaluation's report that descriptions are made of."""
    report = {
        "trial_id": trial_id,
        "classifier_digest": "d",
        "looks": 1,
        "metrics": {"accuracy": {"value": 0.9, "low": 0.85, "high": 0.94}},
        "num_images": 179,
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "report.json").write_text(json.dumps(report))


def test_the_view_shows_what_was_searched_and_the_best_first() -> None:
    state = json.loads(shared_view("validation_loss", ["learning_rate", "dropout"]))
    assert state["selectedColumns"][:4] == [
        "metrics.`best_validation_loss`",
        "params.`learning_rate`",
        "params.`batch_size`",
        "params.`dropout`",
    ]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`best_validation_loss`", True)
    assert json.loads(shared_view("validation_accuracy", []))["orderByAsc"] is False
    assert len(shared_view("validation_macro_f1", [f"name_{n}" for n in range(10)])) < 5000


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("sqlite:///mlflow.db", "http://127.0.0.1:5000"),
        ("https://me:secret@mlflow.example.org/team/?token=x", "https://mlflow.example.org/team"),
    ],
)
def test_the_link_names_the_server_and_no_password(uri: str, server: str) -> None:
    assert view_link(uri, "7") == (
        f"{server}/#/experiments/7/runs?viewStateShareKey=visiontuner&workflowType=machine_learning"
    )


def test_the_writer_shares_the_view_and_says_whose_runs_they_are(search: Any, uri: str) -> None:
    runs = write(search.folder, uri)
    experiment = MlflowClient(uri).get_experiment_by_name("images")
    view = json.loads(experiment.tags[VIEW_TAG])
    assert view["orderByKey"] == "metrics.`best_validation_accuracy`"
    assert str(link_of(search.folder, uri)) == view_link(uri, experiment.experiment_id)
    for run in runs.values():
        assert run.data.tags["mlflow.source.name"] == "visiontuner tune"
        assert run.data.tags["mlflow.source.type"] == "LOCAL"
        assert run.data.tags["mlflow.source.git.commit"] == "c0ffee"
        assert run.data.tags["mlflow.user"]


def test_a_searchs_run_is_described_with_its_five_best(search: Any, uri: str) -> None:
    lines = write(search.folder, uri)["images-20261122"].data.tags[NOTE].splitlines()
    assert lines[0] == (
        "**Best of 7 trials: t0006**, validation_accuracy **0.6800** in epoch 2: "
        "learning_rate 0.01006, batch_size 32."
    )
    assert [line.split(" | ")[0] for line in lines if line.startswith("| t0")] == [
        "| t0006", "| t0005", "| t0004", "| t0003", "| t0002",
    ]  # fmt: skip
    assert any(line.endswith("visiontuner evaluate search`") for line in lines)


def test_an_evaluation_is_in_the_descriptions_of_search_and_trial(search: Any, uri: str) -> None:
    before = write(search.folder, uri)
    assert "Test" not in before["t0006"].data.tags[NOTE]
    evaluate(search.folder, "t0006")
    runs = write(search.folder, uri)
    result = "**Test:** accuracy 0.9000 (95 %: 0.8500 to 0.9400) on 179 images, trial t0006."
    assert result in runs["images-20261122"].data.tags[NOTE]
    assert "visiontuner promote images`" in runs["images-20261122"].data.tags[NOTE]
    assert runs["t0006"].data.tags[NOTE].startswith("validation_accuracy **0.6800** in epoch 2")
    assert result in runs["t0006"].data.tags[NOTE]
    assert runs["t0005"].data.tags[NOTE] == before["t0005"].data.tags[NOTE]


def test_a_description_that_a_person_wrote_stays(search: Any, uri: str) -> None:
    client = MlflowClient(uri)
    mine = {"images-20261122": "Ours, for the paper.", "t0006": "Look at this one."}
    runs = write(search.folder, uri)
    for name, text in mine.items():
        client.set_tag(runs[name].info.run_id, NOTE, text)
    evaluate(search.folder, "t0006")
    runs = write(search.folder, uri)
    assert {name: runs[name].data.tags[NOTE] for name in mine} == mine


def test_a_failed_trials_description_says_why(new_search: Any, uri: str) -> None:
    search = new_search()
    search.begin()
    search.start(1)
    search.end(1, "failed", error="out of memory", best_epoch=None, best_value=None)
    search.finish()
    runs = write(search.folder, uri)
    assert "failed.\n\nout of memory" in runs["t0001"].data.tags[NOTE]
    assert runs["images-20261122"].data.tags[NOTE].startswith("1 of 1 trials")


# In a browser


@pytest.fixture
def server(uri: str, tmp_path: Path) -> Iterator[str]:
    """A real `mlflow server` on the test's database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", uri],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def page(address: str, folder: Path) -> str:
    """The document of a page once its scripts have run, as headless chromium shows it."""
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--window-size=3000,1400", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=30000", "--dump-dom", address,
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `apt-get install chromium`")
def test_the_link_opens_the_columns_in_order_and_the_charts(
    search: Any, server: str, tmp_path: Path
) -> None:
    runs = write(search.folder, server)
    link = str(link_of(search.folder, server))
    table = page(link, tmp_path)
    for column in ("best_validation_accuracy", "learning_rate", "batch_size", "validation_loss"):
        assert f'col-id="{kind_of(column)}.`{column}`"' in table
    names = [f"t{number:04d}" for number in (6, 5, 4, 3, 2)]
    places = [table.index(f">{name}<") for name in names]
    assert places == sorted(places)  # the best first
    charts = re.sub("<[^>]*>", "", page(f"{link}&compareRunsMode=CHART", tmp_path))
    assert "Search(4)" in charts
    run = page(f"{server}/#/experiments/1/runs/{runs['t0006'].info.run_id}", tmp_path)
    assert "<strong>0.6800</strong> in epoch 2" in run


def kind_of(column: str) -> str:
    return "params" if column in ("learning_rate", "batch_size") else "metrics"
