"""What one training in this process needs: images, network, features or decoded images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from visiontuner import interrupts
from visiontuner.data.arrays import FeatureSet, available_cpus, find_damage, prepare_images
from visiontuner.data.dataset import (
    ImageDataset,
    Sample,
    fetch_source,
    find_emptied_classes,
    load_dataset,
    source_address,
)
from visiontuner.data.findings import inspect_images
from visiontuner.data.labels import is_table_name
from visiontuner.errors import SearchInterrupted, UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import Event, Finding, SearchRecord, TrialRecord
from visiontuner.model.features import (
    compute_features,
    copy_features,
    describe_backbone,
    measure_pace,
    store_folder,
)
from visiontuner.paths import at_hand, local_path, writable_cache_folder
from visiontuner.search.plan import Stores
from visiontuner.workflow.leaks import Leaks, find_leaks, leak_findings, without_leaks

if TYPE_CHECKING:
    from visiontuner.data.arrays import DecodedImages
    from visiontuner.model.backbones import Backbone
    from visiontuner.model.features import BackboneDescription, Engine, Machines
    from visiontuner.search.live import Recorder


# Observers of the work.


NAMED = 5  # of a thousand unreadable images


class Observer(Protocol):
    """Observes a search: `console.SearchConsole` at the command line."""

    def note(self, text: str) -> None: ...
    def progress(self, label: str, done: int, total: int, unit: str) -> None: ...
    def trials_begin(self, record: SearchRecord, total: int) -> None: ...
    def event(self, event: Event) -> None: ...
    def trials_end(self) -> None: ...


class Silent:
    """An Observer that shows nothing."""

    def note(self, text: str) -> None: ...
    def progress(self, label: str, done: int, total: int, unit: str) -> None: ...
    def trials_begin(self, record: SearchRecord, total: int) -> None: ...
    def event(self, event: Event) -> None: ...
    def trials_end(self) -> None: ...


def note_findings(observer: Observer, findings: Sequence[Finding]) -> None:
    """The first few findings, a line each, and how many more there are."""
    for finding in findings[:NAMED]:
        observer.note(f"{finding.severity}: {finding.evidence.rstrip('.')}.")
    if len(findings) > NAMED:
        observer.note(f"… and {len(findings) - NAMED} more; the journal names them all.")


# How many threads one training in this process gets.


def training_threads(experiment: Experiment) -> int:
    """All cores for a network; for a head as many as a trial of a search has.

    The number of threads decides the order of sums, and with it the last digits: a head that is
    trained alone is then the same as the one that a search trained.
    """

    if experiment.trains_on_images:
        return available_cpus()
    return int(experiment.search.cpus_per_trial) or 1


# From an experiment to its images.


def load_data(experiment: Experiment, observer: Observer) -> ImageDataset:
    data, cache = experiment.data, writable_cache_folder()
    source, columns = at_hand(data.source), data.columns.model_dump()
    # In a job the cache goes to S3, file by file; an archive that lies beside it need not.
    unpacked = cache if source == data.source else Path(gettempdir()) / "visiontuner"
    root = fetch_source(
        source,
        cache=unpacked,
        sha256=data.sha256,
        columns=columns,
        progress=lambda done, total: observer.progress("Fetching", done, total, "B"),
        images_progress=lambda done, total: observer.progress("Fetching", done, total, "images"),
        note=observer.note,
    )
    dataset = load_dataset(
        root,
        columns=columns,
        labels=find_beside(root, data.labels),
        classes=find_beside(root, data.classes),
        group=data.group,
        split=data.split,
        limit_per_class=data.limit_per_class,
        on_bad_image=data.on_bad_image,
        address=source_address(data.source),
        cache=cache,
        extract_into=unpacked,
        progress=lambda done, total: observer.progress("Reading", done, total, "files"),
    )
    counts = ", ".join(f"{len(samples):,} {name}" for name, samples in dataset.splits.items())
    observer.note(f"{dataset.described}; {counts}.")
    return dataset


def find_beside(root: Path, name: str | None) -> Path | None:
    """A file that belongs to a data set: in its folder, or where the command runs."""
    if name is None:
        return None
    inside = (root if root.is_dir() else root.parent) / name
    return inside if inside.exists() else Path(name).expanduser()


def describe_data(experiment: Experiment, dataset: ImageDataset) -> dict[str, Any]:
    return {
        "source": experiment.data.source,
        "described": dataset.described,
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
            f"The images in {dataset.root} are not those this search began with "
            f"(digest {dataset.digest[:12]} instead of {str(began_with)[:12]}). "
            "Start a new search, or bring the old images back."
        )


# What one training in this process needs: images, network, features or decoded images.


T = TypeVar("T")

# A batch of images, or at the beginning a network's export.
_STOPS_WITHIN_SECONDS = 15.0


class Inputs:
    """An experiment's images and network, each fetched once and when it is first asked for.

    Raises from every property: DataError, BackboneError, DownloadError, VisiontunerError, with what
    to do about it.
    """

    def __init__(
        self, experiment: Experiment, observer: Observer, *, cache: Path | None = None
    ) -> None:
        self.experiment = experiment
        self.observer = observer
        self.cache: Path = cache or writable_cache_folder()
        self.on_cluster = False  # whether Ray's other machines help with features
        self._loading = threading.Lock()  # asked for beside other work, and once is enough
        self._backbone: Backbone | None = None
        self._networks: dict[str, Inputs] = {}
        self._label = ""  # of whose features are shown, where there are several
        self._working: list[Future[Any]] = []
        self._stopped = False

    @cached_property
    def loaded(self) -> ImageDataset:
        """The images as they lie there, leaks and all."""
        return load_data(self.experiment, self.observer)

    @cached_property
    def dataset(self) -> ImageDataset:
        """The images to train on and to judge by; without leaks if `data.on_leak` says so."""
        if self.experiment.data.on_leak == "warn":
            return self.loaded
        reduced = without_leaks(self.loaded, self.leaks)
        findings = leak_findings(self.leaks, dropped=True)
        gone = len(self.leaks.dropped)
        self.observer.note(f"data.on_leak: drop leaves out {gone:,} images.")
        return replace(reduced, findings=(*reduced.findings, *findings))

    @cached_property
    def leaks(self) -> Leaks:
        """Images that show the same in two splits; the features of all of them are computed."""
        stores = [self.features_of(self.loaded, ("train", "validation"))]
        if self.loaded.splits["test"]:
            stores.append(self.features_of(self.loaded, ("test",)))
        return find_leaks(
            self.loaded, stores, cache=self.cache, progress=self._progress("Comparing", "pairs")
        )

    def cached_features(self) -> FeatureSet | None:
        """Those of training and validation images, leaks and all; None if they are not there."""
        try:
            description = self._describe(load=None)
        except LookupError:
            return None
        precision = self.experiment.training.precision
        splits = ("train", "validation")
        folder = store_folder(self.loaded, description, precision, splits, self.cache)
        return FeatureSet.open(folder) if find_damage(folder) is None else None

    def of(self, experiment: Experiment, *, cache: Path | None = None) -> Inputs:
        """Another experiment on the same images, which are not read again."""
        other = Inputs(experiment, self.observer, cache=cache or self.cache)
        other.loaded = self.dataset
        other.dataset = self.dataset
        return other

    def of_network(self, name: str | None) -> Inputs:
        """The same with one of the networks that are searched; None is the experiment's own."""
        if name is None:
            return self
        if name not in self._networks:
            other = self._networks[name] = self.of(self.experiment.for_backbone(name))
            other._label = f" of {name}"
            other.on_cluster = self.on_cluster
        return self._networks[name]

    def of_trial(self, trial: TrialRecord) -> Inputs:
        """The same with the network of a trial or a baseline."""
        return self.of_network(trial.configuration.get("backbone"))

    def join_cluster(self) -> None:
        """From now on Ray's other machines help with features."""
        for each in (self, *self._networks.values()):
            each.on_cluster = True

    def readable(self, split: str) -> list[Sample]:
        """The images of a split that can be decoded; each is, once."""

        samples = self.dataset.splits[split]
        facts = inspect_images(
            replace(self.dataset, splits={split: samples}),
            cache=self.cache,
            progress=self._progress("Looking"),
        )
        return [sample for sample in samples if not facts[sample.digest].error]

    @property
    def backbone(self) -> Backbone:
        """The network itself: torch and its libraries take seconds to import."""
        from visiontuner.model.backbones import load_backbone

        model = self.experiment.model
        with self._loading:
            if self._backbone is None:
                self._backbone = load_backbone(
                    model.backbone,
                    weights=model.weights,
                    image_size=model.image_size,
                    views=model.views,
                    cache=self.cache,
                )
            return self._backbone

    @cached_property
    def description(self) -> BackboneDescription:
        """The network without loading it, where it is known from before."""
        return self._describe(load=lambda: self.backbone)

    def _describe(self, load: Callable[[], BackboneDescription] | None) -> BackboneDescription:
        """What is known of the network; LookupError if it had to be loaded and may not be."""

        def unknown() -> BackboneDescription:
            raise LookupError(self.experiment.model.backbone)

        model = self.experiment.model
        return describe_backbone(
            model.backbone,
            weights=model.weights,
            image_size=model.image_size,
            views=model.views,
            cache=self.cache,
            load=load or unknown,
        )

    def store(self, *, on_images: bool) -> tuple[FeatureSet | DecodedImages, float]:
        """Decoded images or features, and the seconds they took."""
        return self.images() if on_images else self.features()

    def features(self) -> tuple[FeatureSet, float]:
        """The features of training and validation images, and the seconds they took."""

        began = time.monotonic()
        splits = ("train", "validation")
        if self.dataset is not self.loaded:  # theirs are among those of all images
            every = self.features_of(self.loaded, splits)
            precision = self.experiment.training.precision
            copy_features(every, self.dataset, self.description, precision)
        return self.features_of(self.dataset, splits), round(time.monotonic() - began, 3)

    def features_of(self, dataset: ImageDataset, splits: Sequence[str]) -> FeatureSet:
        """The features of any images, by the experiment's network."""
        return compute_features(
            dataset,
            backbone=self.description,
            engine=self._say_engine,
            precision=self.experiment.training.precision,
            cache=self.cache,
            splits=splits,
            on_bad_image=self.experiment.data.on_bad_image,
            progress=self._progress(f"Features{self._label}"),
            note=self.observer.note,
            machines=self._machines if self.on_cluster else nullcontext,
        )

    def release(self) -> None:
        """Let go of the network and of what runs it; they come again when they are asked for."""
        self._backbone = None
        self.__dict__.pop("engine", None)

    def pace(self, seconds: float = 1.0) -> float:
        """Images a second of a pass over the training images, measured for some seconds."""
        return measure_pace(
            self.dataset.splits["train"],
            root=self.dataset.root,
            backbone=self.description,
            engine=self.engine,
            seconds=seconds,
        )

    def images(self, dataset: ImageDataset | None = None) -> tuple[DecodedImages, float]:
        """The images, decoded once, and the seconds it took."""

        began = time.monotonic()
        store = prepare_images(
            dataset or self.dataset,
            preprocessing=self.description.preprocessing,
            cache=self.cache,
            augmented=not self.experiment.augmentation.is_off,
            on_bad_image=self.experiment.data.on_bad_image,
            progress=self._progress("Decoding"),
            note=self.observer.note,
        )
        return store, round(time.monotonic() - began, 3)

    def beside(self, call: Callable[[], T]) -> Future[T]:
        """Load, compute features or decode in another thread, until `stop` or `close`."""
        self._working.append(interrupts.beside(call))
        return self._working[-1]

    def stop(self) -> None:
        """End what `beside` began, at the next batch; what is done is kept."""
        for each in (self, *self._networks.values()):
            each._stopped = True

    def close(self) -> None:
        """Stop and wait: a thread inside the network takes the process down as Python ends."""
        self.stop()
        wait(self._working, _STOPS_WITHIN_SECONDS)

    def require_going_on(self) -> None:
        """For work that `beside` began, between two parts of it.

        Raises:
            SearchInterrupted: `stop` was called.
            KeyboardInterrupt: a signal came, in the main thread.
        """
        interrupts.check()
        if self._stopped:
            raise SearchInterrupted("Stopped.")

    def _progress(self, what: str, unit: str = "images") -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            interrupts.check()
            if self._stopped:
                raise SearchInterrupted(f"{what}: stopped at {done} of {total} {unit}.")
            self.observer.progress(what, done, total, unit)

        return tell

    def facts(self, folder: Path, computed: int, seconds: float) -> dict[str, Any]:
        """What the journal says of features and of decoded images alike."""
        return {
            "backbone": self.description.name,
            "weights_digest": self.description.weights_digest,
            "weights_licence": self.description.weights_licence,
            "folder": str(folder),
            "computed": computed,
            "seconds": seconds,
        }

    def _machines(self) -> AbstractContextManager[Machines | None]:
        from visiontuner.search.remote import feature_workers

        experiment = self.experiment
        return feature_workers(
            self.dataset.root.resolve(), experiment.model, experiment.training.precision
        )

    @cached_property
    def engine(self) -> Engine:
        """What runs the network; writing it as ONNX takes seconds, once."""
        from visiontuner.model.onnx import make_engine

        return make_engine(
            self.backbone, precision=self.experiment.training.precision, cache=self.cache
        )

    def _say_engine(self) -> Engine:
        if not self._label:
            self.observer.note(f"Features are computed once, by {self.engine.description}.")
        return self.engine


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """So that a search can be resumed from another folder than it was begun in."""
    data, model = experiment.data, experiment.model
    source, weights = Path(local_path(data.source)).expanduser(), Path(model.weights).expanduser()
    if data.source != "digits" and source.exists():
        data = data.model_copy(update={"source": str(source.resolve())})
    for key in ("labels", "classes"):
        path = find_beside(source, getattr(data, key))
        inside = source.parent if is_table_name(source.name) else source
        if path is not None and path.exists() and not path.is_relative_to(inside):
            data = data.model_copy(update={key: str(path.resolve())})
    if model.weights not in ("default", "none") and weights.exists():
        model = model.model_copy(update={"weights": str(weights.resolve())})
    return experiment.model_copy(update={"data": data, "model": model})


# What trials train on, as the journal names it.


class StoreRecorder:
    """Writes what features and decoded images are ready, and what is wrong with some."""

    def __init__(self, inputs: Inputs, recorder: Recorder) -> None:
        self._inputs = inputs
        self._recorder = recorder
        self._known_findings: set[str] = set()

    def record(
        self, store: FeatureSet | DecodedImages, seconds: float, *, backbone: str | None = None
    ) -> Stores:
        """Either kind; `seconds` is how long it took to get it.

        Args:
            backbone: whose features they are, where several networks are searched.
        """
        self._record_emptied_classes(store)
        if isinstance(store, FeatureSet):
            self._record_features(store, seconds, self._inputs.of_network(backbone))
            return Stores(features=store.folder, images=None)
        self._record_images(store, seconds)
        return Stores(features=None, images=store.folder)

    def record_findings(self, findings: Iterable[Finding]) -> None:
        """Features and images are made of the same files: what is wrong with one is said once."""
        new = [finding for finding in findings if finding.evidence not in self._known_findings]
        self._known_findings |= {finding.evidence for finding in new}
        for finding in new:
            self._recorder.append("finding", **finding.to_dict())
        note_findings(self._inputs.observer, new)

    def _record_emptied_classes(self, store: FeatureSet | DecodedImages) -> None:
        """Before the unreadable images themselves, which may be many."""
        readable = {name: store.split(name).labels.tolist() for name in ("train", "validation")}
        self.record_findings(find_emptied_classes(self._inputs.dataset, readable))

    def _record_features(self, features: FeatureSet, seconds: float, inputs: Inputs) -> None:
        self._recorder.append(
            "features_ready",
            **inputs.facts(features.folder, features.computed, seconds),
            feature_dim=features.feature_dim,
            engine=features.engine,
        )
        if not features.computed and inputs is self._inputs:
            inputs.observer.note("Features: all in the cache, nothing to compute.")
        self.record_findings(features.findings)

    def _record_images(self, images: DecodedImages, seconds: float) -> None:
        self._recorder.append(
            "images_ready",
            **self._inputs.facts(images.folder, images.computed, seconds),
            feature_dim=self._inputs.description.feature_dim,
        )
        if not images.computed:
            self._inputs.observer.note("Images: all decoded in the cache.")
        self.record_findings(images.findings)
