"""A trained head and its backbone -> a `Classifier` folder, without training anything again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from visiontuner.data.images import normalise, read_pixels
from visiontuner.errors import ClassifierError, ExportError
from visiontuner.model.backbones import Backbone, MirroredViews
from visiontuner.model.classifier import (
    DESCRIPTION,
    FEATURES,
    LOGITS,
    NETWORK,
    REFERENCE,
    SCHEMA_VERSION,
    WEIGHTS,
    Classifier,
)
from visiontuner.model.classifier_files import (
    reference_document,
    reference_images,
    replacing,
    write_json,
    write_novelty,
)
from visiontuner.model.network import (
    Train,
    build_network,
    load_network,
    read_tensors,
    trained_amount,
    write_tensors,
)
from visiontuner.model.novelty import Novelty
from visiontuner.model.onnx import add_feature_map, export_backbone, exported_once, save_onnx
from visiontuner.model.weights import digest_weights

# What ONNX Runtime's logits may differ from torch's.
_ABSOLUTE_TOLERANCE = 1e-3
_RELATIVE_TOLERANCE = 1e-4
_COMPARED = 8  # of the reference images: torch takes a tenth of a second for each


def package_classifier(
    *,
    folder: Path,
    backbone: Backbone,
    head_weights: Path | None = None,
    network_weights: Path | None = None,
    class_names: Sequence[str],
    dataset_root: Path,
    reference_paths: Sequence[str],
    metadata: Mapping[str, Any],
    cache: Path,
    reference_labels: Sequence[int] | None = None,
    find_novelty: Callable[[Classifier], Novelty | None] | None = None,
) -> Classifier:
    """Write a classifier folder and check it against torch on real images.

    The folder appears whole, and replaces an older one.

    Args:
        backbone: the pretrained network; also where `network_weights` are given.
        head_weights: safetensors with "weight" (num_classes, D) and "bias" (num_classes,).
        network_weights: instead of a head, what `save_network` wrote of a fine-tuned network.
        reference_paths: validation images, relative to `dataset_root`; the first 20 that can be
            read are recorded.
        metadata: plain JSON values; what was trained and what the check measured is added.
        reference_labels: the images' classes, recorded with them.
        find_novelty: gives, for the artifact so far, what tells which images are known to it.

    Raises:
        ExportError: the network cannot be written as ONNX, or answers differently there.
        BackboneError: the network's weights are of another architecture.
        ClassifierError: the head does not fit the backbone or the class names.
        DataError: no reference image can be read.
        VisiontunerError: the folder cannot be written.
    """
    trained = _read_trained(head_weights, network_weights, backbone, class_names)
    is_tuned = trained.backbone.weights_digest != backbone.weights_digest
    images = reference_images(
        dataset_root, reference_paths, labels=reference_labels, preprocessing=backbone.preprocessing
    )
    with replacing(folder) as temporary:
        save_onnx(_onnx(trained, cache=None if is_tuned else cache), temporary / NETWORK)
        _write_weights(trained, temporary / WEIGHTS, class_names)
        description = _description(trained, class_names, metadata)
        _describe_and_check(temporary, trained, description, images, find_novelty)
    return Classifier.load(folder.absolute())


def _read_trained(
    head_weights: Path | None,
    network_weights: Path | None,
    backbone: Backbone,
    class_names: Sequence[str],
) -> _Trained:
    if (head_weights is None) == (network_weights is None):
        raise ValueError("give either head_weights or network_weights")
    if network_weights is not None:
        return _read_network(network_weights, backbone, class_names)
    assert head_weights is not None
    return _Trained(backbone, _read_head(head_weights, backbone, class_names), "head")


def _describe_and_check(
    folder: Path,
    trained: _Trained,
    description: dict[str, Any],
    images: Sequence[Mapping[str, Any]],
    find_novelty: Callable[[Classifier], Novelty | None] | None,
) -> None:
    """Add to the network and its weights what needs a classifier that answers."""
    write_json(folder / DESCRIPTION, description)
    classifier = Classifier.load(folder)
    difference = _check_against_torch(classifier, trained, images[:_COMPARED])
    description["metadata"]["onnx_difference"] = difference
    if novelty := find_novelty(classifier) if find_novelty else None:
        write_novelty(folder, description, novelty)
    else:
        write_json(folder / DESCRIPTION, description)
    write_json(folder / REFERENCE, reference_document(Classifier.load(folder), images))


def package_untrained(
    folder: Path, backbone: Backbone, class_names: Sequence[str], *, cache: Path
) -> Path:
    """Write a classifier whose head is zero, to measure what a network costs; it is not checked.

    Raises:
        ExportError: the network cannot be written as ONNX.
    """
    head = {
        "weight": torch.zeros(len(class_names), backbone.feature_dim),
        "bias": torch.zeros(len(class_names)),
    }
    untrained = _Trained(backbone, head, "head")
    folder.mkdir(parents=True)
    save_onnx(_onnx(untrained, cache=cache), folder / NETWORK)
    write_json(folder / DESCRIPTION, _description(untrained, class_names, {}))
    return folder


def _onnx(trained: _Trained, *, cache: Path | None) -> onnx.ModelProto:
    """The whole network; without a cache its backbone is exported for this once."""
    if cache is None:
        return with_head(exported_once(trained.backbone), trained.head)
    return with_head(onnx.load(export_backbone(trained.backbone, cache=cache)), trained.head)


def with_head(model: onnx.ModelProto, head: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Append logits = features @ weight.T + bias to a backbone's graph; the input changes.

    The outputs are the logits, the features and the map whose mean they are, if there is one.
    """
    graph = model.graph
    for name in ("weight", "bias"):
        values = np.ascontiguousarray(head[name].numpy(), dtype=np.float32)
        graph.initializer.append(numpy_helper.from_array(values, f"head.{name}"))
    inputs = [FEATURES, "head.weight", "head.bias"]
    graph.node.append(helper.make_node("Gemm", inputs, [LOGITS], name="head", transB=1))
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    shape = [batch, len(head["bias"])]
    graph.output.insert(0, helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, shape))
    add_feature_map(model)
    return model


@dataclass(frozen=True)
class _Trained:
    """What is packaged: a backbone, fine-tuned or not, and the head's "weight" and "bias"."""

    backbone: Backbone
    head: dict[str, Tensor]
    train: Train


def _read_network(path: Path, backbone: Backbone, class_names: Sequence[str]) -> _Trained:
    layer = nn.Linear(backbone.feature_dim, len(class_names))
    network = build_network(backbone, nn.Sequential(nn.Dropout(), layer), train="head")
    load_network(network, path, class_names=class_names)
    module = network.backbone.eval()
    tuned = replace(backbone, module=module, weights_digest=digest_weights(module))
    head = {name: tensor.float() for name, tensor in layer.state_dict().items()}
    return _Trained(tuned, head, trained_amount(path))


def _read_head(path: Path, backbone: Backbone, class_names: Sequence[str]) -> dict[str, Tensor]:
    head, _ = read_tensors(path)
    expected = {"weight": (len(class_names), backbone.feature_dim), "bias": (len(class_names),)}
    found = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if found != expected:
        raise ClassifierError(
            f"The head {path} holds {found}; {backbone.name} with {len(class_names)} classes "
            f"needs {expected}. Package the trial with the backbone it was trained on."
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in head.values()):
        raise ClassifierError(f"The head {path} holds values that are not finite. Train it again.")
    return {name: tensor.float() for name, tensor in head.items()}


def _write_weights(trained: _Trained, path: Path, class_names: Sequence[str]) -> None:
    module, head = trained.backbone.module, trained.head
    if isinstance(module, MirroredViews):  # the same weights begin a training with one view
        module = module.network
    tensors = {f"backbone.{name}": t for name, t in module.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.items()}
    write_tensors(
        tensors,
        path,
        backbone=trained.backbone.name,
        train=trained.train,
        class_names=class_names,
    )


def _description(
    trained: _Trained, class_names: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "class_names": list(class_names),
        "preprocessing": trained.backbone.preprocessing.to_dict(),
        "temperature": 1.0,
        "threshold": None,
        "abstains": False,
        "metadata": {
            **metadata,
            "train": trained.train,
            "backbone": trained.backbone.name,
            "views": "flip" if isinstance(trained.backbone.module, MirroredViews) else 1,
            "weights_digest": trained.backbone.weights_digest,
            "weights_licence": trained.backbone.weights_licence,
        },
    }


def _check_against_torch(
    classifier: Classifier, trained: _Trained, images: Sequence[Mapping[str, Any]]
) -> float:
    """The largest absolute difference of the logits."""
    preprocessing = trained.backbone.preprocessing
    pixels = np.stack([read_pixels(image["content"], preprocessing) for image in images])
    expected = _torch_logits(trained, normalise(pixels, preprocessing))
    got = classifier.logits(pixels)
    difference = float(np.abs(got - expected).max())
    allowed = max(_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE * float(np.abs(expected).max()))
    if not difference <= allowed:  # NaN too
        raise ExportError(
            f"The ONNX form of {trained.backbone.name!r} differs from torch by {difference:.1e} "
            f"in its logits, more than {allowed:.1e}. Choose another: `visiontuner backbones`."
        )
    return difference


def _torch_logits(trained: _Trained, images: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.inference_mode():
        features = trained.backbone.module(torch.from_numpy(images))  # (B, D)
        logits = nn.functional.linear(features, trained.head["weight"], trained.head["bias"])
    return logits.double().numpy()
