"""A classifier that can be checked by eye: it names an image's strongest colour."""

import base64
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from visiontuner.data.images import Preprocessing
from visiontuner.model.classifier import Classifier
from visiontuner.model.novelty import Novelty
from visiontuner.serving.registry import save_classifier
from visiontuner.serving.server import ScoringServer, local_environment

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
# An image of another colour is new: the nearest cosine is 0.34.
YELLOW = (220, 220, 20)
NOVELTY_THRESHOLD = 0.1


def image(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (COLOURS | {"yellow": YELLOW})[colour]).save(buffer, kind)
    return buffer.getvalue()


def colour_network(size: int) -> onnx.ModelProto:
    """logits = 4 x the mean of each channel."""
    weight = numpy_helper.from_array(4 * np.eye(3, dtype=np.float32), "weight")
    nodes = [
        helper.make_node("Identity", ["image"], ["feature_map"]),
        helper.make_node("GlobalAveragePool", ["feature_map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info(
                "feature_map", TensorProto.FLOAT, ["batch", 3, size, size]
            ),
        ],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="session")
def colour_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours") / "classifier"
    folder.mkdir()
    preprocessing = Preprocessing(
        resize=16, size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"
    )
    pixels = (np.array(list(COLOURS.values())) / 255 - 0.5) / 0.5
    known = Novelty(
        images=(pixels / np.linalg.norm(pixels, axis=1, keepdims=True)).astype(np.float32),
        neighbours=1,
        threshold=NOVELTY_THRESHOLD,
    )
    description = {
        "schema_version": 2,
        "class_names": list(COLOURS),
        "preprocessing": preprocessing.to_dict(),
        "temperature": 1.0,
        "threshold": None,
        "novelty": known.to_dict(),
        "metadata": {},
    }
    (folder / "novelty.npz").write_bytes(known.content())
    (folder / "classifier.json").write_text(json.dumps(description))
    onnx.save(colour_network(16), folder / "model.onnx")
    head = {"head.weight": 4 * np.eye(3, dtype=np.float32), "head.bias": np.zeros(3, np.float32)}
    save_file(head, folder / "weights.safetensors")
    classifier = Classifier.load(folder, threads=1)
    images = [
        {
            "path": f"{colour}.png",
            "image": base64.b64encode(image(colour)).decode(),
            "probabilities": classifier.probabilities([image(colour)])[0].tolist(),
            "novelty": float(classifier.score([image(colour)]).novelty[0]),
        }
        for colour in COLOURS
    ]
    reference = {"schema_version": 2, "images": images}
    (folder / "reference.json").write_text(json.dumps(reference))
    return folder


@pytest.fixture(scope="session")
def colour_model(colour_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier as an MLflow model folder."""
    with warnings.catch_warnings():
        # MLflow warns about its own type hints when it is imported.
        warnings.simplefilter("ignore")
        destination = tmp_path_factory.mktemp("models") / "colours"
        return save_classifier(colour_classifier, destination)


@pytest.fixture(scope="session")
def scoring_server(colour_model: Path) -> Iterator[ScoringServer]:
    """MLflow's scoring server with that model."""
    with ScoringServer(colour_model, local_environment()) as server:
        yield server


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """Fifty images: photographs where VISIONTUNER_PHOTOS is set, else noise as JPEG."""
    folder = os.environ.get("VISIONTUNER_PHOTOS")
    if folder:
        paths = sorted(Path(folder).rglob("*.jpg"))
        return [path.read_bytes() for path in paths[:: max(1, len(paths) // 50)][:50]]
    rng = np.random.default_rng(0)
    return [noise(rng) for _ in range(50)]


def noise(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (rng.integers(20, 90), rng.integers(20, 90), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def make_image() -> object:
    return image
