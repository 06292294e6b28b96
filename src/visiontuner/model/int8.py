"""A classifier whose network computes in int8: a quarter of the size, faster where the CPU can.

Static quantisation as ONNX Runtime does it: scales are measured on training images (the smallest
and largest value of each tensor), weights have a scale a channel, activations are unsigned. Signed
activations halve the speed on x86, and one scale for a whole weight tensor loses several points of
accuracy. The head stays in float32: it takes almost no time.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from visiontuner.data.dataset import Sample
from visiontuner.data.images import normalise
from visiontuner.errors import ClassifierError, DataError, ExportError, VisiontunerError
from visiontuner.io.files import disk_problem, temporary_folder
from visiontuner.model.classifier import (
    DESCRIPTION,
    FEATURES,
    LOGITS,
    NETWORK,
    REFERENCE,
    Classifier,
)
from visiontuner.model.classifier_files import (
    recorded_images,
    reference_document,
    replacing,
    write_json,
    write_novelty,
)
from visiontuner.model.novelty import Novelty
from visiontuner.model.onnx import save_onnx
from visiontuner.text import one_line

# More do not change the answers: minima and maxima are those of 100,000s of values an image.
CALIBRATION_IMAGES = 128
_BATCH_SIZE = 4  # calibration keeps every tensor of the network at once


def require_float(classifier: Classifier, name: str) -> None:
    """Make sure that a classifier can be quantised.

    Args:
        name: what a message calls it.

    Raises:
        ClassifierError: it computes in int8 already, or is of format 1.
    """
    if classifier.is_int8:
        raise ClassifierError(
            f"{name} computes in int8 already. Name the float32 version that it was "
            f"made of: {classifier.metadata['quantization'].get('of') or 'see `lineage`'}."
        )
    if FEATURES not in classifier.output_names:
        raise ClassifierError(
            f"{name} is of format 1, whose network gives no features. Package it "
            "again: `visiontuner evaluate FOLDER` with the folder of its search."
        )


def calibration_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The same number of images of every class, as far as there are; spread over each class.

    Args:
        samples: of a training split.
        count: how many in all, at most.
    """
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    each = -(-count // max(1, len(by_class)))
    spread = [own[:: max(1, len(own) // each)] for own in by_class.values()]
    turns = max(map(len, spread), default=0)
    return [own[turn] for turn in range(turns) for own in spread if turn < len(own)][:count]


def quantize_classifier(
    source: Classifier,
    folder: Path,
    pixels: NDArray[np.uint8],
    *,
    facts: Mapping[str, Any],
    find_novelty: Callable[[Classifier], Novelty | None] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Classifier:
    """Write the int8 form of a classifier; temperature and threshold are still the source's.

    It has no `weights.safetensors`: the float32 classifier has the weights to train on with.

    Args:
        folder: appears whole, and replaces an older one.
        pixels: of training images, uint8, shape (N, size, size, 3).
        facts: plain JSON values, kept as `quantization` in the metadata.
        find_novelty: gives, for the int8 form, what tells which images are known to it: its
            features are not quite the source's.
        progress: called with (images done, images in all).

    Raises:
        ClassifierError: the source cannot be quantised, or its reference is damaged.
        DataError: there are no images.
        ExportError: ONNX Runtime cannot quantise this network.
        VisiontunerError: the folder cannot be written.
    """
    require_float(source, str(source.folder))
    if not len(pixels):
        raise DataError("Quantisation needs training images to measure the network on; got none.")
    images = recorded_images(source.folder)
    with replacing(folder) as temporary:
        reader = _Reader(source, pixels, progress)
        save_onnx(quantize_network(source.folder / NETWORK, reader), temporary / NETWORK)
        description = json.loads((source.folder / DESCRIPTION).read_text(encoding="utf-8"))
        description["metadata"]["quantization"] = {"images": len(pixels), **facts}
        description.pop("novelty", None)
        write_json(temporary / DESCRIPTION, description)
        written = Classifier.load(temporary, threads=source.threads)
        if novelty := find_novelty(written) if find_novelty else None:
            write_novelty(temporary, description, novelty)
            written = Classifier.load(temporary, threads=source.threads)
        write_json(temporary / REFERENCE, reference_document(written, images))
    return Classifier.load(folder.absolute(), threads=source.threads)


def quantize_network(network: Path, reader: CalibrationDataReader) -> onnx.ModelProto:
    """A network's int8 form in ONNX's QDQ format, with the same inputs and outputs.

    Raises:
        ExportError: ONNX Runtime cannot quantise this network.
    """
    with temporary_folder() as folder, _without_advice():
        prepared, quantized = folder / "prepared.onnx", folder / NETWORK
        try:
            # Symbolic shape inference knows fewer operators than torch's exporter writes.
            quant_pre_process(str(network), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(quantized),
                reader,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=_head(prepared),
            )
            return onnx.load(quantized)
        except Exception as error:  # ONNX Runtime's classes share no base
            if disk_problem(error) is not None:
                raise VisiontunerError(
                    f"Cannot write {folder} ({disk_problem(error)}). Make room."
                ) from None
            raise ExportError(
                f"ONNX Runtime cannot quantise {network}: {one_line(error, 160)}. "
                "Serve the float32 version."
            ) from None


def _head(network: Path) -> list[str]:
    """The name of the operation that gives the logits."""
    graph = onnx.load(network, load_external_data=False).graph
    return [node.name for node in graph.node if LOGITS in node.output]


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no annotations
    """Batches of network input, prepared as the classifier itself does."""

    def __init__(
        self,
        classifier: Classifier,
        pixels: NDArray[np.uint8],
        progress: Callable[[int, int], None],
    ) -> None:
        self._batches = self._read(classifier, pixels, progress)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch, float32 (B, 3, size, size); None after the last."""
        return next(self._batches, None)

    @staticmethod
    def _read(
        classifier: Classifier,
        pixels: NDArray[np.uint8],
        progress: Callable[[int, int], None],
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        for start in range(0, len(pixels), _BATCH_SIZE):
            batch = pixels[start : start + _BATCH_SIZE]
            yield {"image": normalise(batch, classifier.preprocessing)}
            progress(min(start + _BATCH_SIZE, len(pixels)), len(pixels))


@contextmanager
def _without_advice() -> Iterator[None]:
    """ONNX Runtime's tools log advice to their own developers on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
