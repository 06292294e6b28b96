"""What one training in this process needs: pictures, network, features or decoded pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from visiontuner import interrupts
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.errors import SearchInterrupted
from visiontuner.experiment import Experiment
from visiontuner.locations import writable_cache_folder
from visiontuner.workflow.observing import Observer
from visiontuner.workflow.pictures import load_data

if TYPE_CHECKING:
    from visiontuner.data.picture_store import PictureStore
    from visiontuner.model.backbone import Backbone
    from visiontuner.model.computing import Machines
    from visiontuner.model.description import BackboneDescription
    from visiontuner.model.engine import Engine
    from visiontuner.model.features import FeatureSet

T = TypeVar("T")

# A batch of pictures, or at the beginning a network's export.
_STOPS_WITHIN_SECONDS = 15.0


class Inputs:
    """An experiment's pictures and network, each fetched once and when it is first asked for.

    Raises from every property: DataError, BackboneError, DownloadError, VisiontunerError, with what
    to do about it.
    """

    def __init__(self, experiment: Experiment, observer: Observer) -> None:
        self.experiment = experiment
        self.observer = observer
        self.cache: Path = writable_cache_folder()
        self.on_cluster = False  # whether Ray's other machines help with features
        self._loading = threading.Lock()  # asked for beside other work, and once is enough
        self._backbone: Backbone | None = None
        self._working: list[Future[Any]] = []
        self._stopped = False

    @cached_property
    def dataset(self) -> ImageDataset:
        return load_data(self.experiment, self.observer)

    def readable(self, split: str) -> list[Sample]:
        """The pictures of a split that can be decoded; each is, once."""
        from visiontuner.data.inspection import inspect_pictures

        samples = self.dataset.splits[split]
        facts = inspect_pictures(
            replace(self.dataset, splits={split: samples}),
            cache=self.cache,
            progress=self._progress("Looking"),
        )
        return [sample for sample in samples if not facts[sample.digest].error]

    @property
    def backbone(self) -> Backbone:
        """The network itself: torch and its libraries take seconds to import."""
        from visiontuner.model.backbone import load_backbone

        model = self.experiment.model
        with self._loading:
            if self._backbone is None:
                self._backbone = load_backbone(
                    model.backbone,
                    weights=model.weights,
                    image_size=model.image_size,
                    cache=self.cache,
                )
            return self._backbone

    @cached_property
    def description(self) -> BackboneDescription:
        """The network without loading it, where it is known from before."""
        from visiontuner.model.description import describe_backbone

        model = self.experiment.model
        return describe_backbone(
            model.backbone,
            weights=model.weights,
            image_size=model.image_size,
            cache=self.cache,
            load=lambda: self.backbone,
        )

    def store(self, *, on_pictures: bool) -> tuple[FeatureSet | PictureStore, float]:
        """Decoded pictures or features, and the seconds they took."""
        return self.pictures() if on_pictures else self.features()

    def features(self) -> tuple[FeatureSet, float]:
        """The features of training and validation pictures, and the seconds they took."""
        from visiontuner.model.features import compute_features

        began = time.monotonic()
        features = compute_features(
            self.dataset,
            backbone=self.description,
            engine=self._engine,
            precision=self.experiment.training.precision,
            cache=self.cache,
            on_bad_image=self.experiment.data.on_bad_image,
            progress=self._progress("Features"),
            note=self.observer.note,
            machines=self._machines if self.on_cluster else nullcontext,
        )
        return features, round(time.monotonic() - began, 3)

    def pictures(self, dataset: ImageDataset | None = None) -> tuple[PictureStore, float]:
        """The pictures, decoded once, and the seconds it took."""
        from visiontuner.data.picture_store import prepare_pictures

        began = time.monotonic()
        store = prepare_pictures(
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
        self._stopped = True

    def close(self) -> None:
        """Stop and wait: a thread inside the network takes the process down as Python ends."""
        self.stop()
        wait(self._working, _STOPS_WITHIN_SECONDS)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            interrupts.check()
            if self._stopped:
                raise SearchInterrupted(f"{what}: stopped at {done} of {total} pictures.")
            self.observer.progress(what, done, total, "pictures")

        return tell

    def facts(self, folder: Path, computed: int, seconds: float) -> dict[str, Any]:
        """What the journal says of features and of decoded pictures alike."""
        return {
            "backbone": self.description.name,
            "weights_digest": self.description.weights_digest,
            "folder": str(folder),
            "computed": computed,
            "seconds": seconds,
        }

    def _machines(self) -> AbstractContextManager[Machines | None]:
        from visiontuner.search.feature_workers import feature_workers

        experiment = self.experiment
        return feature_workers(
            self.dataset.root.resolve(), experiment.model, experiment.training.precision
        )

    def _engine(self) -> Engine:
        from visiontuner.model.engine import make_engine

        engine = make_engine(
            self.backbone, precision=self.experiment.training.precision, cache=self.cache
        )
        self.observer.note(f"Features are computed once, by {engine.description}.")
        return engine


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """So that a search can be resumed from another folder than it was begun in."""
    data, model = experiment.data, experiment.model
    source, weights = Path(data.source).expanduser(), Path(model.weights).expanduser()
    if data.source != "digits" and source.exists():
        data = data.model_copy(update={"source": str(source.resolve())})
    if model.weights not in ("default", "none") and weights.exists():
        model = model.model_copy(update={"weights": str(weights.resolve())})
    return experiment.model_copy(update={"data": data, "model": model})
