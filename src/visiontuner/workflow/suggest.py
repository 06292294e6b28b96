"""Which unlabelled images to label next: a list, a contact sheet, and folders to sort them in.

Nothing that is there is changed: the folders hold links (copies where the disk has no links).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from visiontuner.data.arrays import SplitFeatures
from visiontuner.data.dataset import ImageDataset, NoneReadable, Sample
from visiontuner.data.images import image_extensions
from visiontuner.errors import DataError, UserMistake
from visiontuner.evaluation.baselines import is_affordable, logistic_regression
from visiontuner.evaluation.calibration import probabilities_of
from visiontuner.evaluation.suggestions import choose_images
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import (
    ImageFile,
    as_file_name,
    content_digests,
    file_state,
    is_folder,
    is_made_by_commands,
    scan_folder,
)
from visiontuner.journal import SearchRecord, newest_search
from visiontuner.model.classifier_files import replacing
from visiontuner.paths import (
    EXPERIMENT_FILE,
    SUGGEST_FILE,
    SUGGEST_FOLDER,
    SUGGEST_SHEET,
    SUGGEST_SORT_FOLDER,
)
from visiontuner.text import csv_row
from visiontuner.workflow.evaluate import write_contact_sheet
from visiontuner.workflow.inputs import Inputs, Observer, Silent, require_same_data
from visiontuner.workflow.selection import folds_of

FOLDS = 5
_DRAWN = 48  # eight rows
_COLUMNS = ("rank", "path", "guess", "probability")


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """An image to label.

    Args:
        rank: from 1 on; the first ones teach most.
        path: relative to the folder of unlabelled images.
        guess: the most probable class, by a regression on the labelled images.
        probability: of the guess, in [0, 1].
    """

    rank: int
    path: str
    guess: str
    probability: float


@dataclass(frozen=True, kw_only=True, repr=False)
class SuggestResult:
    """What `suggest_images` chose.

    Args:
        folder: holds suggest.csv, suggest.png and sort/CLASS/.
        unlabelled: images that could be chosen from.
        labelled: images of the folder left out, since the data set holds them already.
        unreadable: images of the folder that cannot be decoded.
    """

    folder: Path
    suggestions: tuple[Suggestion, ...]
    unlabelled: int
    labelled: int
    unreadable: int

    @property
    def table(self) -> pd.DataFrame:
        """One row a suggestion: rank, path, guess, probability."""
        return pd.DataFrame(map(asdict, self.suggestions), columns=list(_COLUMNS))

    def __repr__(self) -> str:
        return (
            f"SuggestResult {self.folder}\n"
            f"to label: {len(self.suggestions):,} of {self.unlabelled:,} images"
        )


def suggest_images(
    images: Path,
    search: Path | None = None,
    *,
    experiment: Experiment | None = None,
    budget: int = 50,
    output: Path | None = None,
    observer: Observer | None = None,
) -> SuggestResult:
    """Choose the images of a folder that are worth a label.

    Args:
        images: a folder, with all that lies below it.
        search: a search folder, whose images and network are taken; default: the newest search.
        experiment: labelled images and network without a search.
        budget: how many images are chosen.
        output: a new folder; default: `suggestions` where the command runs.

    Raises:
        UserMistake: there is nothing to choose from, the labelled images are too few or too many,
            or the output folder is taken.
        VisiontunerError: the features cannot be computed, or the folder cannot be written.
    """
    observer = observer or Silent()
    folder = output or Path(SUGGEST_FOLDER)
    if folder.exists() and any(folder.iterdir()):
        raise UserMistake(
            f"{folder} already exists, perhaps with images that you are sorting. Name another "
            "--output, or delete it."
        )
    if experiment is not None:
        inputs = Inputs(experiment, observer)
    else:
        search = search or newest_search()
        inputs = Inputs(Experiment.load(search / EXPERIMENT_FILE), observer)
        require_same_data(SearchRecord.load(search), inputs.dataset)
    known = {s.digest for samples in inputs.loaded.splits.values() for s in samples}
    found = find_images(images, inputs.cache, observer)
    fresh = [sample for sample in found if sample.digest not in known]
    if not fresh:
        raise UserMistake(_nothing(images, len(found)))
    unlabelled, suggestions = _choose(images, fresh, inputs, budget)
    _write(folder, images, suggestions, inputs.dataset.class_names)
    return SuggestResult(
        folder=folder,
        suggestions=tuple(suggestions),
        unlabelled=unlabelled,
        labelled=len(found) - len(fresh),
        unreadable=len(fresh) - unlabelled,
    )


def _nothing(images: Path, found: int) -> str:
    if found:
        return f"All {found:,} images in {images} are labelled already. Name another folder."
    return f"{images} holds no images. Name the folder of those to choose from."


def find_images(root: Path, cache: Path, observer: Observer) -> list[Sample]:
    """The image files below a folder, one for each content, by path; each has the label 0."""
    if not root.is_dir():
        raise UserMistake(f"{root} is no folder. Name the folder of images to choose from.")
    files = [
        ImageFile(path.relative_to(root).as_posix(), "", None, file_state(path.stat()))
        for path in _walk(root)
    ]
    digests = content_digests(
        root,
        files,
        cache=cache,
        progress=lambda done, total: observer.progress("Reading", done, total, "files"),
    )
    first: dict[str, Sample] = {}
    for path in sorted(digests):
        digest = digests[path]
        if isinstance(digest, str):
            first.setdefault(digest, Sample(path, 0, digest))
    return list(first.values())


def _walk(folder: Path) -> Iterator[Path]:
    endings = image_extensions()
    for entry in scan_folder(folder):
        path = Path(entry.path)
        if is_folder(entry):
            if not is_made_by_commands(path):
                yield from _walk(path)
        elif path.suffix.lower() in endings:
            yield path


def _choose(
    root: Path, fresh: Sequence[Sample], inputs: Inputs, budget: int
) -> tuple[int, list[Suggestion]]:
    """How many images can be read, and those that are chosen."""
    features, _ = inputs.features()
    splits = [features.split(name) for name in ("train", "validation")]
    known = {s.path: s for of in inputs.dataset.splits.values() for s in of}
    samples = [known[path] for split in splits for path in split.paths]
    labelled = np.concatenate([split.features for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    names = features.class_names
    if not is_affordable(len(labels), labelled.shape[1], len(names)):
        raise UserMistake(
            f"{len(labels):,} labelled images of {len(names):,} classes would take many minutes. "
            "Take some of them: `--set data.limit_per_class=50`."
        )
    try:
        folds = folds_of(samples, min(FOLDS, len(samples)))
    except ValueError as error:
        raise UserMistake(f"Too few labelled images: {error}.") from None
    try:
        pool = _features_of(root, fresh, inputs)
    except NoneReadable as error:
        raise DataError(
            f"None of the {len(fresh):,} images in {root} can be read: {error.first}."
        ) from None
    fitted = logistic_regression(labelled, labels, folds, num_classes=len(names))
    assert fitted.weights is not None
    assert fitted.biases is not None
    probabilities = probabilities_of(pool.features @ fitted.weights.T + fitted.biases)
    rows = choose_images(pool.features, probabilities, budget)
    return len(pool.paths), [
        Suggestion(
            rank=rank,
            path=pool.paths[row],
            guess=names[probabilities[row].argmax()],
            probability=round(float(probabilities[row].max()), 4),
        )
        for rank, row in enumerate(rows.tolist(), 1)
    ]


def _features_of(root: Path, fresh: Sequence[Sample], inputs: Inputs) -> SplitFeatures:
    rows = json.dumps([[sample.path, sample.digest] for sample in fresh])
    dataset = ImageDataset(
        root=root,
        class_names=("unlabelled",),
        splits={"train": tuple(fresh), "validation": (), "test": ()},
        digest=hashlib.sha256(rows.encode()).hexdigest(),
        findings=(),
    )
    return inputs.features_of(dataset, ("train",)).split("train")


def _write(
    folder: Path, root: Path, suggestions: Sequence[Suggestion], class_names: Sequence[str]
) -> None:
    """The folder whole or not at all: half of one would look like one that is being sorted."""
    rows = [(s.rank, s.path, s.guess, s.probability) for s in suggestions]
    with replacing(folder) as temporary:
        content = "".join(map(csv_row, [_COLUMNS, *rows])).encode(errors="replace")
        (temporary / SUGGEST_FILE).write_bytes(content)
        shown = [(s.path, ("", s.guess, s.probability)) for s in suggestions[:_DRAWN]]
        write_contact_sheet(temporary / SUGGEST_SHEET, root, shown, class_names)
        for suggestion in suggestions:
            place = temporary / SUGGEST_SORT_FOLDER / as_file_name(suggestion.guess)
            place.mkdir(parents=True, exist_ok=True)
            # Of a long name the end, with its ending: file systems take 255 bytes.
            name = f"{suggestion.rank:05d}-{PurePosixPath(suggestion.path).name[-60:]}"
            link_image(root / suggestion.path, place / name)


def link_image(source: Path, target: Path) -> None:
    """A second name of the same file, or a copy: moving either loses nothing."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
