"""A registered model in int8 and for other runtimes: compared, registered, refused, exported."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper

from visiontuner.cli.main import main
from visiontuner.data.dataset import Sample
from visiontuner.experiment.schema import Experiment
from visiontuner.model.classifier import Classifier
from visiontuner.model.int8 import calibration_samples
from visiontuner.serving.registry import log_classifier, logged_model_id
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.lineage import trace
from visiontuner.workflow.tracking_process import register_int8
from visiontuner.workflow.train import one_training, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    new_database: Callable[[Path], str],
    shared_cache: Path,
    images: Path,
    small_search: dict[str, Any],
) -> Path:
    """A folder with images and a training on them, registered as colours/1 and in int8 as /2."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(images, folder / "images")
    raw = {**small_search, "data": {"source": str(folder / "images")}}
    with pytest.MonkeyPatch.context() as patch:
        use(patch, folder, shared_cache)
        new_database(folder / "mlflow.db")
        train(one_training(raw, (), None, where="test"), output=folder / "training")
        shown = run("quantize", "training", "--json")
        assert shown.exit_code == 0, shown.stderr
        (folder / "shown.json").write_text(shown.stdout)
    return folder


def use(patch: pytest.MonkeyPatch, folder: Path, cache: Path) -> None:
    patch.chdir(folder)
    patch.setenv("VISIONTUNER_CACHE", str(cache))
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, home: Path, shared_cache: Path) -> None:
    use(monkeypatch, home, shared_cache)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def versions(home: Path) -> list[Any]:
    found = MlflowClient(f"sqlite:///{home}/mlflow.db").search_model_versions("name = 'colours'")
    return sorted(found, key=lambda version: int(version.version))


def logged_model(version: Any) -> Any:
    return MlflowClient().get_logged_model(logged_model_id(version))


def refused(*arguments: str, code: int = 2) -> str:
    """The one line with which a command ends; nothing was registered."""
    before = len(versions(Path.cwd()))
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert len(versions(Path.cwd())) == before
    return result.stderr.strip().splitlines()[-1]


def test_the_int8_form_is_a_version_of_its_own_that_names_the_float32_one(home: Path) -> None:
    first, second, *_ = versions(home)
    shown = json.loads((home / "shown.json").read_text())
    assert (shown["source"], shown["model"]) == ("models:/colours/1", "models:/colours/2")
    assert second.tags["visiontuner.quantized_from"] == "models:/colours/1"
    for tag in ("visiontuner.search_id", "visiontuner.trial_id", "visiontuner.data_digest"):
        assert second.tags[tag] == first.tags[tag]
    model = MlflowClient().get_registered_model("colours")
    assert model.aliases["challenger"] != "2"
    assert not logged_model(second).metrics
    traced = trace("colours/2")
    assert traced.model is not None
    assert traced.model["quantized_from"] == "models:/colours/1"
    assert "int8 of models:/colours/1" in run("lineage", "colours/2").stdout


def test_an_experiment_can_ask_for_the_int8_form(
    home: Path, monkeypatch: pytest.MonkeyPatch, new_database: Callable[[Path], str]
) -> None:
    class Notes(Silent):
        said: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    asked, silent = Experiment.parse({"package": "int8"}), Notes()
    assert register_int8(home / "training", asked, silent) == "models:/colours/2"
    assert register_int8(home / "training", Experiment.parse({}), silent) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(home / "other.db"))
    assert register_int8(home / "training", asked, silent) is None
    assert silent.said[-1].startswith("warning: package: int8: ")
    assert "not registered" in silent.said[-1]


def test_what_is_shown_is_what_the_two_versions_answer(home: Path) -> None:
    shown = json.loads((home / "shown.json").read_text())
    both = [classifier(home, version) for version in (1, 2)]
    paths = sorted((home / "images" / "valid").rglob("*.png"))
    labels = np.array([path.parent.name for path in paths])
    answers = [np.array([a.label for a in each.predict(paths)]) for each in both]
    assert shown["validation_images"] == len(paths) == 12
    assert shown["accuracy_fp32"] == pytest.approx((answers[0] == labels).mean())
    assert shown["accuracy_int8"] == pytest.approx((answers[1] == labels).mean())
    assert shown["agreement"] == pytest.approx((answers[0] == answers[1]).mean())
    assert shown["loss"] == pytest.approx(shown["accuracy_fp32"] - shown["accuracy_int8"])
    truth = np.array([both[1].class_names.index(name) for name in labels])
    chances = both[1].probabilities(paths)[np.arange(len(paths)), truth]
    assert shown["nll_int8"] == pytest.approx(-np.log(chances).mean(), rel=1e-6)
    assert shown["temperature"] == pytest.approx(both[1].temperature)
    assert min(shown["images_per_second_fp32"], shown["images_per_second_int8"]) > 0


def classifier(home: Path, version: int) -> Classifier:
    source = logged_model(versions(home)[version - 1])
    return Classifier.load(Path(source.artifact_location) / "artifacts" / "classifier")


def test_the_int8_network_is_a_quarter_and_keeps_its_outputs(home: Path) -> None:
    float32, int8 = (classifier(home, version) for version in (1, 2))
    size, quarter = ((each.folder / "model.onnx").stat().st_size for each in (float32, int8))
    assert quarter < 0.27 * size
    assert int8.output_names == float32.output_names == ("logits", "features", "feature_map")
    weights = onnx.load(int8.folder / "model.onnx").graph.initializer
    kinds = {tensor.name: tensor.data_type for tensor in weights}
    assert kinds["head.weight"] == TensorProto.FLOAT
    assert list(kinds.values()).count(TensorProto.INT8) >= 20  # resnet18 has 20 convolutions
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    logits, features, maps = int8.outputs(pixels, int8.output_names)
    np.testing.assert_allclose(maps.mean((2, 3)), features, rtol=1e-4, atol=1e-5)
    alone = np.concatenate([int8.logits(one[None]) for one in pixels])
    np.testing.assert_array_equal(alone, logits)


def test_the_served_int8_model_answers_as_its_classifier(home: Path) -> None:
    import mlflow.pyfunc

    int8 = classifier(home, 2)
    assert int8.verify_reference() < 1e-6
    contents = [path.read_bytes() for path in sorted((home / "images").rglob("*.png"))]
    served = mlflow.pyfunc.load_model("models:/colours/2").predict(
        pd.DataFrame({"image": contents}), params={"top_k": 1}
    )
    expected = int8.probabilities(contents).max(axis=1)
    answered = served["probability"].astype(float)
    np.testing.assert_allclose(answered, expected, rtol=0, atol=1e-5)


def test_test_predictions_of_float32_do_not_promote_int8(home: Path) -> None:
    from visiontuner.workflow.evaluate import evaluate_search

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        evaluate_search(home / "training")
    assert "int8 form of models:/colours/1" in refused("promote", "colours/2")


def test_int8_that_loses_more_than_asked_is_refused(home: Path, tmp_path: Path) -> None:
    """One huge channel, which the head passes over, takes the whole range of the scale."""
    broken = tmp_path / "classifier"
    shutil.copytree(classifier(home, 1).folder, broken)
    names = list(classifier(home, 1).class_names)
    onnx.save(colour_network(names), broken / "model.onnx")
    description = json.loads((broken / "classifier.json").read_text())
    description["preprocessing"] |= {"mean": [0, 0, 0], "std": [1, 1, 1]}
    del description["novelty"]  # of a network with other features
    (broken / "classifier.json").write_text(json.dumps(description))
    reference = json.loads((broken / "reference.json").read_text())
    answers = Classifier.load(broken)
    for image in reference["images"]:
        path = home / "images" / image["path"]
        image["probabilities"] = answers.probabilities([path])[0].tolist()
        image["novelty"] = None
    (broken / "reference.json").write_text(json.dumps(reference))
    log_classifier(
        broken,
        run_id=versions(home)[0].run_id,
        tracking_uri=f"sqlite:///{home}/mlflow.db",
        name="colours",
        derived=True,
    )
    said = refused("quantize", str(broken), code=1)
    assert "is not registered: it loses 66.7 points" in said
    assert "12 validation images" in said
    assert run("quantize", str(broken), "--max-loss", "99").exit_code == 0


def colour_network(names: list[str]) -> onnx.ModelProto:
    """logits = 40 x the mean of the channel of each class's colour."""
    kernel = np.zeros((4, 3, 1, 1), np.float32)
    kernel[[0, 1, 2], [0, 1, 2]] = 1
    weight = np.zeros((4, 3), np.float32)
    for column, name in enumerate(names):
        weight[["red", "green", "blue"].index(name), column] = 40
    tensors = {"kernel": kernel, "shift": np.float32([0, 0, 0, 1e4]), "weight": weight}
    nodes = [
        helper.make_node("Conv", ["image", "kernel", "shift"], ["mixed"], name="conv"),
        helper.make_node("Relu", ["mixed"], ["map"], name="relu"),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["features"], name="flatten"),
        helper.make_node("MatMul", ["features", "weight"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_cannot_be_quantised_is_told_in_one_line(home: Path, tmp_path: Path) -> None:
    assert "in int8 already" in refused("quantize", "colours/2")
    assert "models:/colours/1" in refused("quantize", "colours/2")
    assert "has no version 99" in refused("quantize", "colours/99")
    unknown = tmp_path / "unknown"
    shutil.copytree(classifier(home, 1).folder, unknown)
    description = json.loads((unknown / "classifier.json").read_text())
    del description["novelty"]  # format 1 knows none
    (unknown / "classifier.json").write_text(json.dumps(description))
    assert "is not registered in" in refused("quantize", str(unknown))
    model = onnx.load(unknown / "model.onnx")
    del model.graph.output[1:]
    onnx.save(model, unknown / "model.onnx")
    assert "is of format 1" in refused("quantize", str(unknown))


def test_images_that_are_gone_or_others_are_told_in_one_line(home: Path) -> None:
    one = next((home / "images" / "train").rglob("*.png"))
    kept = one.read_bytes()
    try:
        one.unlink()
        assert "are not those that the model was trained on" in refused("quantize", "colours/1")
    finally:
        one.write_bytes(kept)
    (home / "images").rename(home / "away")
    try:
        assert "int8 needs the images" in refused("quantize", "colours/1")
    finally:
        (home / "away").rename(home / "images")


def test_calibration_takes_as_many_images_of_every_class() -> None:
    samples = [Sample(path=f"{i}", label=int(i >= 90), digest="") for i in range(100)]
    chosen = calibration_samples(samples, 16)
    assert [sample.label for sample in chosen] == [0, 1] * 8
    assert [int(s.path) for s in chosen if s.label == 0] == list(range(0, 88, 11))
    assert len(calibration_samples(samples[85:95], 128)) == 10


# Without the package itself: `-P` and `-S` would leave out numpy too.
_ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "mlflow", "visiontuner"} & set(sys.modules)
"""


@pytest.mark.parametrize(("form", "version"), [("onnx", 1), ("onnx-int8", 2)])
def test_exported_example_answers_as_the_model(
    form: str, version: int, home: Path, tmp_path: Path
) -> None:
    folder, model = tmp_path / "out", classifier(home, version)
    done = run("export", f"colours/{version}", "--to", form, "--output", str(folder))
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "example.py",
        "model.json",
        "model.onnx",
    ]
    about = json.loads((folder / "model.json").read_text())
    assert (about["threshold"], about["temperature"]) == (model.threshold, model.temperature)
    assert tuple(about["class_names"]) == model.class_names
    paths = sorted((home / "images").rglob("*.png"))
    shown = subprocess.run(
        [sys.executable, "-c", _ALONE, str(folder / "example.py"), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("\t") for line in shown.stdout.splitlines()]
    answers = model.predict(paths)
    assert [name for name, *_ in rows] == [answer.label for answer in answers]
    got, expected = [float(row[1]) for row in rows], [answer.probability for answer in answers]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert [row[2] == "confident" for row in rows] == [answer.confident for answer in answers]


def test_int8_of_a_float32_model_is_exported_without_registering_it(tmp_path: Path) -> None:
    before = len(versions(Path.cwd()))
    folder = tmp_path / "out"
    done = run("export", "colours/1", "--to", "onnx-int8", "--output", str(folder))
    assert done.exit_code == 0, done.stderr
    assert json.loads((folder / "model.json").read_text())["metadata"]["quantization"]
    assert len(versions(Path.cwd())) == before


def test_exports_that_cannot_be_are_told_in_one_line(home: Path, tmp_path: Path) -> None:
    full = str(home / "images")
    assert "not empty" in refused("export", "colours/1", "--to", "onnx", "--output", full)
    out = ("--output", str(tmp_path / "out"))
    assert "coremltools converts no ONNX" in refused("export", "colours/1", "--to", "coreml", *out)
    assert "--to onnx-int8" in refused("export", "colours/2", "--to", "onnx", *out)
    assert not (tmp_path / "out").exists()


def test_openvino_answers_as_the_model(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = tmp_path / "out"
    done = run("export", "colours/1", "--to", "openvino", "--output", str(folder))
    assert done.exit_code == 0, done.stderr
    paths = sorted((home / "images").rglob("*.png"))
    shown = subprocess.run(
        [sys.executable, str(folder / "example.py"), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    got = [float(line.split("\t")[1]) for line in shown.stdout.splitlines()]
    expected = [answer.probability for answer in classifier(home, 1).predict(paths)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
