"""Other forms of a model: int8, compared and registered; files for other runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities.model_registry import ModelVersion
from numpy.typing import NDArray

from visiontuner.data.arrays import decode_batch, decode_batches
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.errors import (
    ClassifierError,
    DataError,
    ServingError,
    UserMistake,
    VisiontunerError,
)
from visiontuner.evaluation.baselines import Baseline, is_affordable, logistic_regression
from visiontuner.evaluation.quantized import (
    Calibration,
    Comparison,
    FormAnswers,
    calibrate_int8,
    compare_forms,
)
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import temporary_folder
from visiontuner.model.classifier import FEATURES, LOGITS, NETWORK, Classifier
from visiontuner.model.classifier_files import recalibrate
from visiontuner.model.int8 import (
    CALIBRATION_IMAGES,
    calibration_samples,
    quantize_classifier,
    require_float,
)
from visiontuner.model.runtimes import Exported, Form, export_classifier, require_runtime
from visiontuner.paths import CLASSIFIER_FOLDER, tracking_uri
from visiontuner.serving.client import find_classifier
from visiontuner.serving.cost import Speed, measure_speeds
from visiontuner.serving.lineage import Lineage, trace_version
from visiontuner.serving.registry import (
    DIGEST_TAG,
    QUANTIZED_FROM_TAG,
    classifier_digest,
    find_registered,
    log_classifier,
)
from visiontuner.text import next_command, one_line
from visiontuner.workflow.evaluate import DEFAULT_PRECISION
from visiontuner.workflow.image_checks import novelty_of_artifact
from visiontuner.workflow.inputs import Inputs, Observer, Silent
from visiontuner.workflow.promote import locate_model, model_folder, open_store

DEFAULT_MAX_LOSS = 0.005
# By how much int8 must be faster to be called so: below that lies the noise of a shared machine.
_WORTH_IT = 1.05
_MEASURED_IMAGES = 20
_BATCH_SIZE = 4  # as the classifier itself takes them


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantizeResult:
    """What `quantize` made.

    Args:
        source: `models:/NAME/VERSION` of the float32 classifier.
        model: of the int8 one.
        speed_fp32, speed_int8: on one thread, measured in turns.
        megabytes, megabytes_fp32: of the network's file, 10^6 bytes.
    """

    source: str
    model: str
    comparison: Comparison
    speed_fp32: Speed
    speed_int8: Speed
    megabytes: float
    megabytes_fp32: float

    @property
    def is_faster(self) -> bool:
        """Whether int8 is faster on this machine, beyond what a shared one varies by."""
        fast, slow = self.speed_int8.images_per_second, self.speed_fp32.images_per_second
        return fast > _WORTH_IT * slow

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the figures by name, and intervals in `intervals`."""
        compared = self.comparison
        intervals = compared.intervals
        return {
            "source": self.source,
            "model": self.model,
            "images_per_second_fp32": self.speed_fp32.images_per_second,
            "images_per_second_int8": self.speed_int8.images_per_second,
            "answers_per_second_fp32": self.speed_fp32.answers_per_second,
            "answers_per_second_int8": self.speed_int8.answers_per_second,
            "faster": self.is_faster,
            **{name: interval.value for name, interval in intervals.items()},
            "intervals": {name: interval.to_dict() for name, interval in intervals.items()},
            "validation_images": compared.images,
            "megabytes": self.megabytes,
            "megabytes_fp32": self.megabytes_fp32,
            **asdict(compared.calibration),
            "notes": list(compared.notes),
        }

    def __repr__(self) -> str:
        compared, speeds = self.comparison, (self.speed_fp32, self.speed_int8)
        slow, fast = (speed.images_per_second for speed in speeds)
        return (
            f"QuantizeResult {self.model} of {self.source}\n"
            f"accuracy {compared.accuracy_int8.value:.4f}, float32 "
            f"{compared.accuracy_fp32.value:.4f}; agreement {compared.agreement.value:.4f}\n"
            f"{fast:.0f} images/s on one thread, float32 {slow:.0f}; {self.megabytes:.1f} MB"
        )


def quantize(
    model: str | None = None,
    *,
    max_loss: float = DEFAULT_MAX_LOSS,
    observer: Observer | None = None,
) -> QuantizeResult:
    """Make the int8 form of a registered classifier and register it as a version of its own.

    Its scales are measured on training images, its temperature and threshold are fitted on
    validation images, where its answers are compared with the float32 ones. The aliases stay
    where they are.

    Args:
        model: as `preflight` takes it: a search or classifier folder, or a registered model.
        max_loss: it is refused where it loses more accuracy than this beyond noise: where even
            the low end of the paired 95 % interval of the loss is larger. A fraction.

    Raises:
        UserMistake: there is no such model, it is not registered, it is of format 1 or in int8
            already, or its images are gone or others.
        ServingError: it loses more than `max_loss`; nothing is registered.
        TrackingError: MLflow is away or refuses.
    """
    if not 0 <= max_loss <= 1:
        raise UserMistake(f"--max-loss must be between 0 and 100 points, got {100 * max_loss:g}.")
    observer = observer or Silent()
    with _source(model, observer) as source, temporary_folder() as temporary:
        int8, compared = _make(source, temporary / CLASSIFIER_FOLDER, max_loss, observer)
        observer.note("Measuring both on one thread.")
        speeds = _measure(source, int8)
        uri = _register(source, int8, compared)
        return QuantizeResult(
            source=source.uri,
            model=uri,
            comparison=compared,
            speed_fp32=speeds["fp32"],
            speed_int8=speeds["int8"],
            megabytes=_megabytes(int8.folder),
            megabytes_fp32=_megabytes(source.classifier.folder),
        )


def quantize_search(folder: Path, observer: Observer) -> str | None:
    """Register the int8 form of a search's `classifier/` beside the float32 model.

    What speaks against it is said, and is no failure of the search: the float32 model is there.

    Returns:
        `models:/NAME/VERSION`; None where it loses too much, cannot be made or cannot be written.
    """
    try:
        return quantize(str(folder), observer=observer).model
    except (VisiontunerError, OSError) as error:
        again = next_command("quantize", folder)
        observer.note(
            f"warning: package: int8: {one_line(error, 500)} The float32 model is registered; "
            f"`{again}` tries again."
        )
        return None


@contextmanager
def int8_of(
    model: str | None, *, max_loss: float = DEFAULT_MAX_LOSS, observer: Observer | None = None
) -> Iterator[tuple[Classifier, Comparison]]:
    """The int8 form of a registered classifier, for now and not registered; as `quantize`."""
    observer = observer or Silent()
    with _source(model, observer) as source, temporary_folder() as temporary:
        yield _make(source, temporary / CLASSIFIER_FOLDER, max_loss, observer)


def _make(
    source: _Source, folder: Path, max_loss: float, observer: Observer
) -> tuple[Classifier, Comparison]:
    observer.note(f"Quantising {source.uri}.")
    int8 = _write_int8(source, folder, observer)
    compared = _compare(source, int8, observer)
    if compared.loss.low > max_loss:
        raise ServingError(_refusal(source, compared, max_loss))
    facts = {k: v for k, v in asdict(compared).items() if k not in ("notes", "calibration")}
    calibrated = recalibrate(
        int8.folder,
        **asdict(compared.calibration),
        metadata={"quantization": {**int8.metadata["quantization"], "validation": facts}},
    )
    return calibrated, compared


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The float32 classifier, what MLflow knows of it, and its images."""

    classifier: Classifier
    version: ModelVersion
    inputs: Inputs

    @property
    def dataset(self) -> ImageDataset:
        return self.inputs.dataset

    @property
    def saw_validation(self) -> bool:
        """Whether its head was trained on the validation images too."""
        return self.classifier.metadata.get("trained_on") == "train+validation"

    @property
    def uri(self) -> str:
        return f"models:/{self.version.name}/{self.version.version}"


@contextmanager
def _source(model: str | None, observer: Observer) -> Iterator[_Source]:
    located = locate_model(model)
    with model_folder(str(located)) as folder:
        classifier = Classifier.load(find_classifier(folder))
        require_float(classifier, str(located))
        store = open_store()
        version = find_registered(store, classifier_digest(classifier.folder))
        if version is None:
            raise UserMistake(
                f"{located} is not registered in {tracking_uri()}: the int8 form is registered "
                f"beside it. `{next_command('sync', 'FOLDER')}` of its search registers it."
            )
        inputs = _load_inputs(trace_version(store, version), classifier, observer)
        with closing(inputs):
            yield _Source(classifier=classifier, version=version, inputs=inputs)


def _load_inputs(traced: Lineage, classifier: Classifier, observer: Observer) -> Inputs:
    """The images that the classifier was trained on, and its network.

    Raises:
        DataError: they are gone, or there is no validation.
        UserMistake: they are others now.
    """
    recorded = (traced.data or {}).get("digest")
    if traced.experiment is None or recorded is None:
        raise UserMistake(
            f"MLflow no longer says which images {(traced.model or {}).get('uri')} was trained "
            "on. Search again, then quantise."
        )
    inputs = Inputs(Experiment.parse(traced.experiment), observer)
    try:
        dataset = inputs.dataset
    except DataError as error:
        raise DataError(f"int8 needs the images the model was trained on: {error}") from None
    if dataset.digest != recorded:
        raise UserMistake(
            f"The images in {dataset.root} are not those that the model was trained on (digest "
            f"{dataset.digest[:12]} instead of {recorded[:12]}). Bring the old images back."
        )
    if not dataset.splits["validation"]:
        raise DataError(
            f"{dataset.root} has no validation images, and an int8 form that was compared with "
            "nothing is not registered. Search again with a validation split."
        )
    searched = inputs.experiment.search.backbones
    backbone = classifier.metadata.get("backbone")
    return inputs.of_network(backbone if backbone in searched else None)


def _write_int8(source: _Source, folder: Path, observer: Observer) -> Classifier:
    dataset = source.dataset
    chosen = calibration_samples(dataset.splits["train"], CALIBRATION_IMAGES)
    pixels = _decode(dataset.root, chosen, source.classifier)
    return quantize_classifier(
        source.classifier,
        folder,
        pixels,
        facts={"of": source.uri, "of_digest": source.version.tags[DIGEST_TAG]},
        find_novelty=(
            partial(novelty_of_artifact, source.inputs) if source.classifier.novelty else None
        ),
        progress=lambda done, total: observer.progress("Calibrating", done, total, "images"),
    )


def _decode(root: Path, samples: Sequence[Sample], classifier: Classifier) -> NDArray[np.uint8]:
    """Those that can be read; uint8, shape (N, size, size, 3)."""
    paths = [sample.path for sample in samples]
    decoded = decode_batch(root, paths, classifier.preprocessing)
    if not decoded.good:
        raise DataError(f"None of the {len(paths)} training images in {root} can be read.")
    return decoded.pixels


def _compare(source: _Source, int8: Classifier, observer: Observer) -> Comparison:
    fp32, quantized, labels = _answer_both(source, int8, observer)
    head, notes = _unseen_head(source)
    classifier = source.classifier
    calibration = calibrate_int8(
        fp32.logits,
        quantized.logits,
        labels,
        fitted_before=Calibration(
            temperature=classifier.temperature,
            threshold=classifier.threshold,
            abstains=classifier.abstains,
        ),
        wanted_precision=_wanted_precision(source),
    )
    return compare_forms(
        fp32,
        quantized,
        labels,
        class_names=classifier.class_names,
        temperatures=(classifier.temperature, calibration.temperature),
        calibration=calibration,
        head=head,
        notes=notes,
    )


def _wanted_precision(source: _Source) -> float | None:
    """What the threshold was chosen for, on images that the head had not seen; None otherwise."""
    calibration = source.classifier.metadata.get("calibration")
    if calibration is None or source.saw_validation:
        return None
    return float(calibration.get("wanted_precision") or DEFAULT_PRECISION)


def _answer_both(
    source: _Source, int8: Classifier, observer: Observer
) -> tuple[FormAnswers, FormAnswers, NDArray[np.int64]]:
    """Both forms' answers to the validation images, each decoded once, and the labels (N,)."""
    samples, forms = source.dataset.splits["validation"], (source.classifier, int8)
    batches = [samples[at : at + _BATCH_SIZE] for at in range(0, len(samples), _BATCH_SIZE)]
    paths = [[sample.path for sample in batch] for batch in batches]
    rows: tuple[list[list[NDArray[np.float32]]], ...] = ([], [])
    labels: list[int] = []
    decoded = decode_batches(source.dataset.root, paths, int8.preprocessing, workers=0)
    with closing(decoded):
        for done, (batch, images) in enumerate(zip(batches, decoded, strict=True), 1):
            if images.good:
                for classifier, own in zip(forms, rows, strict=True):
                    own.append(classifier.outputs(images.pixels, [LOGITS, FEATURES]))
            labels += [batch[position].label for position in images.good]
            seen = min(done * _BATCH_SIZE, len(samples))
            observer.progress("Comparing", seen, len(samples), "images")
    if not labels:
        raise DataError(f"None of the {len(samples)} validation images can be read.")
    fp32, quantized = (
        FormAnswers(**{name: _stacked(own, place) for place, name in enumerate((LOGITS, FEATURES))})
        for own in rows
    )
    return fp32, quantized, np.array(labels, dtype=np.int64)


def _stacked(rows: Sequence[Sequence[NDArray[np.float32]]], place: int) -> NDArray[np.float64]:
    return np.concatenate([row[place] for row in rows]).astype(np.float64)


def _unseen_head(source: _Source) -> tuple[Baseline | None, list[str]]:
    """For a head that was trained on validation too one that was not, and what is said of it."""
    if not source.saw_validation:
        return None, []
    inputs = source.inputs
    splits = source.dataset.splits
    images = len(splits["train"]) + len(splits["validation"])
    dim = inputs.description.feature_dim
    if not is_affordable(images, dim, len(source.classifier.class_names)):
        return None, [
            "The kept head was trained on the validation images too, so that both accuracies are "
            "too high and the loss may be too low. Test images would tell."
        ]
    features, _ = inputs.features()
    train, judged = features.split("train"), features.split("validation")
    head = logistic_regression(
        np.concatenate([train.features, judged.features]),
        np.concatenate([train.labels, judged.labels]),
        np.repeat([-1, 0], [len(train.labels), len(judged.labels)]),
        num_classes=len(source.classifier.class_names),
        refit=False,
    )
    return head, [
        "The kept head was trained on the validation images too: what is compared is a regression "
        "on the training images' features in its place. The kept head's temperature is the one "
        "that gives its float32 probabilities; its threshold stays."
    ]


def _refusal(source: _Source, compared: Comparison, max_loss: float) -> str:
    loss = compared.loss
    return (
        f"The int8 form of {source.uri} is not registered: it loses {100 * loss.value:.1f} points "
        f"of accuracy on {compared.images:,} validation images (95 %: {100 * loss.low:.1f} to "
        f"{100 * loss.high:.1f}), more than the {100 * max_loss:g} allowed. Serve the float32 "
        "version, or allow more: --max-loss."
    )


def _measure(source: _Source, int8: Classifier) -> dict[str, Speed]:
    samples = source.dataset.splits["validation"]
    step = max(1, len(samples) // _MEASURED_IMAGES)
    decoded = decode_batch(
        source.dataset.root,
        [sample.path for sample in samples[::step][:_MEASURED_IMAGES]],
        int8.preprocessing,
    )
    chosen = [samples[::step][position] for position in decoded.good]
    return measure_speeds(
        {"fp32": source.classifier.folder, "int8": int8.folder},
        [(source.dataset.root / sample.path).read_bytes() for sample in chosen],
    )


def _register(source: _Source, int8: Classifier, compared: Comparison) -> str:
    version = source.version
    if version.run_id is None:
        raise ClassifierError(f"{source.uri} belongs to no run, so that its int8 form cannot.")
    registered = log_classifier(
        int8.folder,
        run_id=version.run_id,
        tracking_uri=tracking_uri(),
        name=version.name,
        tags={
            **{k: v for k, v in version.tags.items() if k in _TAKEN_OVER},
            QUANTIZED_FROM_TAG: source.uri,
        },
        description=(
            f"int8 of {source.uri}: {100 * compared.accuracy_int8.value:.1f} % right on "
            f"{compared.images:,} validation images, float32 "
            f"{100 * compared.accuracy_fp32.value:.1f} %; the same answer to "
            f"{100 * compared.agreement.value:.1f} %. Not tested."
        ),
        derived=True,
    )
    return registered.uri


_TAKEN_OVER = ("visiontuner.search_id", "visiontuner.trial_id", "visiontuner.data_digest")


def _megabytes(folder: Path) -> float:
    return round((folder / NETWORK).stat().st_size / 1e6, 1)


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
