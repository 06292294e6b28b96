"""A network's training, recorded: its file, MLflow, the rules, the page, the trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from visiontuner.cli.main import main
from visiontuner.diagnostics.history import STEP_PARTS, Recording
from visiontuner.diagnostics.rules import RECORDED_RULES
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord, read_events
from visiontuner.workflow.diagnose import diagnose

pytestmark = pytest.mark.slow

CLOCK = ("epoch_seconds", "images_per_second")
TRIAL = Path("trials/t0001")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, images: Path, small_search: dict[str, Any]
) -> Path:
    """A folder where a whole network was trained far too fast, with everything recorded."""
    home = tmp_path_factory.mktemp("recorded")
    experiment = {**small_search, "data": {"source": str(images)}}
    experiment["model"] = {**experiment["model"], "train": "all"}
    experiment["training"] = {
        **experiment["training"],
        **{"epochs": 4, "batch_size": 8, "record_every_steps": 2, "learning_rate": 0.2},
        **{"optimizer": "sgd", "backbone_learning_rate_factor": 1.0, "schedule": "constant"},
    }
    (home / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return home


@pytest.fixture(scope="module")
def trained(
    home: Path, shared_cache: Path, new_database: Callable[[Path], str]
) -> tuple[Path, Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", new_database(home / "mlflow.db"))
        arguments = ["--experiment", "experiment.yaml", "--output", "run", "--trace", "3-5"]
        result = call("train", *arguments)
    return home / "run", result


@pytest.fixture
def _there(trained: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained[0].parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained[0].parent / 'mlflow.db'}")


def runs(folder: Path) -> tuple[MlflowClient, str]:
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("colours")
    found = client.search_runs([experiment.experiment_id])
    (trial,) = (r for r in found if r.data.tags["visiontuner.kind"] == "trial")
    return client, trial.info.run_id


def test_the_recording_lies_beside_the_trials_other_files(trained):
    folder, result = trained
    assert result.exit_code == 0, result.output
    recording = Recording.load(folder / TRIAL / "recording.npz")
    # 30 images by 8 are 4 steps an epoch.
    assert recording.tensors.steps.tolist() == [1, *range(2, 17, 2)]
    assert "backbone.0" in recording.tensors.layers[0] or "conv1" in recording.tensors.layers[0]
    assert recording.tensors.layers[-1] == "head.1"
    assert recording.tensors.inputs.shape == (8, 3, 32, 32)
    assert recording.steps.steps.tolist() == list(range(1, 17))
    assert recording.steps.images.tolist() == [8, 8, 8, 6] * 4
    assert recording.steps.startup_seconds > 0
    spent = dict(zip(STEP_PARTS, recording.steps.seconds.sum(axis=0), strict=True))
    assert all(seconds > 0 for seconds in spent.values())
    assert spent["backward"] > spent["to_device"]
    assert len(recording.system.times) >= 2
    assert recording.about["steps_per_epoch"] == 4
    assert recording.about["mean"] == [0.485, 0.456, 0.406]


def test_step_times_are_the_epochs_time(trained):
    """What no part holds is the recording itself, evaluation, and the loop's own moves."""
    folder, _ = trained
    recording = Recording.load(folder / TRIAL / "recording.npz")
    record = SearchRecord.load(folder)
    epochs = sum(epoch.metrics["epoch_seconds"] for epoch in record.trials["t0001"].epochs)
    assert 0.2 * epochs < recording.steps.seconds.sum() <= 1.01 * epochs


def test_findings_are_in_the_journal_before_the_trial_ends(trained):
    folder, _ = trained
    events = read_events(folder).events
    kinds = [e["event"] if e["event"] != "finding" else e["rule"] for e in events]
    assert "weight_update_ratio" in kinds
    assert kinds.index("weight_update_ratio") < kinds.index("trial_ended")
    rules = [e["rule"] for e in events if e["event"] == "finding" and e.get("trial_id")]
    assert len(rules) == len(set(rules))


def test_mlflow_holds_recording_figures_and_the_machine(trained):
    folder, _ = trained
    client, run_id = runs(folder)
    files = {f.path for f in client.list_artifacts(run_id)}
    assert {"recording.npz", "trace.json.gz", "figures"} <= files
    drawn = {Path(f.path).stem for f in client.list_artifacts(run_id, "figures")}
    assert {"curves", "gradient_norms", "update_ratios", "step_times", "system_use"} <= drawn
    recording = Recording.load(folder / TRIAL / "recording.npz")
    for name in recording.system.values:
        points = client.get_metric_history(run_id, f"system/{name}")
        assert [p.timestamp for p in points] == [round(t * 1000) for t in recording.system.times]
    metrics = client.get_run(run_id).data.metrics
    assert 0 <= metrics["data_wait_share"] <= 1
    assert metrics["step_seconds"] > 0
    assert metrics["startup_seconds"] == pytest.approx(recording.steps.startup_seconds, rel=1e-3)
    assert metrics["process_memory_peak_megabytes"] > 100


@pytest.mark.usefixtures("_there")
def test_writing_again_changes_nothing(trained):
    folder, _ = trained
    client, run_id = runs(folder)
    name = "system/cpu_utilization_percentage"
    before = client.get_metric_history(run_id, name)
    assert call("sync", str(folder)).exit_code == 0
    assert len(client.get_metric_history(run_id, name)) == len(before)


@pytest.mark.usefixtures("_there")
def test_diagnose_sees_the_same_in_the_folder_and_in_mlflow(trained):
    folder, _ = trained
    (of_folder,) = diagnose(str(folder)).runs
    (of_run,) = diagnose(runs(folder)[1]).runs
    seen = {finding for finding in of_folder.findings if finding.rule in RECORDED_RULES}
    assert "weight_update_ratio" in {finding.rule for finding in seen}
    assert seen == {finding for finding in of_run.findings if finding.rule in RECORDED_RULES}


def test_the_page_shows_the_figure_beside_its_finding(trained):
    page = (trained[0] / "report.html").read_text()
    row = next(line for line in page.splitlines() if "<td>weight_update_ratio</td>" in line)
    assert "The figure of t0001" in row
    assert 'src="data:image/png;base64,' in row


def test_a_trace_opens_in_perfetto(trained):
    folder, result = trained
    assert "trace.json.gz (open it in https://ui.perfetto.dev)" in result.output.replace("\n", "")
    trace = json.loads(gzip.decompress((folder / TRIAL / "trace.json.gz").read_bytes()))
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    names = {event["name"] for event in events}
    assert {"step 3", "step 4", "step 5"} <= names
    assert not {"step 2", "step 6"} & names
    assert any("conv" in name for name in names)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    (third,) = (event for event in events if event["name"] == "step 3")
    inside = [e for e in events if third["ts"] <= e["ts"] < third["ts"] + third["dur"]]
    assert len(inside) > 50


@pytest.mark.parametrize("steps", ["0-2", "5-3", "a", "3-x"])
def test_steps_to_trace_are_checked(tmp_path, steps, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train", f"--trace={steps}", "--output", "x")
    assert result.exit_code == 2
    assert "--trace" in result.output


@pytest.mark.usefixtures("_there")
def test_not_recorded_is_the_same_training(trained, tmp_path, shared_cache, monkeypatch):
    folder, _ = trained
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    again = tmp_path / "again"
    arguments = ["--experiment", "experiment.yaml", "--output", str(again)]
    assert call("train", *arguments, "--set", "training.record_every_steps=0").exit_code == 0
    numbers = [
        [
            {k: v for k, v in epoch.metrics.items() if k not in CLOCK}
            for epoch in SearchRecord.load(where).trials["t0001"].epochs
        ]
        for where in (folder, again)
    ]
    np.testing.assert_equal(numbers[0], numbers[1])
    assert not (again / TRIAL / "recording.npz").exists()


@pytest.mark.parametrize(
    ("train", "asked", "every"),
    [
        ("head", None, 0),
        ("head", 10, 10),
        ("last_stage", None, 50),
        ("all", 0, 0),
    ],
)
def test_networks_are_recorded_and_heads_are_not_unless_somebody_says_so(train, asked, every):
    raw = {"model": {"train": train}, "training": {"record_every_steps": asked}}
    assert Experiment.parse(raw).record_every_steps == every
