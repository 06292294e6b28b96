"""A fine-tuned network becomes the same artifact as a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from visiontuner.data.dataset import ImageDataset
from visiontuner.data.images import normalise, read_pixels
from visiontuner.errors import BackboneError, ClassifierError, ExportError
from visiontuner.experiment.schema import Training
from visiontuner.model import package as package_module
from visiontuner.model.backbones import Backbone, load_backbone
from visiontuner.model.classifier import Classifier
from visiontuner.model.network import (
    Network,
    Train,
    build_network,
    load_network,
    parameter_groups,
    save_network,
)
from visiontuner.model.package import package_classifier
from visiontuner.model.weights import digest_weights


def make_network(backbone: Backbone, train: Train = "last_stage", classes: int = 2) -> Network:
    torch.manual_seed(2)
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(backbone.feature_dim, classes))
    return build_network(backbone, head, train=train)


def fine_tune(network: Network) -> None:
    """Two steps, large enough to change the answers."""
    torch.manual_seed(4)
    optimizer = torch.optim.AdamW(parameter_groups(network, Training(learning_rate=0.05)))
    network.train()
    for _ in range(2):
        loss = functional.cross_entropy(network(torch.rand(4, 3, 64, 64)), torch.arange(4) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


@pytest.fixture
def dataset(make_dataset: Callable[..., ImageDataset]) -> ImageDataset:
    return make_dataset(train=2, validation=4)


@pytest.fixture
def package(dataset: ImageDataset, resnet: Backbone, tmp_path: Path) -> Callable[..., Classifier]:
    def run(network: Network | Path, **options: object) -> Classifier:
        path = network if isinstance(network, Path) else tmp_path / "network.safetensors"
        if isinstance(network, Network):
            save_network(network, path, class_names=("a", "b"))
        samples = dataset.splits["validation"]
        defaults = {
            "folder": tmp_path / "search" / "classifier",
            "backbone": resnet,
            "network_weights": path,
            "class_names": ("a", "b"),
            "dataset_root": dataset.root,
            "reference_paths": [sample.path for sample in samples],
            "reference_labels": [sample.label for sample in samples],
            "metadata": {"trial_id": "t0001"},
            "cache": tmp_path / "cache",
        }
        return package_classifier(**(defaults | options))

    return run


@pytest.mark.slow
def test_fine_tuned_network_answers_as_torch_does(
    package: Callable[..., Classifier], dataset: ImageDataset, resnet: Backbone, tmp_path: Path
) -> None:
    network = make_network(resnet)
    fine_tune(network)
    classifier = package(network)
    assert not (tmp_path / "cache").exists()  # its export is kept nowhere
    paths = [dataset.root / sample.path for sample in dataset.splits["validation"]]
    images = normalise(
        np.stack([read_pixels(path, resnet.preprocessing) for path in paths]), resnet.preprocessing
    )
    with torch.inference_mode():
        logits = network(torch.from_numpy(images))
        frozen = network.head(resnet.module(torch.from_numpy(images)))
    assert (logits - frozen).abs().max() > 0.1  # the backbone's old weights would answer otherwise
    probabilities = classifier.probabilities(paths)
    np.testing.assert_allclose(probabilities, torch.softmax(logits, 1).numpy(), atol=1e-4)
    assert classifier.verify_reference() == 0
    # The same folder as a head's,
    assert sorted(path.name for path in classifier.folder.iterdir()) == [
        "classifier.json",
        "model.onnx",
        "reference.json",
        "weights.safetensors",
    ]
    for path in classifier.folder.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444
    # which says what was trained, and whose weights these are.
    metadata = classifier.metadata
    assert (metadata["trial_id"], metadata["train"]) == ("t0001", "last_stage")
    assert metadata["backbone"] == "resnet18"
    assert metadata["weights_digest"] == digest_weights(network.backbone) != resnet.weights_digest
    assert metadata["onnx_difference"] < 1e-3
    assert resnet.weights_digest == digest_weights(resnet.module)
    # And training can go on from it, for the same classes or from its backbone alone.
    weights = classifier.folder / "weights.safetensors"
    again = make_network(resnet, "all")
    load_network(again, weights, class_names=("a", "b"))
    assert digest_weights(again) == digest_weights(network)
    with pytest.raises(ClassifierError, match="'a' where this data has 'b'"):
        load_network(again, weights, class_names=("b", "a"))
    reloaded = load_backbone("resnet18", weights=str(weights), image_size=64, cache=tmp_path)
    assert reloaded.weights_digest == metadata["weights_digest"]


def test_head_trained_on_images_needs_no_new_export(
    package: Callable[..., Classifier], resnet: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(package_module, "exported_once")
    network = make_network(resnet, "head")
    fine_tune(network)
    classifier = package(network)
    assert classifier.metadata["train"] == "head"
    assert classifier.metadata["weights_digest"] == resnet.weights_digest
    tensors = load_file(classifier.folder / "weights.safetensors")
    assert torch.equal(tensors["head.weight"], network.head[1].weight)


def test_older_classifiers_say_their_classes_beside_the_weights(
    resnet: Backbone, tmp_path: Path
) -> None:
    network = make_network(resnet, "head")
    folder = tmp_path / "older"
    folder.mkdir()
    save_network(network, folder / "weights.safetensors")  # without the names
    (folder / "classifier.json").write_text(json.dumps({"class_names": ["a", "c"]}))
    with pytest.raises(ClassifierError, match="'c' where this data has 'b'"):
        load_network(network, folder / "weights.safetensors", class_names=("a", "b"))
    load_network(network, folder / "weights.safetensors", class_names=("a", "c"))


def test_network_that_does_not_fit_is_refused_and_the_old_folder_stays(
    package: Callable[..., Classifier],
    resnet: Backbone,
    bundled: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = make_network(resnet, "head")
    package(network)
    with pytest.raises(BackboneError, match="not of 'resnet18'"):
        package(make_network(bundled, "head"))
    with pytest.raises(ClassifierError, match="for 3 classes, this data has 2"):
        package(make_network(resnet, "head", classes=3))
    with pytest.raises(ClassifierError, match="Cannot read"):
        package(tmp_path / "gone.safetensors")
    with pytest.raises(ClassifierError, match="'b' where this data has 'c'"):
        package(network, class_names=("a", "c"))
    original = package_module._torch_logits
    monkeypatch.setattr(package_module, "_torch_logits", lambda *a: original(*a) + 0.1)
    with pytest.raises(ExportError, match="differs from torch"):
        package(network)
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["classifier"]
    assert Classifier.load(tmp_path / "search" / "classifier").metadata["trial_id"] == "t0001"


def test_either_a_head_or_a_network_is_packaged(
    package: Callable[..., Classifier], resnet: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="either"):
        package(make_network(resnet, "head"), head_weights=tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="either"):
        package(make_network(resnet, "head"), network_weights=None)
