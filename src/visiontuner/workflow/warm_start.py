"""Begin a search with what an earlier one found: `tune --from SEARCH`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontuner.data.dataset import ImageDataset
from visiontuner.data.manifest import compare_images, describe_classes, read_manifest
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.paths import EXPERIMENT_FILE, JOURNAL_FILE
from visiontuner.search.plan import settle
from visiontuner.search.warm_start import take_over
from visiontuner.text import next_command


@dataclass(frozen=True, kw_only=True)
class EarlierSearch:
    """A search that another one begins with."""

    folder: Path
    record: SearchRecord
    experiment: Experiment


def find_search(folder: Path) -> EarlierSearch:
    """The search that `tune --from` names.

    Raises:
        UserMistake: the folder holds no search, or one without a finished trial.
        JournalError: its journal is damaged.
        ExperimentError: its experiment file is.
    """
    for name in (JOURNAL_FILE, EXPERIMENT_FILE):
        if not (folder / name).is_file():
            raise UserMistake(f"{folder} is no search to begin with: it has no {name}.")
    record = SearchRecord.load(folder)
    if record.is_training:
        raise UserMistake(
            f"{folder} holds one training, and a search begins with a search. Train with its "
            f"values: {next_command('train', '--from', folder)}"
        )
    if not record.searching().ranking():
        raise UserMistake(
            f"{folder} has no usable trial to begin with. Go on with it: "
            f"{next_command('tune', '--resume', folder)}"
        )
    experiment = Experiment.load(folder / EXPERIMENT_FILE)
    return EarlierSearch(folder=folder, record=record, experiment=experiment)


def experiment_of(
    earlier: EarlierSearch, data: Mapping[str, Any] | None, overrides: Sequence[str]
) -> Experiment:
    """The earlier search's experiment, on other images if `data` names some, with overrides.

    A search on other images is named after them, as `tune --data` names it.

    Raises:
        ExperimentError: naming the key, the value and the rule it breaks.
    """
    raw = _with_auto(earlier)
    if data is not None:
        raw |= {"data": dict(data), "name": None}
    return Experiment.parse(raw, overrides, where=str(earlier.folder / EXPERIMENT_FILE))


def _with_auto(earlier: EarlierSearch) -> dict[str, Any]:
    """The experiment without the values that the number of images and the network decided.

    More images or another network may need others. What is no default's value stays as it is.
    """
    settled = earlier.experiment.model_dump(mode="json")
    counts = earlier.record.started.get("data", {}).get("counts", {})
    train, validation = (int(counts.get(name, 0)) for name in ("train", "validation"))
    for raw in _undecided(settled):
        for own_validation in (False, True):
            decided = settle(
                Experiment.parse(raw), images=train + validation, own_validation=own_validation
            ).for_images(train)
            if decided.model_dump(mode="json") == settled:
                return raw
    return settled


def _undecided(settled: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """With `auto` for how trials are judged and stopped; first without the space, then with it."""
    data = {**settled["data"], "validation": "auto", "folds": None}
    search = {**settled["search"], "scheduler": "auto"}
    raw = {**settled, "data": data, "search": search}
    training = {key: value for key, value in raw["training"].items() if key != "batch_size"}
    default_space = {key: value for key, value in search.items() if key != "space"}
    if search["first"] is None:  # or it would not fit into another space
        yield {**raw, "training": training, "search": default_space}
    yield raw


def take_over_search(
    earlier: EarlierSearch, experiment: Experiment, dataset: ImageDataset
) -> tuple[dict[str, Any], list[str]]:
    """What a new search's journal keeps of an earlier one, and what is to be said of it.

    The journal has all of it: the new search can be resumed without the earlier one's folder.

    Args:
        experiment: of the new search, as it is run.
        dataset: its images.
    """
    began = earlier.record.started.get("data", {})
    classes = describe_classes(began.get("class_names") or (), dataset.class_names)
    images = _describe_images(earlier, dataset)
    taken = take_over(earlier.record, earlier.experiment, experiment, same_classes=classes is None)
    facts = {
        "description": str(earlier.folder),
        "search_id": earlier.record.search_id,
        "folder": str(earlier.folder.resolve()),
        "data_digest": began.get("digest"),
        "images": images,
        "first_trials": list(taken.first_trials),
        **taken.start.to_dict(),
    }
    said = [
        f"Begins with {earlier.folder}. {images}",
        *([classes] if classes else []),
        *taken.notes,
    ]
    return facts, said


def _describe_images(earlier: EarlierSearch, dataset: ImageDataset) -> str:
    began = earlier.record.started.get("data", {})
    if began.get("digest") == dataset.digest:
        return "The images are the same."
    manifest = read_manifest(earlier.folder)
    if manifest is not None:
        return compare_images(manifest, dataset).describe()
    old = sum((began.get("counts") or {}).values())
    now = sum(len(samples) for samples in dataset.splits.values())
    return f"The images have changed: {now:,}, then {old:,}."
