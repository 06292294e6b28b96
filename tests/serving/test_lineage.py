"""From a registered model back to its images, code and machine; and whether that still holds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from visiontuner.cli.judge import lineage as command
from visiontuner.data.dataset import load_dataset
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.serving.registry import classifier_digest, log_classifier
from visiontuner.tracking.store import Store
from visiontuner.workflow.lineage import trace
from visiontuner.workflow.run import describe_code, describe_machine

pytestmark = [
    # MLflow 3.17 uses an option that SQLAlchemy 2.1 deprecates,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    # and warns about its own type hints when it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]


class Traced:
    """A store with one search, one trial and its registered model."""

    def __init__(self, folder: Path, classifier: Path, images: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.folder, self.classifier = folder, classifier
        self.images = folder / "images"
        shutil.copytree(images, self.images)
        self.digest = load_dataset(self.images, cache=folder / "cache").digest
        store = Store(self.uri)
        made = store.call("create_experiment", "e", artifact_location=str(folder / "artifacts"))
        code, machine = describe_code(), describe_machine()
        tags = {
            "kind": "search",
            "search_id": "s1",
            "state": "completed",
            "data_source": str(self.images),
            "data_digest": self.digest,
            "code_commit": str(code["commit"]),
            "code_dirty": str(code["dirty"]),
            "packages": json.dumps({"python": machine["python"], **machine["packages"]}),
        }
        self.search = store.call("create_run", made, run_name="colours-1").info.run_id
        self.tag(store, self.search, tags)
        experiment = Experiment.parse({"name": "c", "data": {"source": str(self.images)}})
        store.call("log_text", self.search, experiment.to_yaml(), "experiment.yaml")
        parents = {"mlflow.parentRunId": self.search}
        self.trial = store.call("create_run", made, tags=parents).info.run_id
        self.tag(store, self.trial, {"kind": "trial", "search_id": "s1", "trial_id": "t0001"})
        store.call("log_param", self.trial, "learning_rate", "0.003")
        self.other = store.call("create_run", made).info.run_id
        self.store = store
        log_classifier(classifier, run_id=self.trial, tracking_uri=self.uri, name="colours")

    def tag(self, store: Store, run_id: str, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            store.call("set_tag", run_id, f"visiontuner.{key}", value)

    @property
    def model_folder(self) -> Path:
        client = MlflowClient(self.uri, self.uri)
        version = client.get_model_version("colours", "1")
        model = client.get_logged_model(str(version.source).removeprefix("models:/"))
        return Path(model.artifact_location.removeprefix("file://")) / "artifacts" / "classifier"


def with_answers(folder: Path, copy: Path) -> Path:
    """The classifier with the probabilities that it gives recorded in its reference."""
    from visiontuner.model.classifier import Classifier

    shutil.copytree(folder, copy)
    reference = json.loads((copy / "reference.json").read_text())
    import base64

    content = [base64.b64decode(image["image"]) for image in reference["images"]]
    rows = Classifier.load(copy).probabilities(content)
    for image, row in zip(reference["images"], rows, strict=True):
        image["probabilities"] = row.tolist()
    (copy / "reference.json").write_text(json.dumps(reference))
    return copy


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory,
    colour_classifier: Path,
    images: Path,
    new_database: Callable[[Path], str],
) -> Traced:
    folder = tmp_path_factory.mktemp("lineage")
    new_database(folder / "mlflow.db")
    return Traced(folder, with_answers(colour_classifier, folder / "classifier"), images)


@pytest.fixture(autouse=True)
def _here(traced: Traced, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", traced.uri)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(traced.folder / "cache"))
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


def test_every_end_leads_to_the_same_lineage(traced: Traced) -> None:
    found = trace("colours")
    assert found.model is not None
    assert found.model["uri"] == "models:/colours/1"
    assert found.model["aliases"] == ["challenger"]
    assert found.model["classifier_digest"] == classifier_digest(traced.classifier)
    assert found.trial is not None
    assert found.trial["run_id"] == traced.trial
    assert found.trial["configuration"] == {"learning_rate": "0.003"}
    assert found.search is not None
    assert found.search["run_id"] == traced.search
    assert found.experiment is not None
    assert found.experiment["data"]["source"] == str(traced.images)
    assert found.data is not None
    assert found.data["digest"] == traced.digest
    assert found.data["class_names"] == ["red", "green", "blue"]
    assert found.environment is not None
    assert "numpy" in found.environment["packages"]
    for subject in ("colours@challenger", "models:/colours/1", traced.trial, traced.search):
        assert trace(subject) == found


@pytest.mark.parametrize("said", [{"threshold": None, "abstains": True}, {"threshold": 1.0}])
def test_a_model_that_always_abstains_is_shown_as_one(traced: Traced, said: dict[str, Any]) -> None:
    described = traced.model_folder / "classifier.json"
    before = described.read_text()
    try:
        described.write_text(json.dumps(json.loads(before) | said))
        assert "threshold out of reach: every answer abstains" in call("colours").stdout
        model = json.loads(call("colours", "--json").stdout)["model"]
        assert (model["threshold"], model["abstains"]) == (None, True)
    finally:
        described.write_text(before)


def test_an_evaluation_is_part_of_it(traced: Traced) -> None:
    report = {
        "metrics": {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}},
        "num_images": 50,
        "looks": 2,
        "classifier_digest": "after calibration",
    }
    traced.store.call("log_text", traced.trial, json.dumps(report), "evaluation/report.json")
    shown = call("colours").stdout
    assert "test accuracy 0.9000 (95 %: 0.8000 to 0.9500) on 50 images" in shown
    assert "test set evaluated 2 time(s); before its calibration" in shown


def test_what_others_made_is_refused_in_one_line(traced: Traced) -> None:
    with pytest.raises(UserMistake, match="was not written by"):
        trace(traced.other)
    with pytest.raises(UserMistake, match="MLflow has no run 0000"):
        trace("0" * 32)
    traced.store.call("create_registered_model", "foreign")
    traced.store.call("create_model_version", "foreign", "somewhere", run_id=traced.other)
    with pytest.raises(UserMistake, match="was not registered by visiontuner"):
        trace("foreign/1")


def test_a_trial_run_without_a_search_says_so(traced: Traced) -> None:
    made = traced.store.call("get_run", traced.trial).info.experiment_id
    alone = traced.store.call("create_run", made).info.run_id
    traced.tag(traced.store, alone, {"kind": "trial", "search_id": "s9", "trial_id": "t0007"})
    found = trace(alone)
    assert found.trial is not None
    assert found.trial["trial_id"] == "t0007"
    (note,) = [note for note in found.notes if "parent" in note]
    assert note.startswith(f"Run {alone} has no parent run, so nothing in MLflow tells of its")
    assert "`visiontuner lineage FOLDER`" in note
    assert not [note for note in found.notes if "None" in note]


def test_json_holds_everything_and_the_checks(traced: Traced) -> None:
    answer = json.loads(call("colours", "--json", "--verify").stdout)
    assert answer["data"]["digest"] == traced.digest
    states = {check["what"]: check["state"] for check in answer["checks"]}
    assert states.pop("code") in ("ok", "differs", "unknown")  # this checkout's own state
    assert states == {
        "classifier digest": "ok",
        "reference images": "ok",
        "data digest": "ok",
        "packages": "ok",
    }


def test_names_are_shown_as_they_are(traced: Traced) -> None:
    traced.store.call("set_tag", traced.search, "visiontuner.host", "[red]host[/red]")
    assert "machine: [red]host[/red]" in call("colours").stdout


class TestVerifyFindsWhatChanged:
    def differing(self) -> dict[str, str]:
        done = call("colours", "--verify", "--json")
        assert done.exit_code == 1
        checks = json.loads(done.stdout)["checks"]
        return {c["what"]: c["detail"] for c in checks if c["state"] == "differs"}

    def test_an_image(self, traced: Traced) -> None:
        image = next(iter(sorted((traced.images / "train").rglob("*.png"))))
        content = image.read_bytes()
        image.unlink()
        try:
            assert "instead of " + traced.digest[:12] in self.differing()["data digest"]
        finally:
            image.write_bytes(content)

    def test_images_that_are_gone_cannot_be_checked(self, traced: Traced) -> None:
        away = traced.images.rename(traced.folder / "away")
        try:
            shown = call("colours", "--verify").stdout
        finally:
            away.rename(traced.images)
        assert "data digest: cannot be checked" in shown

    def test_the_artifact(self, traced: Traced) -> None:
        path = traced.model_folder / "reference.json"
        before = path.read_text()
        reference = json.loads(before)
        reference["images"][0]["probabilities"] = [0.0, 1.0, 0.0]
        path.write_text(json.dumps(reference))
        try:
            found = self.differing()
        finally:
            path.write_text(before)
        assert "instead of" in found["classifier digest"]
        assert "probabilities are off by" in found["reference images"]

    def test_an_artifact_that_is_gone(self, traced: Traced) -> None:
        away = traced.model_folder.rename(traced.folder / "gone")
        try:
            found = self.differing()
        finally:
            away.rename(traced.model_folder)
        assert found["classifier"] == "its files are gone from MLflow"

    def test_a_package(self, traced: Traced) -> None:
        key = "visiontuner.packages"
        before = traced.store.call("get_run", traced.search).data.tags[key]
        traced.store.call("set_tag", traced.search, key, json.dumps({"numpy": "1.0"}))
        try:
            assert self.differing()["packages"].endswith(" instead of 1.0")
        finally:
            traced.store.call("set_tag", traced.search, key, before)


def test_a_search_folder_tells_without_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visiontuner.journal import JournalWriter

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    journal = JournalWriter(tmp_path / "search", "s9")
    journal.append(
        "search_started",
        name="search",
        experiment={"name": "c"},
        data={"digest": "d9", "source": "x", "counts": {"train": 3}},
        code={"commit": None, "version": "0.1.0"},
        machine={"host": "h", "python": "3.11", "packages": {}},
    )
    journal.close()
    shown = call(str(tmp_path / "search"), "--verify")
    assert "digest d9" in shown.stdout
    assert "visiontuner sync" in shown.stdout
    assert "classifier: cannot be checked" in shown.stdout
    assert not (tmp_path / "none.db").exists()


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    refused = call(f"{tmp_path}/")
    assert refused.exit_code == 2
    assert "is no search folder" in refused.stderr
