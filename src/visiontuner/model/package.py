"""A trained head and its backbone -> a `Classifier` folder, without training anything again."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visiontuner.data.images import Preprocessing, decode_image, normalise, read_pixels
from visiontuner.errors import (
    BadImageError,
    ClassifierError,
    DataError,
    ExportError,
    VisiontunerError,
)
from visiontuner.model.backbone import Backbone
from visiontuner.model.classifier import (
    DESCRIPTION,
    NETWORK,
    REFERENCE,
    SCHEMA_VERSION,
    WEIGHTS,
    Classifier,
)
from visiontuner.model.classifier_files import (
    reference_document,
    replace_folder,
    write_json,
)
from visiontuner.model.export import export_backbone, save_onnx

REFERENCE_PICTURES = 20
# Twenty pictures as base64: at most 20 x 200 kB x 4/3 = 5.3 MB.
_LARGEST_PICTURE = 200_000
_JPEG_QUALITY = 90

# What ONNX Runtime's logits may differ from torch's.
_ABSOLUTE_TOLERANCE = 1e-3
_RELATIVE_TOLERANCE = 1e-4


def package_classifier(
    *,
    folder: Path,
    backbone: Backbone,
    head_weights: Path,
    class_names: Sequence[str],
    dataset_root: Path,
    reference_paths: Sequence[str],
    metadata: Mapping[str, Any],
    cache: Path,
    reference_labels: Sequence[int] | None = None,
) -> Classifier:
    """Write a classifier folder and check it against torch on real pictures.

    The folder appears whole, and replaces an older one.

    Args:
        head_weights: safetensors with "weight" (num_classes, D) and "bias" (num_classes,).
        reference_paths: validation pictures, relative to `dataset_root`; the first 20 that can be
            read are recorded.
        metadata: plain JSON values; what the check measured is added.
        reference_labels: the pictures' classes, recorded with them.

    Raises:
        ExportError: the network cannot be written as ONNX, or answers differently there.
        ClassifierError: the head does not fit the backbone or the class names.
        DataError: no reference picture can be read.
        VisiontunerError: the folder cannot be written.
    """
    head = _read_head(head_weights, backbone, class_names)
    pictures = _reference_pictures(dataset_root, reference_paths, reference_labels, backbone)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        temporary.chmod(0o755)
        backbone_onnx = onnx.load(export_backbone(backbone, cache=cache))
        save_onnx(with_head(backbone_onnx, head), temporary / NETWORK)
        save_file(_all_weights(backbone, head), temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes it private; a server may be another
        description = _description(backbone, class_names, metadata)
        write_json(temporary / DESCRIPTION, description)
        classifier = Classifier.load(temporary)
        difference = _check_against_torch(classifier, backbone, head, pictures)
        description["metadata"]["onnx_difference"] = difference
        write_json(temporary / DESCRIPTION, description)
        write_json(temporary / REFERENCE, reference_document(classifier, pictures))
        replace_folder(temporary, folder)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}). Make room.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Classifier.load(folder)


def with_head(model: onnx.ModelProto, head: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Append logits = features @ weight.T + bias to a backbone's graph; the input changes."""
    graph = model.graph
    for name in ("weight", "bias"):
        values = np.ascontiguousarray(head[name].numpy(), dtype=np.float32)
        graph.initializer.append(numpy_helper.from_array(values, f"head.{name}"))
    inputs = ["features", "head.weight", "head.bias"]
    graph.node.append(helper.make_node("Gemm", inputs, ["logits"], name="head", transB=1))
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    shape = [batch, len(head["bias"])]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    return model


def _read_head(path: Path, backbone: Backbone, class_names: Sequence[str]) -> dict[str, Tensor]:
    try:
        head = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ClassifierError(f"Cannot read the head {path} ({type(error).__name__}).") from None
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


def _all_weights(backbone: Backbone, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"backbone.{name}": t for name, t in backbone.module.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.items()}
    # Clones: safetensors refuses tensors that share memory or are not contiguous.
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _description(
    backbone: Backbone, class_names: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "class_names": list(class_names),
        "preprocessing": backbone.preprocessing.to_dict(),
        "temperature": 1.0,
        "threshold": None,
        "metadata": {
            **metadata,
            "backbone": backbone.name,
            "weights_digest": backbone.weights_digest,
        },
    }


# the reference pictures


def _reference_pictures(
    root: Path, paths: Sequence[str], labels: Sequence[int] | None, backbone: Backbone
) -> list[dict[str, Any]]:
    """Content (bytes), path and label of the first pictures that can be read."""
    pictures: list[dict[str, Any]] = []
    for index, path in enumerate(paths):
        if len(pictures) == REFERENCE_PICTURES:
            break
        with suppress(BadImageError, OSError):
            content = _small_content(root / path, backbone.preprocessing)
            label = None if labels is None else int(labels[index])
            pictures.append({"path": path, "content": content, "label": label})
    if not pictures:
        raise DataError(
            f"None of the {len(paths)} reference pictures in {root} can be read. "
            "Run `visiontuner prepare` to see why."
        )
    return pictures


def _small_content(path: Path, preprocessing: Preprocessing) -> bytes:
    """The file as it is, or a smaller JPEG that still exceeds what the network sees."""
    content = path.read_bytes()
    if len(content) <= _LARGEST_PICTURE:
        decode_image(content, target=preprocessing.resize)
        return content
    image = decode_image(content, target=preprocessing.resize)
    for side in (2 * preprocessing.resize, preprocessing.resize):
        smaller = image.copy()
        scale = min(1.0, side / min(smaller.size))
        smaller = smaller.resize([max(1, round(length * scale)) for length in smaller.size])
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        if buffer.tell() <= _LARGEST_PICTURE:
            break
    return buffer.getvalue()


def _check_against_torch(
    classifier: Classifier,
    backbone: Backbone,
    head: Mapping[str, Tensor],
    pictures: Sequence[Mapping[str, Any]],
) -> float:
    """The largest absolute difference of the logits."""
    preprocessing = backbone.preprocessing
    pixels = np.stack([read_pixels(picture["content"], preprocessing) for picture in pictures])
    expected = _torch_logits(backbone, head, normalise(pixels, preprocessing))
    got = classifier.logits(pixels)
    difference = float(np.abs(got - expected).max())
    allowed = max(_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE * float(np.abs(expected).max()))
    if not difference <= allowed:  # NaN too
        raise ExportError(
            f"The ONNX form of {backbone.name!r} differs from torch by {difference:.1e} in its "
            f"logits, more than {allowed:.1e}. Choose another: `visiontuner backbones`."
        )
    return difference


def _torch_logits(
    backbone: Backbone, head: Mapping[str, Tensor], images: NDArray[np.float32]
) -> NDArray[np.float64]:
    with torch.inference_mode():
        features = backbone.module(torch.from_numpy(images))  # (B, D)
        logits = torch.nn.functional.linear(features, head["weight"], head["bias"])
    return logits.double().numpy()
