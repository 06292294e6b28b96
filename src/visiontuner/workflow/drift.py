"""Whether the images that a model is asked about are still like those that it was made with.

Nothing that is there is changed. Labels are not needed, and nothing is said of accuracy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample
from visiontuner.errors import DataError, ServingError, TrackingError, UserMistake
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.drift import (
    FALSE_ALARMS,
    FEWEST,
    Measure,
    Observations,
    compare_observations,
)
from visiontuner.evaluation.intervals import Interval, share_interval
from visiontuner.io.files import as_file_name, write_json
from visiontuner.journal import SearchRecord, newest_search
from visiontuner.model.classifier_files import replacing
from visiontuner.paths import (
    CAPTURED_FOLDER,
    DRIFT_FIGURE,
    DRIFT_FILE,
    DRIFT_FOLDER,
    DRIFT_NEW_FOLDER,
    DRIFT_NEW_SHEET,
    DRIFT_TABLE,
    tracking_uri,
    writable_cache_folder,
)
from visiontuner.text import csv_row
from visiontuner.tracking.figures.drift import drift_figure
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.store import Store
from visiontuner.tracking.writer import DriftCheck, write_drift_check
from visiontuner.workflow.capture import ANSWERS, capture
from visiontuner.workflow.drift_reference import (
    MEASURES,
    Reference,
    Seen,
    find_reference,
    see_images,
)
from visiontuner.workflow.evaluate import write_contact_sheet
from visiontuner.workflow.inputs import Observer, Silent
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
