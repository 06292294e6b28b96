"""Whether the images that a model is asked about are still like those that it was made with.

Nothing that is there is changed. Labels are not needed, and nothing is said of accuracy. A model is
surer of the images that it was trained on than of others: so a network is judged by its validation
images, and the answers that are compared are those of regressions on the features, each of which
has not seen the images that it answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample, find_units
from visiontuner.data.findings import read_header
from visiontuner.errors import BadImageError, DataError, ServingError, TrackingError, UserMistake
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.drift import (
    FALSE_ALARMS,
    FEWEST,
    FoldJudges,
    Measure,
    Observations,
    compare_observations,
)
from visiontuner.evaluation.intervals import Interval, share_interval
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import as_file_name, write_json, write_whole
from visiontuner.journal import SearchRecord, newest_search, packaged_trial
from visiontuner.model.classifier import FEATURES, LOGITS, Classifier
from visiontuner.model.classifier_files import replacing
from visiontuner.model.novelty import Novelty, novelty_to, scores_among
from visiontuner.paths import (
    CAPTURED_FOLDER,
    CLASSIFIER_FOLDER,
    DRIFT_FIGURE,
    DRIFT_FILE,
    DRIFT_FOLDER,
    DRIFT_NEW_FOLDER,
    DRIFT_NEW_SHEET,
    DRIFT_TABLE,
    EXPERIMENT_FILE,
    tracking_uri,
    writable_cache_folder,
)
from visiontuner.search.plan import stage_of
from visiontuner.serving.registry import classifier_digest
from visiontuner.text import csv_row
from visiontuner.tracking.figures.evaluation import drift_figure
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.store import Store
from visiontuner.tracking.writer import DriftCheck, write_drift_check
from visiontuner.workflow.answering import run_over_images
from visiontuner.workflow.deploy import ANSWERS, capture
from visiontuner.workflow.evaluate import write_contact_sheet
from visiontuner.workflow.inputs import Inputs, Observer, Silent, require_same_data
from visiontuner.workflow.suggest import find_images, link_image

_ENDPOINT = re.compile(r"s3://.+|[A-Za-z0-9][A-Za-z0-9-]{0,62}", re.DOTALL)
_MOST_IMAGES = 2_000  # through the network: half a minute
_MOST_NEW = 50
_DRAWN = 24
_CLASSES = 5  # whose share has changed most
_DISAGREE = 0.05


@dataclass(frozen=True, kw_only=True)
class NewImage:
    """An image that is unlike those that the model knows.

    Args:
        path: relative to the images' folder.
        novelty: as an answer's, see `Prediction`.
    """

    path: str
    guess: str
    probability: float
    novelty: float


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """The share of answers that name a class, in [0, 1], of the reference and of the images."""

    name: str
    reference: float
    images: float


@dataclass(frozen=True, kw_only=True, repr=False)
class DriftResult:
    """What `find_drift` found.

    Args:
        folder: holds drift.json, drift.csv, drift.png and, if some are new, new.png and new/.
        source: the folder of the images.
        search: whose model and images they were compared with.
        measures: one for each test; which have moved.
        false_alarms: how often any measure moves where nothing has changed, at most.
        images: how many were compared, of `found` that are no training or validation images.
        known: how many more are, and were left out.
        unreadable: path -> why it was left out.
        share_new: of the images that are not known to the model; None where it cannot tell.
        new: the newest images, the newest first.
        classes: whose share of the answers has changed most.
        notes: what must be said of it, a sentence each.
        run_id: of the run in MLflow; None where `tracking_problem` says why there is none.
    """

    folder: Path
    source: Path
    search: Path
    measures: tuple[Measure, ...]
    false_alarms: float
    images: int
    found: int
    known: int
    unreadable: dict[str, str]
    share_new: Interval | None
    new: tuple[NewImage, ...]
    classes: tuple[ClassChange, ...]
    notes: tuple[str, ...]
    run_id: str | None = None
    tracking_problem: str | None = None

    @property
    def drifted(self) -> bool:
        """Whether any measure has moved."""
        return any(measure.moved for measure in self.measures)

    @property
    def table(self) -> pd.DataFrame:
        """One row a measure: name, p_value, moved, reference, images, reference_images."""
        return pd.DataFrame(map(asdict, self.measures))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        left_out = {"run_id", "tracking_problem", "share_new"}
        raw = {key: value for key, value in asdict(self).items() if key not in left_out}
        raw |= {key: str(raw[key].resolve()) for key in ("folder", "source", "search")}
        new = None if self.share_new is None else self.share_new.to_dict()
        return {"drifted": self.drifted, **raw, "share_new": new}

    def __repr__(self) -> str:
        moved = ", ".join(measure.name for measure in self.measures if measure.moved)
        return (
            f"DriftResult {self.folder}\n"
            f"drift: {moved or 'none'} ({self.images:,} images, {len(self.measures)} measures)"
        )


def find_drift(
    source: str,
    search: Path | None = None,
    *,
    output: Path | None = None,
    since: timedelta | None = None,
    region: str | None = None,
    assume_role: str | None = None,
    false_alarms: float = FALSE_ALARMS,
    without: Collection[str] = (),
    observer: Observer | None = None,
) -> DriftResult:
    """Compare images with those that a search's model was made with.

    Args:
        source: a folder of images, or an endpoint with data capture (`s3://…/ENDPOINT` too), whose
            images are fetched into `captured/ENDPOINT` in the search folder.
        search: a search folder; default: the newest search.
        output: where the files go; default: `drift/NAME` in the search folder.
        since: of an endpoint, no older requests.
        false_alarms: how often any measure may move where nothing has changed, in (0, 1).
        without: measures that are left out.

    Raises:
        UserMistake: there is nothing to compare, or the search's images have changed.
        ServingError: AWS refuses or cannot be reached.
        VisiontunerError: the folder cannot be written.
    """
    observer = observer or Silent()
    _check(false_alarms, without)
    search, cache = search or newest_search(), writable_cache_folder()
    root = Path(source)
    if not root.is_dir():
        place = {"region": region, "assume_role": assume_role}
        root = _captured(source, search, observer, since=since, **place)
    reference = find_reference(search, cache, observer)
    for note in reference.notes:
        observer.note(note)
    found = find_images(root, cache, observer)
    fresh = [sample for sample in found if sample.digest not in reference.known]
    seen = _see(reference, root, fresh, known=len(found) - len(fresh), observer=observer)
    images = reference.observe(seen)
    try:
        measures = compare_observations(
            reference.observations, images, false_alarms=false_alarms, without=without
        )
    except ValueError as error:
        raise UserMistake(f"{search} gives nothing to compare with: {error}.") from None
    share_new, new = _new_images(reference, seen)
    result = DriftResult(
        folder=output or _folder_of(root, search / DRIFT_FOLDER),
        source=root,
        search=search,
        measures=measures,
        false_alarms=false_alarms,
        images=len(seen.samples),
        found=len(fresh),
        known=len(found) - len(fresh),
        unreadable=seen.bad,
        share_new=share_new,
        new=new,
        classes=_class_changes(reference, images.classes),
        notes=(*reference.notes, *_disagreement(root, reference, seen)),
    )
    _write(result, reference.observations, images)
    return _tracked(result)


def _check(false_alarms: float, without: Collection[str]) -> None:
    if not 0 < false_alarms < 1:
        raise UserMistake(f"false_alarms must be > 0 and < 1, got {false_alarms:g}.")
    if unknown := set(without) - set(MEASURES):
        raise UserMistake(
            f"There is no measure {min(unknown)!r} to leave out; there are {', '.join(MEASURES)}."
        )


def _captured(
    source: str, search: Path, observer: Observer, *, since: timedelta | None, **place: str | None
) -> Path:
    """Fetch an endpoint's images into the search folder; the folder that holds them."""
    if not _ENDPOINT.fullmatch(source):
        raise UserMistake(f"{source} is neither a folder nor the name of an endpoint.")
    root = search / CAPTURED_FOLDER / _name_of(Path(source))
    try:
        capture(source, output=root, since=since, progress=observer.progress, **place)
    except (UserMistake, ServingError) as error:
        if source.startswith("s3://"):
            raise
        raise type(error)(
            f"There is no folder {source}, and as an endpoint's name: {error}"
        ) from None
    return root


def _name_of(root: Path) -> str:
    return as_file_name(root.name or root.resolve().name or "images")


def _folder_of(root: Path, checks: Path) -> Path:
    """Where the check of a folder goes: named after it, and not where that of another one is."""
    folder = checks / _name_of(root)
    try:
        before = json.loads((folder / DRIFT_FILE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return folder
    if before == str(root.resolve()):
        return folder
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:6]
    return checks / f"{folder.name}-{digest}"


def _see(
    reference: Reference, root: Path, fresh: Sequence[Sample], *, known: int, observer: Observer
) -> Seen:
    """What the model says of at most 2,000 images, drawn at random.

    Raises:
        UserMistake: they are too few.
        DataError: none can be read.
    """
    drawn = np.random.default_rng(0).permutation(len(fresh))[:_MOST_IMAGES]
    chosen = [fresh[row] for row in np.sort(drawn)]
    seen = see_images(
        reference.classifier,
        root,
        chosen,
        lambda done, total: observer.progress("Images", done, total, "images"),
    )
    if len(seen.samples) >= FEWEST:
        return seen
    if seen.bad and not seen.samples:
        reason = next(iter(seen.bad.values()))
        raise DataError(f"None of the {len(seen.bad):,} images in {root} can be read: {reason}")
    more = f"; {known:,} more are training or validation images" if known else ""
    more += f"; {len(seen.bad):,} cannot be read" if seen.bad else ""
    raise UserMistake(
        f"{root} holds {len(seen.samples):,} different images{more}. At least {FEWEST} are needed "
        "for a test."
    )


def _new_images(reference: Reference, seen: Seen) -> tuple[Interval | None, tuple[NewImage, ...]]:
    """The share of images that the artifact does not know, and the newest of them."""
    classifier = reference.classifier
    if classifier.novelty is None:
        return None, ()
    scores = classifier.novelty.scores(seen.features)
    probabilities = probabilities_of(seen.logits, classifier.temperature)
    is_new = scores > classifier.novelty.threshold
    order = [row for row in np.argsort(-scores, kind="stable")[:_MOST_NEW] if is_new[row]]
    new = tuple(
        NewImage(
            path=seen.samples[row].path,
            guess=classifier.class_names[int(probabilities[row].argmax())],
            probability=round(float(probabilities[row].max()), 4),
            novelty=round(float(scores[row]), 4),
        )
        for row in order
    )
    return share_interval(int(is_new.sum()), len(is_new)), new


def _class_changes(
    reference: Reference, classes: NDArray[np.int64] | None
) -> tuple[ClassChange, ...]:
    before = reference.observations.classes
    if before is None or classes is None:
        return ()
    names = reference.classifier.class_names
    was, is_ = (np.bincount(c, minlength=len(names)) / len(c) for c in (before, classes))
    order = np.argsort(-np.abs(is_ - was), kind="stable")[:_CLASSES]
    return tuple(
        ClassChange(name=names[row], reference=float(was[row]), images=float(is_[row]))
        for row in order
    )


def _disagreement(root: Path, reference: Reference, seen: Seen) -> list[str]:
    """That the endpoint's captured answers are not this model's, where they often are not."""
    try:
        lines = (root / ANSWERS).read_text(encoding="utf-8").splitlines()
        told = {row["image"]: row["label"] for row in map(json.loads, lines) if row.get("label")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    names = reference.classifier.class_names
    pairs = [
        (told[sample.path], names[label])
        for sample, label in zip(seen.samples, seen.logits.argmax(axis=1), strict=True)
        if sample.path in told
    ]
    differ = sum(one != other for one, other in pairs)
    if differ <= _DISAGREE * len(pairs):
        return []
    return [
        f"The endpoint has named another class for {differ:,} of {len(pairs):,} images: it runs "
        "another model. Name the search of its own."
    ]


def _write(result: DriftResult, reference: Observations, images: Observations) -> None:
    """The folder of a check in place of an older one."""
    folder = result.folder.absolute()
    if folder.exists() and not (folder / DRIFT_FILE).exists() and any(folder.iterdir()):
        raise UserMistake(f"{folder} already exists. Name another --output.")
    with replacing(folder) as temporary:
        write_json(temporary / DRIFT_FILE, result.to_dict())
        rows = [asdict(measure) for measure in result.measures]
        lines = [tuple(rows[0]), *(row.values() for row in rows)]
        (temporary / DRIFT_TABLE).write_text("".join(map(csv_row, lines)), encoding="utf-8")
        figure = drift_figure(result.measures, result.classes, reference, images)
        (temporary / DRIFT_FIGURE).write_bytes(to_png(figure))
        _link_new(temporary, result)


def _link_new(folder: Path, result: DriftResult) -> None:
    """The newest images as a sheet, and as links in a folder of their own."""
    shown = [(one.path, ("", one.guess, one.probability)) for one in result.new[:_DRAWN]]
    guesses = sorted({one.guess for one in result.new})
    write_contact_sheet(folder / DRIFT_NEW_SHEET, result.source, shown, guesses)
    for rank, one in enumerate(result.new, 1):
        place = folder / DRIFT_NEW_FOLDER
        place.mkdir(exist_ok=True)
        # Of a long name the end, with its ending: file systems take 255 bytes.
        name = as_file_name(f"{rank:05d}-{PurePosixPath(one.path).name[-60:]}")
        link_image(result.source / one.path, place / name)


def _tracked(result: DriftResult) -> DriftResult:
    """The check as a run in MLflow; one that is away is said, and nothing else is lost."""
    record = SearchRecord.load(result.search)
    metrics = {"drifted": float(result.drifted), "images": float(result.images)}
    if result.share_new is not None:
        metrics["share_new"] = result.share_new.value
    for measure in result.measures:
        metrics[f"{measure.name}.p_value"] = measure.p_value
        for side in ("reference", "images"):
            value = getattr(measure, side)
            if value is not None:
                metrics[f"{measure.name}.{side}"] = value
    check = DriftCheck(
        name=str(record.started["experiment"]["name"]),
        subject=result.folder.name,
        search_id=record.search_id,
        moved=[measure.name for measure in result.measures if measure.moved],
        params={"false_alarms": f"{result.false_alarms:g}", "source": str(result.source)},
        metrics=metrics,
        files=[
            path
            for name in (DRIFT_FILE, DRIFT_TABLE, DRIFT_FIGURE, DRIFT_NEW_SHEET)
            if (path := result.folder / name).exists()
        ],
    )
    run_id, problem = None, None
    try:
        advice = "Set MLFLOW_TRACKING_URI and check again."
        run_id = write_drift_check(Store(tracking_uri(), advice=advice), check)
    except TrackingError as error:
        problem = str(error)
    return DriftResult(**{**result.__dict__, "run_id": run_id, "tracking_problem": problem})


NOVELTY, CONFIDENCE = "novelty", "confidence"
STATISTICS = ("brightness", "contrast", "sharpness", "side")
MEASURES = ("features", NOVELTY, CONFIDENCE, "classes", *STATISTICS)

_MOST_OBSERVED = 1_000  # images through the network, once: ten to twenty seconds
_VERSION = 1
_LEARNED = "the network was trained on the validation images too"
_EARLIER = "the classifier is of an earlier version, which gives no features"
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the artifact says of images that can be read, and what they are like.

    Args:
        samples: the N images.
        logits: float64, shape (N, C), before the temperature.
        features: float32, shape (N, D); (N, 0) of an artifact that gives none.
        statistics: float64, shape (N, 4): mean and standard deviation of the gray values and their
            mean step from pixel to pixel, of what the network sees, 0 to 255; and the shorter side
            of the file's image in pixels, NaN if it has gone meanwhile.
        bad: path -> why it could not be read.
    """

    samples: tuple[Sample, ...]
    logits: NDArray[np.float64]
    features: NDArray[np.float32]
    statistics: NDArray[np.float64]
    bad: dict[str, str]

    @property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """The statistics by name."""
        columns = zip(STATISTICS, self.statistics.T, strict=True)
        return {name: column[np.isfinite(column)] for name, column in columns}


def see_images(
    classifier: Classifier,
    root: Path,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None],
) -> Seen:
    """Run the artifact over images, and measure what it sees."""
    names = [name for name in (LOGITS, FEATURES) if name in classifier.output_names]
    good: list[Sample] = []
    logits = [np.empty((0, len(classifier.class_names)))]
    features: list[NDArray[np.float32]] = []
    statistics = [np.empty((0, len(STATISTICS)))]
    bad: dict[str, str] = {}
    for batch in run_over_images(classifier, root, samples, names, progress=progress):
        bad |= batch.bad
        if batch.samples:
            good += batch.samples
            logits.append(batch.outputs[0].astype(np.float64))
            features += batch.outputs[1:]
            sides = [_side(root / sample.path) for sample in batch.samples]
            statistics.append(np.column_stack([_statistics_of(batch.pixels), sides]))
    return Seen(
        samples=tuple(good),
        logits=np.concatenate(logits),
        features=np.concatenate(features) if features else np.empty((len(good), 0), np.float32),
        statistics=np.concatenate(statistics),
        bad=bad,
    )


def _statistics_of(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of images of shape (B, size, size, 3): float64, shape (B, 3)."""
    gray = pixels.astype(np.float32) @ _GREY
    steps = [np.abs(np.diff(gray, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    rows = [gray.mean(axis=(1, 2)), gray.std(axis=(1, 2)), np.mean(steps, axis=0)]
    return np.stack(rows, axis=1).astype(np.float64)


def _side(path: Path) -> float:
    with suppress(BadImageError, OSError):
        return float(min(read_header(path)[1:]))
    return float("nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What is usual for a classifier.

    Args:
        bank: by which novelty is measured; None where it cannot be.
        judges: whose answers are compared; None where there can be none.
        known: digests of all images that it may have learned from.
        notes: which measures are left out, and why; a sentence each.
    """

    classifier: Classifier
    observations: Observations
    bank: Novelty | None
    judges: FoldJudges | None
    known: frozenset[str]
    notes: tuple[str, ...]

    def observe(self, seen: Seen) -> Observations:
        """The same measures of other images."""
        novelty = None if self.bank is None else self.bank.scores(seen.features)
        answers = None if self.judges is None else self.judges.answers(seen.features)
        return _observations(seen, novelty, answers)


def _observations(
    seen: Seen, novelty: NDArray[np.float64] | None, answers: NDArray[np.float64] | None
) -> Observations:
    values = dict[str, NDArray[np.float64]]()
    if novelty is not None:
        values[NOVELTY] = novelty
    if answers is not None:
        values[CONFIDENCE] = answers.max(axis=1)
    return Observations(
        features=seen.features if seen.features.shape[1] else None,
        classes=None if answers is None else answers.argmax(axis=1),
        values=values | seen.values,
    )


def find_reference(search: Path, cache: Path, observer: Observer) -> Reference:
    """What a search's own images say of its model, each without having been learned by heart.

    Raises:
        UserMistake: the images have changed since the search.
        ClassifierError: there is no classifier.
        DataError: the images are gone.
    """
    record, experiment = SearchRecord.load(search), Experiment.load(search / EXPERIMENT_FILE)
    classifier = Classifier.load(search / CLASSIFIER_FOLDER)
    inputs = Inputs(experiment, observer, cache=cache)
    require_same_data(record, inputs.dataset)
    trial = record.named(packaged_trial(search) or "") or record.kept
    if trial is None:
        raise UserMistake(f"{search} has no trial that could be used. Search again.")
    is_head = trial.trial_id in record.baselines or not stage_of(experiment, trial).on_images
    splits = inputs.dataset.splits
    known = [*splits["train"], *splits["validation"]]
    learned = not is_head and record.is_unvalidated
    chosen = known if is_head or learned else list(splits["validation"])
    seen = _see_once(classifier, inputs, _drawn(chosen, _MOST_OBSERVED))
    notes = list[str]()
    if learned:
        notes.append(f"Only what images look like is compared: {_LEARNED}.")
        seen = replace(seen, features=seen.features[:, :0])
    elif not seen.features.shape[1]:
        notes.append(f"Only what images look like is compared: {_EARLIER}.")
    known_digests = frozenset(sample.digest for sample in known)
    return make_reference(classifier, seen, is_head=is_head, known=known_digests, notes=notes)


def make_reference(
    classifier: Classifier,
    seen: Seen,
    *,
    is_head: bool,
    known: frozenset[str] = frozenset(),
    notes: Sequence[str] = (),
) -> Reference:
    """What is usual, by images that no training has changed the features of.

    Args:
        seen: in random order.
        is_head: they are training images too, of a head.
    """
    bank, novelty = _novelty(classifier, seen, is_head=is_head)
    judges, answers = _judges(classifier, seen)
    return Reference(
        classifier=classifier,
        observations=_observations(seen, novelty, answers),
        bank=bank,
        judges=judges,
        known=known,
        notes=tuple(notes),
    )


def _judges(
    classifier: Classifier, seen: Seen
) -> tuple[FoldJudges | None, NDArray[np.float64] | None]:
    """Who answers in the model's place, and their answers to the reference's images."""
    if not seen.features.shape[1] or len(seen.features) < FEWEST:
        return None, None
    labels = np.array([sample.label for sample in seen.samples], dtype=np.int64)
    judges = FoldJudges.fit(seen.features, labels, num_classes=len(classifier.class_names))
    return judges, judges.answers(seen.features)


def _novelty(
    classifier: Classifier, seen: Seen, *, is_head: bool
) -> tuple[Novelty | None, NDArray[np.float64] | None]:
    """What to measure novelty by, and that of the reference's images.

    A head's features no image has changed: each image is compared with the others. A network's
    validation images are compared with the training images of its artifact.
    """
    if not seen.features.shape[1]:
        return None, None
    if is_head:
        if len(seen.features) < FEWEST:
            return None, None
        return novelty_to(seen.features), scores_among(seen.features)
    bank = classifier.novelty
    return bank, None if bank is None else bank.scores(seen.features)


def _drawn(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many images, at random, one of each group and of each set of copies.

    Images of one group are alike: each of them would count as if it said something of its own.
    """
    unit_of = find_units(samples)
    # Shuffled, they can be parted by their numbers.
    order = np.random.default_rng(0).permutation(len(samples))
    first: dict[str, Sample] = {}
    for row in order:
        first.setdefault(unit_of(samples[row]), samples[row])
    return list(first.values())[:most]


def _see_once(classifier: Classifier, inputs: Inputs, samples: Sequence[Sample]) -> Seen:
    """`see_images` of a search's images, remembered: they are asked for with every check."""
    said = [_VERSION, classifier_digest(classifier.folder), *(s.digest for s in samples)]
    name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
    kept = inputs.cache / "drift" / f"{name}.npz"
    seen = _read(kept, samples)
    if seen is None:
        seen = see_images(
            classifier,
            inputs.dataset.root,
            samples,
            lambda done, total: inputs.observer.progress("Reference", done, total, "images"),
        )
        _keep(kept, seen)
    return seen


def _keep(path: Path, seen: Seen) -> None:
    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            digests=np.array([sample.digest for sample in seen.samples]),
            logits=seen.logits,
            features=seen.features,
            statistics=seen.statistics,
        )

    with suppress(OSError):  # a cache that cannot be written is no error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)


def _read(path: Path, samples: Sequence[Sample]) -> Seen | None:
    """What was kept of images that can be read; None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            by_digest = {sample.digest: sample for sample in samples}
            return Seen(
                samples=tuple(by_digest[str(digest)] for digest in file["digests"]),
                logits=file["logits"],
                features=file["features"],
                statistics=file["statistics"],
                bad={},
            )
    except (OSError, ValueError, LookupError, EOFError, BadZipFile):
        return None
