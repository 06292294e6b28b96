"""A classifier for other runtimes: its network, what it needs to be used, and code that uses it.

model.onnx | model.xml, model.bin    the network
model.json    class names, preprocessing, temperature, threshold, and where it came from
example.py    names what is on an image, with numpy, Pillow and the runtime alone
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from visiontuner.data.images import normalise, read_pixels
from visiontuner.errors import ExportError, UserMistake
from visiontuner.model.classifier import (
    LOGITS,
    NETWORK,
    REFERENCE,
    Classifier,
    reference_entries,
    softmax,
)
from visiontuner.model.classifier_files import replacing, write_json
from visiontuner.text import one_line

Form = Literal["onnx", "onnx-int8", "openvino", "coreml"]

ABOUT, EXAMPLE, OPENVINO = "model.json", "example.py", "model.xml"
# Probabilities of another runtime in float32; what it fuses and in which order it adds differs.
TOLERANCE = 1e-4
_VERSION = 1

# Logits of network input, float32 (B, 3, size, size) -> (B, num_classes).
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how it was checked.

    Args:
        file: the network's.
        difference: the largest difference of a probability on the artifact's reference images.
        images: how many those are.
    """

    folder: Path
    form: Form
    file: str
    difference: float
    images: int


def require_runtime(form: Form) -> None:
    """Make sure that what writes a form is installed.

    Raises:
        UserMistake: it is not, or there is nothing that writes it.
    """
    if form == "coreml":
        raise UserMistake(
            "Core ML cannot be written: coremltools converts no ONNX since version 6. Export to "
            "onnx: ONNX Runtime runs it on Apple devices, with its Core ML execution provider."
        )
    if form == "openvino":
        try:
            importlib.metadata.version("openvino")
        except importlib.metadata.PackageNotFoundError:
            raise UserMistake(
                "OpenVINO is not installed: `pip install 'visiontuner[openvino]'`."
            ) from None


def export_classifier(classifier: Classifier, folder: Path, form: Form, *, source: str) -> Exported:
    """Write a classifier for another runtime, and compare it there on its reference images.

    Args:
        folder: appears whole; must not exist, or be empty.
        form: `onnx-int8` for a classifier that was quantised, `onnx` for others.
        source: where it came from, kept in `model.json`.

    Raises:
        ExportError: the runtime cannot read the network, or answers differently.
        UserMistake: the folder holds something, or the runtime is not installed.
        VisiontunerError: the folder cannot be written.
    """
    require_runtime(form)
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserMistake(
            f"{folder} already exists and is not empty. Name another folder: --output."
        )
    with replacing(folder) as temporary:
        file, run = _WRITERS[form](classifier, temporary)
        difference, images = _difference(classifier, run)
        if not difference <= TOLERANCE:  # NaN too
            raise ExportError(
                f"The {form} form answers the model's own images differently (by "
                f"{difference:.1e}, allowed {TOLERANCE:g}). Export to onnx instead."
            )
        write_json(temporary / ABOUT, _about(classifier, form, file, source))
        (temporary / EXAMPLE).write_text(example(form), encoding="utf-8")
    return Exported(folder=folder, form=form, file=file, difference=difference, images=images)


def example(form: Form) -> str:
    """Code that names what is on an image, for the folder of an export."""
    load, run = _RUNTIMES["openvino" if form == "openvino" else "onnx"]
    return _EXAMPLE.replace("LOAD", load).replace("RUN", run)


_RUNTIMES = {
    "onnx": (
        'import onnxruntime\nnetwork = onnxruntime.InferenceSession(folder / about["file"])',
        'network.run(["logits"], {"image": pixels})[0][0]',
    ),
    "openvino": (
        'sys.modules.setdefault("openvino_telemetry", None)  # or each import is reported\n'
        "import openvino\n"
        'network = openvino.compile_model(folder / about["file"], "CPU", '
        '{"INFERENCE_PRECISION_HINT": "f32"})',
        'network({"image": pixels})["logits"][0]',
    ),
}

_EXAMPLE = '''"""Name what is on images: python example.py IMAGE ..."""
import json, pathlib, sys
import numpy as np
from PIL import Image, ImageOps
folder = pathlib.Path(__file__).parent
about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
LOAD
p = about["preprocessing"]
for path in sys.argv[1:]:
    image = Image.open(path)
    image.draft(None, (2 * p["resize"],) * 2)  # a large JPEG is decoded smaller
    image = ImageOps.exif_transpose(image).convert("RGB")
    sides = [int(p["resize"] * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling[p["interpolation"].upper()])
    left, top = (round((side - p["size"]) / 2) for side in sides)
    image = image.crop((left, top, left + p["size"], top + p["size"]))
    pixels = (np.asarray(image, np.float32) / 255 - p["mean"]) / p["std"]
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)
    logits = RUN / about["temperature"]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = int(shares.argmax())
    sure = not about["abstains"] and shares[best] >= (about["threshold"] or 0)
    name = about["class_names"][best]
    print(name, f"{shares[best]:.6f}", "confident" if sure else "not confident", sep="\\t")
'''


def _about(classifier: Classifier, form: Form, file: str, source: str) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "form": form,
        "file": file,
        "input": "image: float32 (B, 3, size, size), (value / 255 - mean) / std, RGB",
        "output": "logits: float32 (B, classes); softmax(logits / temperature) are probabilities",
        "class_names": list(classifier.class_names),
        "preprocessing": classifier.preprocessing.to_dict(),
        "temperature": classifier.temperature,
        "threshold": classifier.threshold,
        "abstains": classifier.abstains,
        "source": source,
        "metadata": classifier.metadata,
    }


def _difference(classifier: Classifier, run: Run) -> tuple[float, int]:
    """The largest difference of a probability on the reference images, and how many they are."""
    raw = json.loads((classifier.folder / REFERENCE).read_text(encoding="utf-8"))
    contents = [base64.b64decode(image["image"]) for image in reference_entries(raw)]
    pixels = np.stack([read_pixels(content, classifier.preprocessing) for content in contents])
    got = run(normalise(pixels, classifier.preprocessing)).astype(np.float64)
    expected = classifier.probabilities(contents)
    return float(np.abs(softmax(got / classifier.temperature) - expected).max()), len(contents)


def _write_onnx(classifier: Classifier, folder: Path) -> tuple[str, Run]:
    shutil.copyfile(classifier.folder / NETWORK, folder / NETWORK)
    session = onnxruntime.InferenceSession(folder / NETWORK, providers=["CPUExecutionProvider"])
    return NETWORK, lambda image: session.run([LOGITS], {"image": image})[0]


def _write_openvino(classifier: Classifier, folder: Path) -> tuple[str, Run]:
    # Without this package OpenVINO reports nothing; with it, every import to its makers.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # hides it
    # Here and not at the top: an extra that few have.
    import openvino

    try:
        model = openvino.Core().read_model(classifier.folder / NETWORK)
        openvino.save_model(model, folder / OPENVINO, compress_to_fp16=False)
        # On processors with AMX or AVX512-BF16 it would compute in bfloat16.
        compiled = openvino.compile_model(
            folder / OPENVINO, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
    except Exception as error:  # OpenVINO's classes share no base
        raise ExportError(
            f"OpenVINO cannot convert {classifier.folder / NETWORK}: {one_line(error, 160)}. "
            "Export to onnx instead."
        ) from None
    return OPENVINO, lambda image: compiled({"image": image})[LOGITS]


_WRITERS: dict[Form, Callable[[Classifier, Path], tuple[str, Run]]] = {
    "onnx": _write_onnx,
    "onnx-int8": _write_onnx,
    "openvino": _write_openvino,
}
