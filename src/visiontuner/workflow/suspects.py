"""Name the images whose label is probably wrong, in a table that `data.labels` reads.

Logistic regression on the features answers each training and validation image in the fold that it
was held out of. Test images stay out: labels that a model has corrected would flatter every model.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from visiontuner.data.dataset import ImageDataset
from visiontuner.data.findings import OddImage
from visiontuner.data.labels import Row, read_table
from visiontuner.errors import UserMistake, VisiontunerError
from visiontuner.evaluation.baselines import is_affordable
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_whole
from visiontuner.journal import SearchRecord, newest_search
from visiontuner.paths import (
    EXPERIMENT_FILE,
    ODD_FILE,
    SUSPECTS_FILE,
    SUSPECTS_FOLDER,
    SUSPECTS_SHEET,
)
from visiontuner.text import csv_row, next_command
from visiontuner.tracking.page import write_page
from visiontuner.workflow.evaluate import write_contact_sheet
from visiontuner.workflow.image_checks import Suspect, check_labels, find_odd_images
from visiontuner.workflow.image_map import Marks, draw_image_map
from visiontuner.workflow.inputs import Inputs, Observer, Silent, find_beside, require_same_data

_DRAWN = 48  # eight rows
_COLUMNS = ("path", "label", "suggested", "score")
_ODD_COLUMNS = ("path", "label", "reason", "value")


@dataclass(frozen=True, kw_only=True, repr=False)
class SuspectsResult:
    """What `find_suspects` found.

    Args:
        folder: holds suspects.csv and, if there are any, suspects.png.
        search: the search whose images they are; None without one.
        images: training and validation images that were looked at.
        suspects: the surest first.
        kept_rows: rows of the experiment's own `data.labels`, which suspects.csv holds as well.
        odd: blank, odd-shaped, dark and blurred images, and outliers of their class.
    """

    folder: Path
    search: Path | None
    images: int
    suspects: tuple[Suspect, ...]
    kept_rows: int = 0
    odd: tuple[OddImage, ...] = ()

    @property
    def file(self) -> Path:
        """The table, for `data.labels`."""
        return self.folder / SUSPECTS_FILE

    @property
    def odd_file(self) -> Path:
        """The table of odd images."""
        return self.folder / ODD_FILE

    @property
    def table(self) -> pd.DataFrame:
        """One row a suspect: path, label, suggested, score."""
        return pd.DataFrame(map(asdict, self.suspects), columns=list(_COLUMNS))

    def __repr__(self) -> str:
        first = ", ".join(suspect.path for suspect in self.suspects[:3])
        more = ", …" if len(self.suspects) > 3 else ""
        return (
            f"SuspectsResult {self.file}\n"
            f"suspect labels: {len(self.suspects):,} of {self.images:,} images\n"
            f"first: {first or 'none'}{more}"
        )


def find_suspects(
    search: Path | None = None,
    *,
    experiment: Experiment | None = None,
    output: Path | None = None,
    observer: Observer | None = None,
) -> SuspectsResult:
    """Name the training and validation images whose label is probably wrong.

    Args:
        search: a search folder, whose images and network are taken; default: the newest search.
        experiment: images and network without a search.
        output: where the files go; default: `suspects` in the search folder, or where the command
            runs.

    Raises:
        UserMistake: the images have changed since the search, are too few or too many, or
            suspects.csv is there and was edited.
        VisiontunerError: the features cannot be computed, or the folder cannot be written.
    """
    observer = observer or Silent()
    if experiment is not None:
        search, inputs = None, Inputs(experiment, observer)
    else:
        search = search or newest_search()
        record = SearchRecord.load(search)
        experiment = Experiment.load(search / EXPERIMENT_FILE)
        model = record.kept
        inputs = Inputs(experiment, observer).of_network(
            None if model is None else model.configuration.get("backbone")
        )
        require_same_data(record, inputs.dataset)
    _refuse_too_many(inputs)
    features, _ = inputs.features()
    checked = check_labels(inputs, features)
    suspects = checked.suspects
    kept = _rows_of_before(inputs, {suspect.path for suspect in suspects})
    folder = output or (search or Path()) / SUSPECTS_FOLDER
    odd = find_odd_images(inputs, features, suspects)
    _write(folder, inputs.dataset, suspects, kept, odd)
    if search is not None:
        draw_image_map(search, inputs, features, Marks.of(suspects, odd))
        write_page(search)
    return SuspectsResult(
        folder=folder,
        search=search,
        images=checked.images,
        suspects=suspects,
        kept_rows=len(kept),
        odd=tuple(odd),
    )


def _refuse_too_many(inputs: Inputs) -> None:
    """Before features are computed, which may take minutes."""
    dataset = inputs.dataset
    images = sum(len(dataset.splits[name]) for name in ("train", "validation"))
    classes = len(dataset.class_names)
    if not is_affordable(images, inputs.description.feature_dim, classes):
        some = next_command(
            "suspects", "--data", inputs.experiment.data.source, "--set", "data.limit_per_class=50"
        )
        raise UserMistake(
            f"{images:,} images of {classes:,} classes would take many minutes. "
            f"Look at some of them: `{some}`."
        )


def _rows_of_before(inputs: Inputs, suspects: set[str]) -> list[Row]:
    """What the experiment's own `data.labels` says of other images: it shall not get lost."""
    root = inputs.dataset.root
    earlier = find_beside(root, inputs.experiment.data.labels)
    rows: Iterable[Row] = read_table(earlier).rows if earlier is not None else ()
    return [row for row in rows if posixpath.normpath(row.path) not in suspects]


def _write(
    folder: Path,
    dataset: ImageDataset,
    suspects: Sequence[Suspect],
    kept: Sequence[Row],
    odd: Sequence[OddImage],
) -> None:
    rows: list[Sequence[object]] = [(s.path, s.label, s.suggested, s.score) for s in suspects]
    rows += [(row.path, row.label, None, None) for row in kept]
    content = "".join(map(csv_row, [_COLUMNS, *rows])).encode(errors="replace")
    file = folder / SUSPECTS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_bytes() != content:
            raise UserMistake(
                f"{file} already exists, perhaps with your corrections. Give it another name, or "
                "delete it."
            )
        lines = [_ODD_COLUMNS, *((one.path, one.label, one.reason, one.value) for one in odd)]
        table = "".join(map(csv_row, lines)).encode(errors="replace")
        # Whole, or a full disk would leave half a table that looks like one with corrections.
        write_whole(folder / ODD_FILE, lambda part: part.write(table))
        write_whole(file, lambda part: part.write(content))
        (folder / SUSPECTS_SHEET).unlink(missing_ok=True)
        shown = [(s.path, (s.label, s.suggested, s.probability)) for s in suspects[:_DRAWN]]
        write_contact_sheet(folder / SUSPECTS_SHEET, dataset.root, shown, dataset.class_names)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}). Make room.") from None
