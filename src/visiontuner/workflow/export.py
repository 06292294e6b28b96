"""Write a model for another runtime."""

from __future__ import annotations

from pathlib import Path

from visiontuner.errors import UserMistake
from visiontuner.model.classifier import Classifier
from visiontuner.model.runtimes import Exported, Form, export_classifier, require_runtime
from visiontuner.serving.client import find_classifier
from visiontuner.workflow.inputs import Observer
from visiontuner.workflow.promote import locate_model, model_folder
from visiontuner.workflow.quantize import int8_of


def export(
    model: str | None, to: Form, folder: Path, *, observer: Observer | None = None
) -> Exported:
    """Write a model's network for another runtime, with all that it needs to be used.

    Args:
        model: as `preflight` takes it.
        to: `onnx-int8` of a model in float32 is made as `quantize` does, and not registered.
        folder: made here; must not exist, or be empty.

    Raises:
        UserMistake: there is no such model, the folder holds something, or the runtime is missing.
        ExportError: the runtime cannot read the network, or answers differently.
        ServingError: the int8 form loses too much accuracy.
        TrackingError: MLflow is away or refuses.
    """
    require_runtime(to)
    source = str(locate_model(model))
    with model_folder(source) as found:
        classifier = Classifier.load(find_classifier(found))
        if classifier.is_int8 and to != "onnx-int8":
            raise UserMistake(
                f"{source} computes in int8: export it with --to onnx-int8, or export the float32 "
                f"version, {classifier.metadata['quantization'].get('of') or 'see `lineage`'}."
            )
        if to != "onnx-int8" or classifier.is_int8:
            return export_classifier(classifier, folder, to, source=source)
    with int8_of(source, observer=observer) as (int8, _):
        return export_classifier(int8, folder, to, source=source)
