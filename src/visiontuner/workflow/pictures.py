"""From an experiment to its pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from visiontuner.data.dataset import ImageDataset, load_dataset
from visiontuner.data.objects import split_folder
from visiontuner.data.source import fetch_source
from visiontuner.errors import UserMistake
from visiontuner.experiment import Experiment
from visiontuner.journal import Finding, SearchRecord
from visiontuner.locations import at_hand, writable_cache_folder
from visiontuner.workflow.observing import Observer, Silent

if TYPE_CHECKING:
    from visiontuner.data.findings import DatasetSummary
    from visiontuner.data.storage import Moved


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` found."""

    dataset: ImageDataset
    summary: DatasetSummary
    findings: list[Finding]
    uploaded: Moved | None = None


def prepare(
    experiment: Experiment, *, upload: str | None = None, observer: Observer | None = None
) -> Prepared:
    """Fetch the pictures and look at every one of them.

    Args:
        upload: `s3://BUCKET/FOLDER`, where they are brought afterwards.

    Raises:
        UserMistake: the pictures cannot be read, or S3 does not take them.
        ServingError: S3 stays away.
    """
    from visiontuner.data.findings import inspect_dataset, summarise

    observer = observer or Silent()
    if upload is not None:
        split_folder(upload)  # a wrong address is said before anything is done
    dataset = load_data(experiment, observer)
    findings = inspect_dataset(
        dataset,
        cache=writable_cache_folder(),
        progress=lambda done, total: observer.progress("Looking", done, total, "pictures"),
    )
    prepared = Prepared(
        dataset=dataset,
        summary=summarise(dataset, cache=writable_cache_folder()),
        findings=[*dataset.findings, *findings],
    )
    if upload is None:
        return prepared
    return replace(prepared, uploaded=_upload(dataset.root, upload, observer))


def _upload(root: Path, uri: str, observer: Observer) -> Moved:
    from visiontuner.data.storage import upload_folder

    return upload_folder(
        root,
        uri,
        progress=lambda done, total: observer.progress("Uploading", done, total, "B"),
        note=observer.note,
    )


def load_data(experiment: Experiment, observer: Observer) -> ImageDataset:
    data, cache = experiment.data, writable_cache_folder()
    source = at_hand(data.source)
    root = fetch_source(
        source,
        # In a job the cache goes to S3, file by file; an archive that lies beside it need not.
        cache=cache if source == data.source else Path(gettempdir()) / "visiontuner",
        sha256=data.sha256,
        progress=lambda done, total: observer.progress("Fetching", done, total, "B"),
        note=observer.note,
    )
    dataset = load_dataset(
        root,
        limit_per_class=data.limit_per_class,
        cache=cache,
        progress=lambda done, total: observer.progress("Reading", done, total, "files"),
    )
    counts = ", ".join(f"{len(samples):,} {name}" for name, samples in dataset.splits.items())
    observer.note(f"{len(dataset.class_names)} classes; pictures: {counts}.")
    return dataset


def describe_data(experiment: Experiment, dataset: ImageDataset) -> dict[str, Any]:
    return {
        "source": experiment.data.source,
        "root": str(dataset.root.resolve()),
        "digest": dataset.digest,
        "class_names": list(dataset.class_names),
        "counts": {name: len(samples) for name, samples in dataset.splits.items()},
        # By split, in the order of the class names.
        "class_counts": {name: list(dataset.counts(name)) for name in dataset.splits},
    }


def require_same_data(record: SearchRecord, dataset: ImageDataset) -> None:
    began_with = record.started.get("data", {}).get("digest")
    if began_with != dataset.digest:
        raise UserMistake(
            f"The pictures in {dataset.root} are not those this search began with "
            f"(digest {dataset.digest[:12]} instead of {str(began_with)[:12]}). "
            "Start a new search, or bring the old pictures back."
        )
