"""Look at every image of a data set before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from visiontuner.data.dataset import ImageDataset
from visiontuner.data.findings import DatasetSummary, inspect_dataset, summarise
from visiontuner.experiment.schema import Experiment
from visiontuner.io.s3 import Moved, upload_folder
from visiontuner.journal import Finding
from visiontuner.paths import split_folder, writable_cache_folder
from visiontuner.workflow.image_checks import label_findings
from visiontuner.workflow.inputs import Inputs, Observer, Silent
from visiontuner.workflow.leaks import leak_findings, without_known_pairs


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
    """Fetch the images and look at every one of them.

    Args:
        upload: `s3://BUCKET/FOLDER`, where they are brought afterwards.

    Raises:
        UserMistake: the images cannot be read, or S3 does not take them.
        ServingError: S3 stays away.
    """

    observer = observer or Silent()
    if upload is not None:
        split_folder(upload)  # a wrong address is said before anything is done
    inputs = Inputs(experiment, observer)
    findings = inspect_dataset(
        inputs.loaded,
        cache=writable_cache_folder(),
        progress=lambda done, total: observer.progress("Looking", done, total, "images"),
    )
    if experiment.data.on_leak == "drop":
        findings = without_known_pairs(findings, inputs.leaks)
    elif inputs.cached_features() is not None:
        leaks = inputs.leaks
        findings = [*without_known_pairs(findings, leaks), *leak_findings(leaks, dropped=False)]
    dataset = inputs.dataset
    if inputs.cached_features() is not None:
        findings += label_findings(inputs, inputs.features()[0])
    prepared = Prepared(
        dataset=dataset,
        summary=summarise(dataset, cache=writable_cache_folder()),
        findings=[*dataset.findings, *findings],
    )
    if upload is None:
        return prepared
    return replace(prepared, uploaded=_upload(dataset.saved_in or dataset.root, upload, observer))


def _upload(root: Path, uri: str, observer: Observer) -> Moved:
    return upload_folder(
        root,
        uri,
        progress=lambda done, total: observer.progress("Uploading", done, total, "B"),
        note=observer.note,
    )
