"""Joins the parts: data, features, search, packaging, tracking. What the command line calls.

prepare(experiment)            look at the pictures
run_search(experiment)         search, track, package and register
resume_search(folder)          the same, from where a search was stopped
sync_search(folder)            write a search's journal into MLflow, late or elsewhere
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from visiontuner import provenance
from visiontuner.data.dataset import ImageDataset, Sample, load_dataset
from visiontuner.data.source import fetch_source
from visiontuner.errors import (
    JournalError,
    SearchFailed,
    SearchInterrupted,
    TrackingError,
    UserMistake,
)
from visiontuner.experiment import Experiment
from visiontuner.journal import (
    FILE_NAME,
    Event,
    Finding,
    JournalWriter,
    SearchRecord,
    TrialRecord,
    is_running,
)
from visiontuner.locations import SEARCHES, tracking_uri, writable_cache_folder

# Heavy parts are imported where they are used: a mistake in the data is told before torch is
# loaded, and Ray starts while it is.
if TYPE_CHECKING:
    from visiontuner.data.findings import DatasetSummary
    from visiontuner.model.backbone import Backbone
    from visiontuner.model.description import BackboneDescription
    from visiontuner.model.engine import Engine
    from visiontuner.model.features import FeatureSet
    from visiontuner.search.cluster import RayForSearch
    from visiontuner.search.recorder import Recorder
    from visiontuner.search.run import SearchState
    from visiontuner.tracking.follow import WriterThread
    from visiontuner.tracking.mlflow_writer import MlflowWriter

Where = Literal["local", "auto"]

EXPERIMENT_FILE = "experiment.yaml"
CLASSIFIER_FOLDER = "classifier"
REFERENCE_PICTURES = 20


class Observer(Protocol):
    """Who watches a search: `console.SearchConsole` at the command line."""

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


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """How a search ended.

    Attributes:
        folder: the search folder, complete whatever MLflow did.
        state: `interrupted` and `time_budget` can be resumed.
        classifier: the best trial as an artifact, if any trial was usable.
        tracking_uri: the MLflow store that the search was written to.
        model: `models:/NAME/VERSION` there, if it could be registered.
        tracking_problem: why MLflow does not hold everything; `sync` writes the rest.
    """

    folder: Path
    record: SearchRecord
    state: SearchState
    tracking_uri: str
    classifier: Path | None = None
    model: str | None = None
    tracking_problem: str | None = None

    @property
    def best(self) -> TrialRecord | None:
        return self.record.best


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` found."""

    dataset: ImageDataset
    summary: DatasetSummary
    findings: list[Finding]


def prepare(experiment: Experiment, *, observer: Observer | None = None) -> Prepared:
    """Fetch the pictures and look at every one of them."""
    from visiontuner.data.findings import inspect_dataset, summarise

    observer = observer or Silent()
    dataset = _load_data(experiment, observer)
    findings = inspect_dataset(
        dataset,
        cache=writable_cache_folder(),
        progress=lambda done, total: observer.progress("Looking", done, total, "pictures"),
    )
    return Prepared(
        dataset=dataset,
        summary=summarise(dataset, cache=writable_cache_folder()),
        findings=[*dataset.findings, *findings],
    )


def run_search(
    experiment: Experiment,
    *,
    output: Path | None = None,
    on: Where = "local",
    observer: Observer | None = None,
) -> SearchResult:
    """Search, write every trial to MLflow, package and register the best.

    Args:
        output: a new folder for the search; default: `searches/NAME-TIME` here.
        on: `local` starts a Ray on this machine, `auto` joins the cluster it is in.

    Raises:
        UserMistake: the folder is taken, or data or backbone do not fit the experiment.
        SearchFailed: no trial was usable; the message has the first trial's error.
    """
    folder = output or SEARCHES / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserMistake(
            f"{folder} is taken. Choose another --output, or go on with --resume {folder}."
        )
    return _Run(_with_absolute_paths(experiment), folder, on, observer or Silent()).run()


def resume_search(
    folder: Path, *, on: Where = "local", observer: Observer | None = None
) -> SearchResult:
    """Go on with a search after any death: finished trials stay, the others run.

    Raises:
        JournalError: the folder holds no search, or another process is running it.
        UserMistake: the pictures are not those the search began with.
    """
    path = folder / EXPERIMENT_FILE
    if not path.is_file():
        raise JournalError(f"{folder} is no search folder: it has no {EXPERIMENT_FILE}.")
    return _Run(Experiment.load(path), folder, on, observer or Silent()).run()


def sync_search(folder: Path) -> SearchResult:
    """Write a search's journal into MLflow, model and registration included.

    Repeating it changes nothing. Nothing is computed: a search that ended without its classifier
    gets it from `resume_search`.

    Raises:
        JournalError: the folder holds no search, or it is still running elsewhere.
        TrackingError: MLflow is away or refuses.
    """
    from visiontuner.tracking.mlflow_writer import MlflowWriter

    record, uri = SearchRecord.load(folder), tracking_uri()
    with MlflowWriter(folder, tracking_uri=uri) as writer:
        writer.catch_up(search_is_over=not is_running(folder))
        run_ids = writer.run_ids
    classifier = folder / CLASSIFIER_FOLDER
    state: SearchState = record.ended["state"] if record.ended else "interrupted"
    model = None
    if classifier.is_dir() and record.best is not None:
        model = _register(folder, record, run_ids, uri)
    return SearchResult(
        folder=folder,
        record=record,
        state=state,
        tracking_uri=uri,
        classifier=classifier if classifier.is_dir() else None,
        model=model,
    )


class _Run:
    """One run of a search, from the pictures to the registered model."""

    def __init__(self, experiment: Experiment, folder: Path, on: Where, observer: Observer) -> None:
        self.experiment = experiment
        self.folder = folder
        self.on = on
        self.observer = observer
        self.cache = writable_cache_folder()
        self.tracking_uri = tracking_uri()
        self._backbone: Backbone | None = None
        self._backbone_lock = threading.Lock()
        # `mlflow run` opened a run for us to adopt. Ray's workers must not inherit it.
        self.adopted_run = os.environ.pop("MLFLOW_RUN_ID", None)

    def run(self) -> SearchResult:
        from visiontuner.search.cluster import RayForSearch
        from visiontuner.search.plan import make_plan

        dataset = _load_data(self.experiment, self.observer)
        record = self._read_record(dataset)
        remaining = make_plan(self.experiment, record).remaining
        with RayForSearch(self.on) as ray:
            # An unknown backbone ends here, before there is a folder or a run to clean up.
            backbone = self._describe_backbone()
            recorder = self._open_journal(dataset, record)
            tracking = _Tracking(self.folder, self.tracking_uri, self.adopted_run, self.observer)
            state: SearchState = "completed"
            try:
                if remaining:
                    state = self._search(dataset, backbone, recorder, ray, remaining)
            except KeyboardInterrupt:
                state = "interrupted"
            except Exception as error:
                recorder.append("search_ended", state="failed", best_trial=None, error=str(error))
                tracking.close()
                raise
        try:
            return self._conclude(state, dataset, recorder, tracking)
        except KeyboardInterrupt:
            raise SearchInterrupted(
                f"Stopped after the last trial. Go on with: visiontuner tune --resume {self.folder}"
            ) from None
        finally:
            tracking.close()

    def _load_backbone(self) -> Backbone:
        """The network itself, loaded once: torch and its libraries take seconds to import."""
        from visiontuner.model.backbone import load_backbone

        model = self.experiment.model
        with self._backbone_lock:
            if self._backbone is None:
                self._backbone = load_backbone(
                    model.backbone,
                    weights=model.weights,
                    image_size=model.image_size,
                    cache=self.cache,
                )
            return self._backbone

    def _describe_backbone(self) -> BackboneDescription:
        from visiontuner.model.description import describe_backbone

        model = self.experiment.model
        return describe_backbone(
            model.backbone,
            weights=model.weights,
            image_size=model.image_size,
            cache=self.cache,
            load=self._load_backbone,
        )

    def _read_record(self, dataset: ImageDataset) -> SearchRecord:
        """What an earlier process of this search left; empty for a new one."""
        if not (self.folder / FILE_NAME).exists():
            return SearchRecord()
        record = SearchRecord.load(self.folder)
        if record.started:
            _require_same_data(record, dataset)
        return record

    def _open_journal(self, dataset: ImageDataset, record: SearchRecord) -> Recorder:
        from visiontuner.search.recorder import Recorder

        path = self.folder / EXPERIMENT_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                fresh = path.with_suffix(".part")  # a kill must not leave half of it
                fresh.write_text(self.experiment.to_yaml(), encoding="utf-8")
                fresh.replace(path)
        except OSError as error:
            raise UserMistake(
                f"Cannot write the search folder {self.folder}: {error.strerror}. "
                "Name another one with --output."
            ) from None
        journal = JournalWriter(self.folder, record.search_id or uuid.uuid4().hex)
        recorder = Recorder(journal, record, [self.observer.event])
        described = {
            "code": provenance.describe_code(),
            "machine": provenance.describe_machine(),
        }
        if record.started:
            recorder.append("search_resumed", **described)
        else:
            recorder.append(
                "search_started",
                name=self.folder.resolve().name,
                experiment=self.experiment.model_dump(mode="json"),
                data=_describe_data(self.experiment, dataset),
                **described,
            )
        self.observer.note(f"Search folder: {self.folder}")
        return recorder

    def _search(
        self,
        dataset: ImageDataset,
        backbone: BackboneDescription,
        recorder: Recorder,
        ray: RayForSearch,
        remaining: int,
    ) -> SearchState:
        from visiontuner.search.run import run_trials

        features = self._features(dataset, backbone, recorder)
        # Packaging needs the network: load it beside Ray's start and the trials. A mistake in it
        # shows there as well.
        threading.Thread(target=self._load_backbone, name="backbone", daemon=True).start()
        ray.start()
        finished = sum(trial.finished for trial in recorder.record.trials.values())
        self.observer.note(_describe_search(self.experiment, finished, remaining))
        self.observer.trials_begin(recorder.record, finished + remaining)
        try:
            return run_trials(self.folder, self.experiment, features.folder, recorder)
        finally:
            self.observer.trials_end()

    def _features(
        self, dataset: ImageDataset, backbone: BackboneDescription, recorder: Recorder
    ) -> FeatureSet:
        """The features, computed or found; which of both goes into the journal."""
        from visiontuner.model.features import compute_features

        began = time.monotonic()
        features = compute_features(
            dataset,
            backbone=backbone,
            engine=self._engine,
            precision=self.experiment.training.precision,
            cache=self.cache,
            on_bad_image=self.experiment.data.on_bad_image,
            progress=lambda done, total: self.observer.progress(
                "Features", done, total, "pictures"
            ),
        )
        seconds = round(time.monotonic() - began, 3)
        recorder.append(
            "features_ready",
            backbone=backbone.name,
            weights_digest=backbone.weights_digest,
            feature_dim=features.feature_dim,
            engine=features.engine,
            computed=features.computed,
            seconds=seconds,
            folder=str(features.folder),
        )
        if not features.computed:
            self.observer.note("Features: all in the cache, nothing to compute.")
        for finding in features.findings:
            recorder.append("finding", **asdict(finding))
            self.observer.note(f"{finding.severity}: {finding.evidence.rstrip('.')}.")
        return features

    def _engine(self) -> Engine:
        from visiontuner.model.engine import make_engine

        engine = make_engine(
            self._load_backbone(), precision=self.experiment.training.precision, cache=self.cache
        )
        self.observer.note(f"Features are computed once, by {engine.description}.")
        return engine

    def _conclude(
        self,
        state: SearchState,
        dataset: ImageDataset,
        recorder: Recorder,
        tracking: _Tracking,
    ) -> SearchResult:
        best = recorder.record.best
        recorder.append("search_ended", state=state, best_trial=best and best.trial_id)
        if state == "interrupted":
            return self._result(state, recorder, tracking.close(timeout_seconds=10))
        if best is None:
            raise SearchFailed(_first_error(recorder.record))
        self.observer.note(f"Packaging {best.trial_id} as a classifier.")
        classifier = self._package(best, dataset)
        problem = tracking.close()
        model = None
        if problem is None:
            try:
                model = _register(self.folder, recorder.record, tracking.run_ids, self.tracking_uri)
            except TrackingError as error:
                problem = str(error)
        return self._result(state, recorder, problem, classifier=classifier, model=model)

    def _result(
        self, state: SearchState, recorder: Recorder, problem: str | None, **parts: Any
    ) -> SearchResult:
        return SearchResult(
            folder=self.folder,
            record=recorder.record,
            state=state,
            tracking_uri=self.tracking_uri,
            tracking_problem=problem,
            **parts,
        )

    def _package(self, best: TrialRecord, dataset: ImageDataset) -> Path:
        from visiontuner.model.package import package_classifier
        from visiontuner.search.trial import HEAD_FILE

        folder = self.folder / CLASSIFIER_FOLDER
        reference = _spread(dataset.splits["validation"], REFERENCE_PICTURES)
        package_classifier(
            folder=folder,
            backbone=self._load_backbone(),
            head_weights=self.folder / "trials" / best.trial_id / HEAD_FILE,
            class_names=dataset.class_names,
            dataset_root=dataset.root,
            reference_paths=[sample.path for sample in reference],
            reference_labels=[sample.label for sample in reference],
            metadata={
                "trial_id": best.trial_id,
                "configuration": best.configuration,
                "data_digest": dataset.digest,
                self.experiment.objective: best.best_value,
            },
            cache=self.cache,
        )
        return folder


class _Tracking:
    """The MLflow writer beside a running search; opened in the background: it takes seconds."""

    def __init__(self, folder: Path, uri: str, adopted_run: str | None, observer: Observer) -> None:
        self._folder = folder
        self._uri = uri
        self._adopted_run = adopted_run
        self._observer = observer
        self._writer: MlflowWriter | None = None
        self._thread: WriterThread | None = None
        self._problem: str | None = None
        self._closed = False
        self._opening = threading.Thread(target=self._open, name="mlflow-open", daemon=True)
        self._opening.start()

    @property
    def run_ids(self) -> dict[str, str]:
        """MLflow run ids by trial id."""
        return self._writer.run_ids if self._writer else {}

    def close(self, *, timeout_seconds: float = 60) -> str | None:
        """Write the rest, once; returns why not everything is in MLflow, or None."""
        if not self._closed:
            self._opening.join()
            if self._thread is not None and not self._thread.close(timeout_seconds):
                self._problem = self._thread.problem or "MLflow does not hold everything yet."
            self._closed = True
        return self._problem

    def _open(self) -> None:
        from visiontuner.tracking.follow import WriterThread
        from visiontuner.tracking.mlflow_writer import MlflowWriter

        try:
            self._writer = MlflowWriter(
                self._folder, tracking_uri=self._uri, parent_run_id=self._adopted_run
            )
        except TrackingError as error:  # the search goes on, `sync` writes it elsewhere
            self._problem = str(error)
            self._observer.note(self._problem)
            return
        self._thread = WriterThread(self._writer, notice=self._observer.note)


def _with_absolute_paths(experiment: Experiment) -> Experiment:
    """So that a search can be resumed from another folder than it was begun in."""
    data, model = experiment.data, experiment.model
    source, weights = Path(data.source).expanduser(), Path(model.weights).expanduser()
    if data.source != "digits" and source.exists():
        data = data.model_copy(update={"source": str(source.resolve())})
    if model.weights not in ("default", "none") and weights.exists():
        model = model.model_copy(update={"weights": str(weights.resolve())})
    return experiment.model_copy(update={"data": data, "model": model})


def _load_data(experiment: Experiment, observer: Observer) -> ImageDataset:
    data, cache = experiment.data, writable_cache_folder()
    root = fetch_source(
        data.source,
        cache=cache,
        sha256=data.sha256,
        progress=lambda done, total: observer.progress("Fetching", done, total, "B"),
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


def _describe_data(experiment: Experiment, dataset: ImageDataset) -> dict[str, Any]:
    return {
        "source": experiment.data.source,
        "root": str(dataset.root.resolve()),
        "digest": dataset.digest,
        "class_names": list(dataset.class_names),
        "counts": {name: len(samples) for name, samples in dataset.splits.items()},
    }


def _require_same_data(record: SearchRecord, dataset: ImageDataset) -> None:
    began_with = record.started.get("data", {}).get("digest")
    if began_with != dataset.digest:
        raise UserMistake(
            f"The pictures in {dataset.root} are not those this search began with "
            f"(digest {dataset.digest[:12]} instead of {str(began_with)[:12]}). "
            "Start a new search, or bring the old pictures back."
        )


def _register(folder: Path, record: SearchRecord, run_ids: dict[str, str], uri: str) -> str:
    """Log and register the classifier once, on the run of the trial that made it."""
    from visiontuner.serving.registry import log_classifier

    best = record.best
    assert best is not None
    version = log_classifier(
        folder / CLASSIFIER_FOLDER,
        run_id=run_ids[best.trial_id],
        tracking_uri=uri,
        name=record.started["experiment"]["name"],
        tags={
            "visiontuner.search_id": record.search_id,
            "visiontuner.trial_id": best.trial_id,
            "visiontuner.data_digest": record.started["data"]["digest"],
        },
    )
    return f"models:/{version.name}/{version.version}"


def _first_error(record: SearchRecord) -> str:
    errors = [trial.error for trial in record.trials.values() if trial.error]
    if not errors:
        return "The search ended before any trial finished; give it more time."
    return f"All {len(record.trials)} trials failed. The first said: {errors[0]}"


def _spread(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """`count` pictures spread evenly over a split, so that many classes are among them."""
    step = max(1, len(samples) // count)
    return samples[::step][:count]


def _describe_search(experiment: Experiment, finished: int, remaining: int) -> str:
    search = experiment.search
    names = " and ".join(name.replace("_", " ") for name in search.space)
    scheduler = "" if search.scheduler == "none" else f", {search.scheduler} stops the weak ones"
    done = f"{finished} trials are finished, " if finished else ""
    return f"{done}{remaining} trials over {names} to run ({search.algorithm}{scheduler})."
