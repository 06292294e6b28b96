from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file

from visiontuner.data.dataset import ImageDataset
from visiontuner.data.images import normalise, read_pixels
from visiontuner.errors import BadImageError, ClassifierError, DataError, ExportError
from visiontuner.model import package as package_module
from visiontuner.model.backbones import Backbone, load_backbone
from visiontuner.model.classifier import Classifier, softmax
from visiontuner.model.package import package_classifier, with_head

Package = Callable[..., Classifier]


def _head(path: Path, num_classes: int = 2, dim: int = 512) -> Path:
    torch.manual_seed(1)
    weight, bias = torch.randn(num_classes, dim), torch.randn(num_classes)
    save_file({"weight": weight, "bias": bias}, path)
    return path


@pytest.fixture
def dataset(make_dataset: Callable[..., ImageDataset]) -> ImageDataset:
    return make_dataset(train=2, validation=4)


@pytest.fixture
def package(dataset: ImageDataset, resnet: Backbone, cache: Path, tmp_path: Path) -> Package:
    def run(**options: object) -> Classifier:
        samples = dataset.splits["validation"]
        defaults = {
            "folder": tmp_path / "search" / "classifier",
            "backbone": resnet,
            "head_weights": _head(tmp_path / "head.safetensors"),
            "class_names": ("a", "b"),
            "dataset_root": dataset.root,
            "reference_paths": [sample.path for sample in samples],
            "reference_labels": [sample.label for sample in samples],
            "metadata": {"trial_id": "t0001"},
            "cache": cache,
        }
        return package_classifier(**(defaults | options))

    return run


def test_classifier_answers_as_torch_does(
    package: Package, dataset: ImageDataset, resnet: Backbone, tmp_path: Path
) -> None:
    classifier = package()
    paths = [dataset.root / sample.path for sample in dataset.splits["validation"]]
    pixels = np.stack([read_pixels(path, resnet.preprocessing) for path in paths])
    head = load_file(tmp_path / "head.safetensors")
    with torch.inference_mode():
        features = resnet.module(torch.from_numpy(normalise(pixels, resnet.preprocessing)))
        logits = features @ head["weight"].T + head["bias"]
    probabilities = classifier.probabilities(paths)
    np.testing.assert_allclose(probabilities, torch.softmax(logits, 1).numpy(), atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    answers = classifier.predict([path.read_bytes() for path in paths], top_k=9)
    assert [a.label for a in answers] == [("a", "b")[i] for i in logits.argmax(1)]
    assert answers[0].probability == probabilities[0].max()
    assert [len(answer.top_k) for answer in answers] == [2] * 4
    assert classifier.metadata["trial_id"] == "t0001"
    assert classifier.metadata["onnx_difference"] < 1e-3


def test_features_and_the_map_whose_mean_they_are_come_with_the_logits(
    package: Package, dataset: ImageDataset, resnet: Backbone, tmp_path: Path
) -> None:
    classifier = package()
    assert classifier.output_names == ("logits", "features", "feature_map")
    paths = [dataset.root / sample.path for sample in dataset.splits["validation"]]
    pixels = np.stack([read_pixels(path, resnet.preprocessing) for path in paths])
    logits, features, maps = classifier.outputs(pixels, classifier.output_names)
    with torch.inference_mode():
        expected = resnet.module(torch.from_numpy(normalise(pixels, resnet.preprocessing)))
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert maps.shape == (4, 512, 2, 2)
    # Class activation maps are exact: their mean plus the bias is the logit.
    head = load_file(tmp_path / "head.safetensors")
    class_maps = np.einsum("cd,bdhw->bchw", head["weight"].numpy(), maps)
    activation = class_maps.mean((2, 3)) + head["bias"].numpy()
    np.testing.assert_allclose(activation, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_both_sides_of_an_image_give_its_features_in_artifact_and_network_alike(
    package: Package, dataset: ImageDataset, cache: Path
) -> None:
    views = load_backbone("resnet18", weights="none", image_size=64, views="flip", cache=cache)
    plain = load_backbone("resnet18", weights="none", image_size=64, cache=cache)
    assert views.weights_digest != plain.weights_digest  # caches tell them apart
    classifier = package(backbone=views)
    assert classifier.metadata["views"] == "flip"
    paths = [dataset.root / sample.path for sample in dataset.splits["validation"]]
    pixels = np.stack([read_pixels(path, views.preprocessing) for path in paths])
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    np.testing.assert_allclose(classifier.logits(pixels), classifier.logits(mirrored), atol=1e-4)
    with torch.inference_mode():
        sides = [
            plain.module(torch.from_numpy(normalise(side, plain.preprocessing)))
            for side in (pixels, mirrored)
        ]
    (features,) = classifier.outputs(pixels, ["features"])
    np.testing.assert_allclose(features, torch.stack(sides).mean(0), rtol=1e-4, atol=1e-4)
    # The weights begin a training with one view: their names are those of the plain network.
    names = {
        name.removeprefix("backbone.")
        for name in load_file(classifier.folder / "weights.safetensors")
    }
    assert set(plain.module.state_dict()) < names


@pytest.mark.parametrize(
    ("pooling", "outputs"),
    [
        (["GlobalAveragePool", "Flatten"], ["logits", "features", "feature_map"]),
        (["GlobalMaxPool", "Flatten"], ["logits", "features"]),
        (["GlobalAveragePool", "Flatten", "Relu"], ["logits", "features"]),
    ],
)
def test_a_map_is_there_where_the_features_are_its_plain_mean(
    pooling: list[str], outputs: list[str]
) -> None:
    nodes, name = [helper.make_node("Relu", ["image"], ["map"])], "map"
    for kind in pooling:
        new = "features" if kind == pooling[-1] else kind
        nodes.append(helper.make_node(kind, [name], [new]))
        name = new
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "network", [image], [features])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    network = with_head(model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    assert [output.name for output in network.graph.output] == outputs
    onnx.checker.check_model(network, full_check=True)


def test_folder_is_whole_valid_and_tells_nothing_about_the_machine(
    package: Package, tmp_path: Path
) -> None:
    folder = package().folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "classifier.json",
        "model.onnx",
        "reference.json",
        "weights.safetensors",
    ]
    onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)
    for path in folder.iterdir():
        content = path.read_bytes()
        for trace in (tmp_path, Path.cwd(), Path(torch.__file__).parent):
            assert f"{trace}/".encode() not in content
        assert path.stat().st_mode & 0o444 == 0o444
    names = load_file(folder / "weights.safetensors").keys()
    assert {"backbone.conv1.weight", "head.weight", "head.bias"} <= set(names)
    assert [path.name for path in folder.parent.iterdir()] == ["classifier"]


def test_reference_holds_images_and_what_this_artifact_answered(
    package: Package, dataset: ImageDataset
) -> None:
    classifier = package()
    assert classifier.verify_reference() == 0
    raw = json.loads((classifier.folder / "reference.json").read_text())
    sample = dataset.splits["validation"][1]
    entry = raw["images"][1]
    assert base64.b64decode(entry["image"]) == (dataset.root / sample.path).read_bytes()
    assert (entry["path"], entry["label"], entry["class_name"]) == (sample.path, 1, "b")
    entry["probabilities"] = [1.0, 0.0]
    expected = classifier.probabilities([dataset.root / sample.path])[0]
    (classifier.folder / "reference.json").write_text(json.dumps(raw))
    assert classifier.verify_reference() == pytest.approx(1 - expected[0])


def test_large_reference_images_are_stored_smaller(package: Package, dataset: ImageDataset) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    large = dataset.root / "validation" / "large.png"
    Image.fromarray(noise).save(large)
    assert large.stat().st_size > 200_000
    classifier = package(reference_paths=["validation/large.png"], reference_labels=None)
    raw = json.loads((classifier.folder / "reference.json").read_text())
    stored = base64.b64decode(raw["images"][0]["image"])
    assert len(stored) <= 200_000
    assert min(Image.open(io.BytesIO(stored)).size) >= classifier.preprocessing.resize
    assert raw["images"][0]["class_name"] is None
    assert classifier.verify_reference() == 0


def test_unreadable_reference_images_are_passed_over(
    package: Package, dataset: ImageDataset
) -> None:
    paths = ["gone.png", *(sample.path for sample in dataset.splits["validation"])]
    classifier = package(reference_paths=paths, reference_labels=None)
    raw = json.loads((classifier.folder / "reference.json").read_text())
    assert [entry["path"] for entry in raw["images"]] == paths[1:]
    with pytest.raises(DataError, match="reference images"):
        package(reference_paths=["gone.png"], reference_labels=None)


def test_new_package_replaces_the_old_one(package: Package, tmp_path: Path) -> None:
    first = package()
    (first.folder / "leftover").touch()
    second = package(metadata={"trial_id": "t0002"})
    assert second.metadata["trial_id"] == "t0002"
    assert not (second.folder / "leftover").exists()
    with pytest.raises(ClassifierError, match="holds"):
        package(head_weights=_head(tmp_path / "wrong.safetensors", num_classes=3))
    assert Classifier.load(first.folder).metadata["trial_id"] == "t0002"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"weight": torch.zeros(2, 9), "bias": torch.zeros(2)}, "needs"),
        ({"weight": torch.zeros(2, 512)}, "needs"),
        ({"weight": torch.full((2, 512), torch.nan), "bias": torch.zeros(2)}, "not finite"),
        (None, "Cannot read the weights"),
    ],
)
def test_head_that_does_not_fit_is_refused(
    head: dict[str, torch.Tensor] | None, message: str, package: Package, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    if head is not None:
        save_file(head, path)
    with pytest.raises(ClassifierError, match=message):
        package(head_weights=path)
    assert not (tmp_path / "search").exists()


def test_onnx_that_differs_from_torch_is_not_packaged(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = package_module._torch_logits
    monkeypatch.setattr(package_module, "_torch_logits", lambda *a: original(*a) + 0.1)
    with pytest.raises(ExportError, match="differs from torch"):
        package()
    assert list((tmp_path / "search").iterdir()) == []


# the reading part


def test_temperature_softens(package: Package, dataset: ImageDataset) -> None:
    classifier = package()
    image = dataset.root / dataset.splits["validation"][0].path
    logits = classifier.logits(read_pixels(image, classifier.preprocessing)[None])
    raw = json.loads((classifier.folder / "classifier.json").read_text())
    (classifier.folder / "classifier.json").write_text(json.dumps(raw | {"temperature": 2.0}))
    np.testing.assert_array_equal(
        Classifier.load(classifier.folder).probabilities([image]), softmax(logits / 2)
    )


def test_softmax_by_hand_and_far_out() -> None:
    values = softmax(np.array([[0.0, np.log(3.0)], [1000.0, 0.0]]))
    np.testing.assert_allclose(values, [[0.25, 0.75], [1.0, 0.0]])


def test_no_images_and_many(package: Package, dataset: ImageDataset) -> None:
    classifier = package()
    image = dataset.root / dataset.splits["validation"][0].path
    assert classifier.predict([]) == []
    many = classifier.probabilities([image] * 70)  # three batches
    assert many.shape == (70, 2)
    np.testing.assert_allclose(many, np.broadcast_to(many[0], many.shape), atol=1e-5)


def test_bad_images_are_refused(package: Package) -> None:
    classifier = package()
    with pytest.raises(BadImageError):
        classifier.predict([b"no image"])
    with pytest.raises(ValueError, match="top_k must be >= 1"):
        classifier.predict([], top_k=0)


def _set(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "classifier.json").read_text())
        (folder / "classifier.json").write_text(json.dumps(raw | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot read classifier.json"),
        (lambda folder: (folder / "model.onnx").unlink(), "has no model.onnx"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"junk"), "model.onnx is damaged"),
        (lambda folder: (folder / "classifier.json").write_text("{"), "classifier.json is damaged"),
        (lambda folder: (folder / "classifier.json").write_text("[]"), "not an object"),
        (lambda folder: (folder / "classifier.json").write_text("{}"), "damaged"),
        (_set("schema_version", 99), "newer visiontuner"),
        (_set("class_names", ["a", "b", "c"]), "needs image"),
        (_set("class_names", ["a", "a"]), "must not repeat"),
        (_set("class_names", 2), "damaged"),
        (_set("temperature", 0), "temperature must be > 0"),
        (_set("threshold", 7), "threshold must be in"),
        (_set("abstains", "often"), "abstains must be"),
        (_set("preprocessing", {"size": 3}), "preprocessing"),
        (_set("metadata", None), "damaged"),
    ],
)
def test_damaged_folder_is_refused_in_one_line(
    damage: Callable[[Path], None], message: str, package: Package
) -> None:
    folder = package().folder
    damage(folder)
    with pytest.raises(ClassifierError, match=message) as error:
        Classifier.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "{}", '{"images": []}', '{"images": [{"image": 1}]}'])
def test_damaged_reference_is_refused(content: str, package: Package) -> None:
    classifier = package()
    (classifier.folder / "reference.json").write_text(content)
    with pytest.raises(ClassifierError, match=r"reference\.json is damaged"):
        classifier.verify_reference()
