import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput

from visiontuner.errors import ClassifierError, TrackingError
from visiontuner.serving import registry
from visiontuner.serving import registry as model_parts
from visiontuner.serving.registry import classifier_digest, log_classifier


@pytest.fixture(scope="module")
def trial(
    tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], str]
) -> tuple[str, str]:
    """A store with a search's and a trial's run: (tracking URI, the trial's run id)."""
    folder = tmp_path_factory.mktemp("store")
    uri = new_database(folder / "mlflow.db")
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("colours", artifact_location=str(folder / "artifacts"))
    search_tags = {"visiontuner.data_digest": "d1", "visiontuner.code_commit": "c1"}
    parent = client.create_run(experiment, tags=search_tags).info.run_id
    dataset = Dataset("colours", "d1", "local", json.dumps({"uri": "colours"}))
    client.log_inputs(parent, datasets=[DatasetInput(dataset)])
    tags = {
        "mlflow.parentRunId": parent,
        "visiontuner.search_id": "s1",
        "visiontuner.trial_id": "t0001",
    }
    run_id = client.create_run(experiment, tags=tags).info.run_id
    client.log_metric(run_id, "best_validation_accuracy", 0.9, step=3)
    client.set_terminated(run_id)
    return uri, run_id


@pytest.fixture(scope="module")
def logged(trial: tuple[str, str], colour_classifier: Path) -> registry.ModelVersionInfo:
    uri, run_id = trial
    return log_classifier(colour_classifier, run_id=run_id, tracking_uri=uri, name="colours")


@pytest.fixture(scope="module")
def model_folder(trial: tuple[str, str], logged: registry.ModelVersionInfo) -> Path:
    client = MlflowClient(trial[0], trial[0])
    location = Path(client.get_logged_model(logged.model_id).artifact_location)
    assert location.is_dir()
    return location


def test_the_newest_version_is_the_challenger_and_says_where_it_comes_from(
    trial: tuple[str, str], logged: registry.ModelVersionInfo, colour_classifier: Path
) -> None:
    client = MlflowClient(trial[0], trial[0])
    version = client.get_model_version_by_alias("colours", "challenger")
    assert str(version.version) == logged.version
    assert logged.uri == f"models:/colours/{logged.version}"
    assert version.run_id == trial[1]
    expected = {
        "visiontuner.search_id": "s1",
        "visiontuner.trial_id": "t0001",
        "visiontuner.data_digest": "d1",
        "visiontuner.code_commit": "c1",
        "visiontuner.classifier_digest": classifier_digest(colour_classifier),
    }
    assert expected.items() <= version.tags.items()
    model = client.get_logged_model(logged.model_id)
    assert expected.items() <= model.tags.items()
    assert model.metrics is not None
    (metric,) = model.metrics
    assert (metric.key, metric.value) == ("best_validation_accuracy", 0.9)
    assert (metric.dataset_name, metric.dataset_digest) == ("colours", "d1")
    run = client.get_run(trial[1])
    assert [i.dataset.digest for i in run.inputs.dataset_inputs] == ["d1"]
    # The run's own curve has no point more.
    assert set(client.get_run(trial[1]).data.metrics) == {"best_validation_accuracy"}
    assert len(client.get_metric_history(trial[1], "best_validation_accuracy")) == 1


def test_logging_again_logs_nothing(
    trial: tuple[str, str], logged: registry.ModelVersionInfo, colour_classifier: Path
) -> None:
    uri, run_id = trial
    again = log_classifier(colour_classifier, run_id=run_id, tracking_uri=uri, name="colours")
    assert again == logged
    client = MlflowClient(uri, uri)
    assert len(client.search_model_versions("name = 'colours'")) == 1
    experiment = client.get_run(run_id).info.experiment_id
    assert len(client.search_logged_models([experiment])) == 1


def test_a_logged_model_is_named_after_trial_stage_and_evaluation(
    trial: tuple[str, str],
    logged: registry.ModelVersionInfo,
    colour_classifier: Path,
    tmp_path: Path,
) -> None:
    uri, run_id = trial
    client = MlflowClient(uri, uri)
    assert client.get_logged_model(logged.model_id).name == "t0001"
    other = Path(shutil.copytree(colour_classifier, tmp_path / "classifier"))
    (other / "note.txt").write_text("another temperature")
    tags = {"visiontuner.evaluated": "true", "visiontuner.stage": "network"}
    version = log_classifier(other, run_id=run_id, tracking_uri=uri, name="others", tags=tags)
    assert client.get_logged_model(version.model_id).name == "t0001-network-calibrated"
    client.delete_logged_model(version.model_id)


def test_a_kill_between_logging_and_registering_is_made_good(
    trial: tuple[str, str],
    logged: registry.ModelVersionInfo,
    colour_classifier: Path,
) -> None:
    """Another name stands for a registration that never happened: the model is not logged again."""
    uri, run_id = trial
    other = log_classifier(colour_classifier, run_id=run_id, tracking_uri=uri, name="second")
    assert other.model_id == logged.model_id


def test_the_model_holds_no_pickle_and_no_more_code_than_it_needs(model_folder: Path) -> None:
    files = {p.relative_to(model_folder).as_posix() for p in model_folder.rglob("*") if p.is_file()}
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    for path in model_folder.rglob("*"):
        # Every pickle since protocol 2 begins with these bytes.
        assert not path.is_file() or path.read_bytes()[:1] != b"\x80", path
    code = {name for name in files if name.startswith("code/") and "__pycache__" not in name}
    (package,) = {name.split("/")[1] for name in code}
    assert re.fullmatch(r"visiontuner_[0-9a-f]{12}", package)
    assert code == {f"code/{package}/{name}" for name in model_parts.CODE}
    assert {
        "artifacts/classifier/classifier.json",
        "artifacts/classifier/model.onnx",
        "artifacts/classifier/weights.safetensors",
        "artifacts/classifier/reference.json",
    } <= files


def test_the_artifact_has_one_name_whatever_the_folders(
    colour_classifier: Path, tmp_path: Path
) -> None:
    """What serves, checks and deploys a model finds it by that name."""
    folder = shutil.copytree(colour_classifier, tmp_path / "my best one")
    model = registry.save_classifier(folder, tmp_path / "model")
    assert classifier_digest(model / "artifacts" / "classifier") == classifier_digest(folder)
    assert [path.name for path in (model / "artifacts").iterdir()] == ["classifier"]


def test_requirements_are_exact_and_light(model_folder: Path) -> None:
    lines = (model_folder / "requirements.txt").read_text().split()
    assert sorted(lines) == sorted(model_parts.requirements())
    assert all("==" in line for line in lines)
    assert not [line for line in lines if line.startswith(("torch", "mlflow=="))]


def test_the_model_answers_with_names_without_torch(
    model_folder: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    """In a fresh process that has no visiontuner."""
    (tmp_path / "green.png").write_bytes(make_image("green"))
    program = f"""
import sys, json, warnings
warnings.simplefilter("ignore")
sys.path = [p for p in sys.path if not p.rstrip("/").endswith("src")]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import mlflow.pyfunc, pandas as pd
model = mlflow.pyfunc.load_model({str(model_folder)!r})
content = open({str(tmp_path / "green.png")!r}, "rb").read()
answer = model.predict(pd.DataFrame({{"image": [content]}}), params={{"top_k": 2}})
assert "torch" not in sys.modules
assert "visiontuner" not in sys.modules
print(answer.to_json(orient="records"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])
    assert row["label"] == "green"
    assert [choice["label"] for choice in row["top_k"]] == ["green", "red"]
    assert row["probability"] == row["top_k"][0]["probability"]


def test_base64_through_the_scoring_protocol(
    model_folder: Path, make_image: Callable[..., bytes]
) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    model = mlflow.pyfunc.load_model(str(model_folder))
    rows = [[base64.b64encode(make_image(colour)).decode()] for colour in ("blue", "red")]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}})
    answer = invocations(body, "application/json", model, model.metadata.get_input_schema())
    assert answer.status == 200
    labels = [row["label"] for row in json.loads(answer.response)["predictions"]]
    assert labels == ["blue", "red"]
    rows[1] = [base64.b64encode(b"no image").decode()]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}})
    with pytest.raises(mlflow.MlflowException, match="Row 1: ") as refused:
        invocations(body, "application/json", model, model.metadata.get_input_schema())
    assert refused.value.get_http_status_code() == 400
    assert "Traceback" not in str(refused.value)


def test_the_processes_own_uris_stay(
    trial: tuple[str, str],
    colour_classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def log() -> None:
        log_classifier(colour_classifier, run_id=trial[1], tracking_uri=trial[0], name="colours")

    log()
    assert "MLFLOW_REGISTRY_URI" not in os.environ
    own = f"sqlite:///{tmp_path}/own.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    log()
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == own
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/registry.db")
    log()
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == own
    assert mlflow.get_registry_uri() == os.environ["MLFLOW_REGISTRY_URI"]
    assert mlflow.get_registry_uri().endswith("registry.db")


def test_a_process_that_loads_a_model_keeps_its_own_visiontuner(model_folder: Path) -> None:
    program = f"""
import mlflow.pyfunc
mlflow.pyfunc.load_model({str(model_folder)!r})
import visiontuner.workflow.tune
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_that_is_no_classifier_is_refused(trial: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match=r"classifier\.json"):
        log_classifier(tmp_path, run_id=trial[1], tracking_uri=trial[0], name="colours")


def test_an_unknown_run_is_a_tracking_error(
    trial: tuple[str, str], colour_classifier: Path
) -> None:
    with pytest.raises(TrackingError, match="could not take the model"):
        log_classifier(colour_classifier, run_id="0" * 32, tracking_uri=trial[0], name="colours")


class TestPredict:
    """The model itself, without a server."""

    @pytest.fixture
    def model(self, model_folder: Path) -> Any:
        return mlflow.pyfunc.load_model(str(model_folder)).unwrap_python_model()

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (pd.DataFrame({"photo": [b"x"]}), 'a column "image"'),
            (pd.DataFrame({"image": ["/etc/passwd"]}), "Row 0: image is not base64"),
            (pd.DataFrame({"image": [3.5]}), "Row 0: image must be bytes"),
            (pd.DataFrame({"image": [None]}), "Row 0: image must be bytes"),
            (pd.DataFrame({"image": [b""]}), "Row 0: "),
            ([b"x"], 'a column "image"'),
        ],
    )
    def test_what_is_no_image_is_refused_with_its_row(
        self, model: Any, table: object, message: str
    ) -> None:
        with pytest.raises(mlflow.MlflowException, match=message) as refused:
            model.predict(None, table)
        assert refused.value.error_code == "INVALID_PARAMETER_VALUE"

    @pytest.mark.parametrize("top_k", [0, -1, True, 1.5])
    def test_top_k_must_be_a_whole_number(
        self, model: Any, make_image: Callable[..., bytes], top_k: object
    ) -> None:
        with pytest.raises(mlflow.MlflowException, match="top_k must be"):
            model.predict(None, pd.DataFrame({"image": [make_image("red")]}), {"top_k": top_k})

    def test_no_rows_give_no_rows(self, model: Any) -> None:
        assert len(model.predict(None, pd.DataFrame({"image": []}))) == 0

    def test_a_fault_of_ours_is_a_500_without_details(
        self, model: Any, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model, "classifier", None)
        with pytest.raises(mlflow.MlflowException, match=r"^internal error$") as failed:
            model.predict(None, pd.DataFrame({"image": [make_image("red")]}))
        assert failed.value.get_http_status_code() == 500
