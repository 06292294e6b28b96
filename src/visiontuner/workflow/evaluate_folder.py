"""How a model does on any labelled images, and how these differ from what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visiontuner.data.dataset import (
    ImageDataset,
    LabelledImages,
    Sample,
    fetch_source,
    load_labelled_images,
)
from visiontuner.data.images import decode_image
from visiontuner.errors import BadImageError, DataError, UserMistake, VisiontunerError
from visiontuner.evaluation.calibration import ChosenThreshold, probabilities_of
from visiontuner.evaluation.intervals import Interval, share_interval
from visiontuner.evaluation.report import EvaluationReport, evaluate_predictions
from visiontuner.evaluation.scores import Threshold
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import newest_search
from visiontuner.model.classifier import Classifier
from visiontuner.paths import EXPERIMENT_FILE, JOURNAL_FILE, writable_cache_folder
from visiontuner.serving.client import find_classifier
from visiontuner.workflow.answering import Answers, answer_images
from visiontuner.workflow.evaluate import (
    count_test_evaluation,
    write_contact_sheet,
    write_evaluation,
)
from visiontuner.workflow.inputs import Inputs, Observer, Silent
from visiontuner.workflow.promote import model_folder

EVALUATIONS_FOLDER = "evaluations"
_MISTAKES = 24
_NEW_IMAGES = 24
_LOOKED_AT = 300  # images, for their brightness and size: three seconds
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of some images: the median, and the 5th and 95th percentile.

    Args:
        brightness: mean of an image's grey values, 0 to 255.
        side: the shorter one, in pixels.
    """

    brightness: tuple[float, float, float]
    side: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """What share of the images is of a class, here and among the training images."""

    name: str
    here: float
    training: float


@dataclass(frozen=True, kw_only=True)
class FolderEvaluation:
    """What labelled images say about a model.

    Args:
        folder: where everything was written.
        report: over the images that could be read.
        new: share of images that are not known to the model; None where it cannot tell.
        statistics, training_statistics: None where the training images are not at hand.
        classes: whose share differs most from training; empty where that is not known.
        test_images: how many are test images of the model's search; None where that is not known.
        looks: how many evaluations of these test images there were; None where none is among them.
        unreadable: path -> why it was left out.
    """

    folder: Path
    report: EvaluationReport
    new: Interval | None
    statistics: Statistics
    training_statistics: Statistics | None
    classes: tuple[ClassShare, ...]
    test_images: int | None
    looks: int | None
    unreadable: dict[str, str]

    @property
    def threshold_verdict(self) -> Literal["holds", "does not hold", "cannot be told"] | None:
        """Whether the confidence threshold has its precision here; None where there is none."""
        return judge_threshold(self.report.threshold)


def judge_threshold(
    threshold: Threshold | None,
) -> Literal["holds", "does not hold", "cannot be told"] | None:
    """Whether the interval of a threshold's precision says that the wanted one is reached."""
    if threshold is None or threshold.value is None or threshold.precision is None:
        return None
    if threshold.precision.high < threshold.wanted_precision:
        return "does not hold"
    holds = threshold.precision.low >= threshold.wanted_precision
    return "holds" if holds else "cannot be told"


def evaluate_folder(
    source: str,
    *,
    model: str | None = None,
    classes: Path | None = None,
    output: Path | None = None,
    observer: Observer | None = None,
) -> FolderEvaluation:
    """Score a model on labelled images from anywhere.

    Args:
        source: class folders, in splits or not, a table of paths and labels, or an archive.
        model: as `workflow.query` takes it; default: the newest search's.
        classes: a table with the columns class and becomes, for names that differ from the model's.
        output: where the numbers go; default: `evaluations/NAME` in the search folder, or where the
            command runs.

    Raises:
        UserMistake: there is no such model, or the images have other classes than it.
        DataError: there are no labelled images, or none can be read.
        VisiontunerError: the numbers cannot be written.
    """
    observer = observer or Silent()
    with model_folder(model or str(newest_search())) as folder:
        classifier = Classifier.load(find_classifier(folder))
        search = _search_of(classifier.folder)
        images = _load(source, classes, observer)
        samples = _with_labels_of(classifier, images, source)
        answers = answer_images(
            classifier, images.root, samples, progress=_progress(observer, "Images")
        )
        if not answers.samples:
            reason = next(iter(answers.bad.values()))
            raise DataError(f"None of the {len(samples):,} images can be read: {reason}")
        dataset = _dataset_of(search, observer)
        result = _judge(classifier, images, answers, dataset, search)
        folder = output or (search or Path()) / EVALUATIONS_FOLDER / _name(source)
        return _write(folder, result, classifier, images, answers)


def _search_of(classifier: Path) -> Path | None:
    """The search folder that a classifier folder lies in."""
    search = classifier.parent
    return search if (search / JOURNAL_FILE).is_file() else None


def _load(source: str, classes: Path | None, observer: Observer) -> LabelledImages:
    cache = writable_cache_folder()
    root = fetch_source(
        source,
        cache=cache,
        progress=lambda done, total: observer.progress("Fetching", done, total, "B"),
        note=observer.note,
    )
    images = load_labelled_images(
        root, classes=classes, cache=cache, progress=_progress(observer, "Reading", "files")
    )
    observer.note(f"{images.described}.")
    return images


def _progress(observer: Observer, what: str, unit: str = "images") -> Callable[[int, int], None]:
    return lambda done, total: observer.progress(what, done, total, unit)


def _with_labels_of(classifier: Classifier, images: LabelledImages, source: str) -> list[Sample]:
    """The samples with the classifier's labels for their class names."""
    names = {name: label for label, name in enumerate(classifier.class_names)}
    unknown = [name for name in images.class_names if name not in names]
    if unknown:
        nearest = get_close_matches(unknown[0], names, n=1, cutoff=0.5)
        near = f" (nearest to {unknown[0]!r}: {nearest[0]!r})" if nearest else ""
        shown = ", ".join(unknown[:_NAMED]) + (", …" if len(unknown) > _NAMED else "")
        raise UserMistake(
            f"{source} has classes that the model has not: {shown}{near}. Say what becomes of each "
            "in a table with the columns class and becomes (nothing: left out): --classes FILE."
        )
    return [
        Sample(sample.path, names[images.class_names[sample.label]], sample.digest, sample.group)
        for sample in images.samples
    ]


def _dataset_of(search: Path | None, observer: Observer) -> ImageDataset | None:
    """The images of a search, if they are where they were."""
    if search is None:
        return None
    try:
        return Inputs(Experiment.load(search / EXPERIMENT_FILE), observer).dataset
    except VisiontunerError as error:
        observer.note(f"warning: not compared with the search's images: {error}")
        return None


def _judge(
    classifier: Classifier,
    images: LabelledImages,
    answers: Answers,
    dataset: ImageDataset | None,
    search: Path | None,
) -> FolderEvaluation:
    labels = np.array([sample.label for sample in answers.samples], dtype=np.int64)
    report = evaluate_predictions(
        logits=answers.logits,
        labels=labels,
        class_names=classifier.class_names,
        temperature=classifier.temperature,
        threshold=_threshold(classifier),
        of="",
    )
    new = None
    if classifier.novelty is not None and answers.novelty is not None:
        is_new = answers.novelty > classifier.novelty.threshold
        new = share_interval(int(is_new.sum()), len(is_new))
    test_images = looks = training = None
    if dataset is not None:
        of_test = {sample.digest for sample in dataset.splits["test"]}
        test_images = sum(sample.digest in of_test for sample in answers.samples)
        looks = count_test_evaluation(search) if test_images and search else None
        training = _statistics(dataset.root, dataset.splits["train"])
    return FolderEvaluation(
        folder=Path(),
        report=report,
        new=new,
        statistics=_statistics(images.root, answers.samples),
        training_statistics=training,
        classes=_class_shares(classifier.class_names, labels, dataset),
        test_images=test_images,
        looks=looks,
        unreadable=answers.bad | dict.fromkeys(images.unreadable, "cannot be opened"),
    )


def _threshold(classifier: Classifier) -> ChosenThreshold | None:
    """What the classifier's evaluation has set; None where there was none."""
    calibration = classifier.metadata.get("calibration")
    if calibration is None or (classifier.threshold is None and not classifier.abstains):
        return None
    precision, coverage = (
        calibration.get(name) for name in ("validation_precision", "validation_coverage")
    )
    return ChosenThreshold(
        wanted_precision=float(calibration["wanted_precision"]),
        value=classifier.threshold,
        precision=math.nan if precision is None else precision,
        coverage=math.nan if coverage is None else coverage,
    )


def _statistics(root: Path, samples: Sequence[Sample]) -> Statistics:
    """Of at most 300 of them, drawn at random."""
    brightness, sides = [], []
    drawn = np.random.default_rng(0).permutation(len(samples))[:_LOOKED_AT]
    for row in drawn:
        path = root / samples[row].path
        with suppress(BadImageError, OSError):
            grey = decode_image(path, target=64).convert("L")
            with Image.open(path) as file:
                sides.append(min(file.size))
            brightness.append(float(np.asarray(grey).mean()))
    return Statistics(brightness=_spread(brightness), side=_spread(sides))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return (math.nan,) * 3
    low, middle, high = np.percentile(values, [5, 50, 95])
    return float(middle), float(low), float(high)


def _class_shares(
    names: Sequence[str], labels: NDArray[np.int64], dataset: ImageDataset | None
) -> tuple[ClassShare, ...]:
    """The classes whose share differs most from that in training."""
    if dataset is None or dataset.class_names != tuple(names):
        return ()
    here = np.bincount(labels, minlength=len(names)) / len(labels)
    counts = np.array(dataset.counts("train"))
    training = counts / counts.sum()
    order = np.argsort(-np.abs(here - training), kind="stable")[:_NAMED]
    return tuple(
        ClassShare(name=names[row], here=float(here[row]), training=float(training[row]))
        for row in order
    )


def _name(source: str) -> str:
    return Path(source.rstrip("/")).name.partition(".")[0] or "images"


def _write(
    folder: Path,
    result: FolderEvaluation,
    classifier: Classifier,
    images: LabelledImages,
    answers: Answers,
) -> FolderEvaluation:
    facts: dict[str, Any] = {
        "classifier": str(classifier.folder),
        "new": result.new and result.new.to_dict(),
        "statistics": asdict(result.statistics),
        "training_statistics": result.training_statistics and asdict(result.training_statistics),
        "class_shares": [asdict(share) for share in result.classes],
        "threshold": result.report.to_dict()["threshold"],
        "threshold_verdict": result.threshold_verdict,
        "test_images": result.test_images,
        "looks": result.looks,
        "unreadable": result.unreadable,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}). Make room.") from None
    write_evaluation(
        folder,
        report=result.report,
        facts=facts,
        answers=answers,
        classifier=classifier,
        root=images.root,
        mistakes=_MISTAKES,
    )
    _draw_new(folder / "new.png", classifier, images.root, answers)
    return FolderEvaluation(**{**result.__dict__, "folder": folder})


def _draw_new(file: Path, classifier: Classifier, root: Path, answers: Answers) -> None:
    """The images that are most new, with their label and the answer."""
    if classifier.novelty is None or answers.novelty is None:
        return
    probabilities = probabilities_of(answers.logits, classifier.temperature)
    names = classifier.class_names
    order = np.argsort(-answers.novelty, kind="stable")[:_NEW_IMAGES]
    shown = [
        (
            answers.samples[row].path,
            (
                names[answers.samples[row].label],
                names[int(probabilities[row].argmax())],
                float(probabilities[row].max()),
            ),
        )
        for row in order
        if answers.novelty[row] > classifier.novelty.threshold
    ]
    write_contact_sheet(file, root, shown, names)
