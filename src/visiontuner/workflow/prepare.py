"""Look at every image of a data set before anything is trained.

And which pretrained networks to try, and what a pass of each over the images takes here.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.data.arrays import FeatureSet
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.findings import DatasetSummary, inspect_dataset, summarise
from visiontuner.errors import BackboneError, WeightsAway
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import temporary_folder
from visiontuner.io.s3 import Moved, upload_folder
from visiontuner.journal import Finding, SearchRecord
from visiontuner.model.catalogue import RECOMMENDED, KnownNetwork
from visiontuner.paths import split_folder, writable_cache_folder
from visiontuner.text import duration
from visiontuner.workflow.image_checks import label_findings
from visiontuner.workflow.inputs import Inputs, Observer, Silent, StoreRecorder
from visiontuner.workflow.leaks import leak_findings, without_known_pairs

if TYPE_CHECKING:
    from visiontuner.search.live import Recorder


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


# Which networks are recommended, and what a pass of each takes here.


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A network of the catalogue.

    Args:
        pass_seconds: to compute the features of `images`; None if that was not asked, or the
            network cannot be run here.
        images: of training and validation.
    """

    network: KnownNetwork
    pass_seconds: float | None = None
    images: int = 0


def recommend(
    experiment: Experiment | None = None, *, observer: Observer | None = None
) -> list[Recommendation]:
    """The networks of the catalogue, in its order.

    Args:
        experiment: whose images a pass is measured on; the speed of a network does not depend on
            its weights, so that nothing is downloaded.

    Raises:
        DataError: the images cannot be read.
    """
    if experiment is None:
        return [Recommendation(network=network) for network in RECOMMENDED]
    observer = observer or Silent()
    with closing(Inputs(experiment, observer)) as inputs:
        samples = [s for name in ("train", "validation") for s in inputs.dataset.splits[name]]
        found = []
        for number, network in enumerate(RECOMMENDED):
            observer.progress("Measuring", number, len(RECOMMENDED), "networks")
            seconds = _pass_seconds(network, inputs, len(samples))
            found.append(Recommendation(network=network, pass_seconds=seconds, images=len(samples)))
        observer.progress("Measuring", len(RECOMMENDED), len(RECOMMENDED), "networks")
    return found


def _pass_seconds(network: KnownNetwork, inputs: Inputs, images: int) -> float | None:
    """What a pass takes without the export, which comes once; with random weights."""
    model = {"backbone": network.name, "weights": "none", "image_size": None}
    experiment = inputs.experiment
    changed = experiment.model_copy(update={"model": experiment.model.model_copy(update=model)})
    with temporary_folder() as cache:  # an export of random weights is of no use later
        try:
            return images / inputs.of(changed, cache=cache).pace()
        except BackboneError as error:
            inputs.observer.note(f"warning: {network.name} is not measured: {error}")
            return None


# The networks of a search: which of them can be had, and the features of each, once.


# Of a pass of seconds; what it says is to choose an order by, and for people.
_PACE_SECONDS = 0.25


def leave_out_missing(inputs: Inputs, record: SearchRecord) -> dict[str, str]:
    """The networks whose weights cannot be had, and why; each is loaded or known from before.

    Those that an earlier process of the search left out stay out and are not named again.

    Raises:
        BackboneError: a network is unknown, or none is left.
    """
    missing: dict[str, str] = {}
    names = [name for name in inputs.experiment.search.backbones if name not in record.left_out]
    for name in names:
        try:
            _ = inputs.of_network(name).description
        except WeightsAway as error:
            missing[name] = str(error)
            inputs.observer.note(f"warning: {name} is left out: {error}")
    if names and len(missing) == len(names):
        first = next(iter(missing.values()))
        raise BackboneError(f"None of the {len(names)} networks can be used. The first: {first}")
    return missing


def compute_features_of(
    inputs: Inputs, recorder: Recorder, stores: StoreRecorder
) -> dict[str, Path]:
    """The features of every network that is searched and not left out, the cheapest first.

    What each will take is said before. A network that reads other images than the first one is
    left out: trials are compared image by image.

    Returns:
        By network the folder of its features, in that order.
    """
    folders: dict[str, Path] = {}
    first: FeatureSet | None = None
    for name in _in_order_of_cost(inputs, recorder.record):
        own = inputs.of_network(name)
        features, seconds = own.features()
        own.release()
        if first is not None and not _same_images(first, features):
            reason = "it reads other images than the others: some are damaged for it alone"
            recorder.append("network_left_out", backbone=name, reason=reason)
            inputs.observer.note(f"warning: {name} is left out: {reason}.")
            continue
        first = first or features
        folders[name] = stores.record(features, seconds, backbone=name).features or features.folder
    return folders


def _in_order_of_cost(inputs: Inputs, record: SearchRecord) -> list[str]:
    """The networks by what a pass takes here, or took; what one will take is said."""
    names = [name for name in inputs.experiment.search.backbones if name not in record.left_out]
    images = sum(len(inputs.dataset.splits[split]) for split in ("train", "validation"))
    seconds: dict[str, float] = {}
    for name in names:
        own = inputs.of_network(name)
        cached = own.cached_features()
        if cached is not None:
            seconds[name] = cached.seconds
            inputs.observer.note(f"{name}: features in the cache.")
            continue
        pace = own.pace(_PACE_SECONDS)
        seconds[name] = images / pace
        inputs.observer.note(
            f"{name}: {images:,} images at {pace:.0f} images/s, about "
            f"{duration(seconds[name])} ({own.engine.description})."
        )
    known = list(record.networks)  # of an earlier process of the search: in the same order
    place = {name: known.index(name) if name in known else len(known) for name in names}
    return sorted(names, key=lambda name: (place[name], seconds[name]))


def _same_images(one: FeatureSet, other: FeatureSet) -> bool:
    return all(one.split(name).paths == other.split(name).paths for name in one.splits)
