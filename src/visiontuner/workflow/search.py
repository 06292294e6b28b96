"""A search from the pictures to the registered model."""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visiontuner import provenance
from visiontuner.data.dataset import ImageDataset
from visiontuner.errors import (
    JournalError,
    SearchFailed,
    SearchInterrupted,
    TrackingError,
    UserMistake,
)
from visiontuner.experiment import Experiment
from visiontuner.journal import FILE_NAME, JournalWriter, SearchRecord, TrialRecord
from visiontuner.locations import SEARCHES, tracking_uri, writable_cache_folder
from visiontuner.workflow.background import beside
from visiontuner.workflow.layout import CLASSIFIER_FOLDER, EXPERIMENT_FILE, SearchResult
from visiontuner.workflow.observing import Observer, Silent, note_findings
from visiontuner.workflow.packaging import is_packaged, package_trial
from visiontuner.workflow.pictures import describe_data, load_data, require_same_data
from visiontuner.workflow.recording import BackgroundTracking, register_classifier

# Heavy parts are imported where they are used: a mistake in the data is told before torch is
# loaded, and Ray starts while it is.
if TYPE_CHECKING:
    from visiontuner.model.backbone import Backbone
    from visiontuner.model.description import BackboneDescription
    from visiontuner.model.engine import Engine
    from visiontuner.model.features import FeatureSet
    from visiontuner.search.cluster import RayForSearch
    from visiontuner.search.recorder import Recorder
    from visiontuner.search.run import SearchState

Where = Literal["local", "auto"]


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
        from visiontuner.search.plan import make_plan

        dataset = load_data(self.experiment, self.observer)
        record = self._read_record(dataset)
        remaining = make_plan(self.experiment, record).remaining
        self._had_ended = record.best is not None and not remaining
        with ExitStack() as journal:
            state, recorder, tracking = self._run_trials(dataset, record, remaining, journal)
            try:
                return self._conclude(state, dataset, recorder, tracking)
            except KeyboardInterrupt:
                raise SearchInterrupted(
                    "Stopped after the last trial. "
                    f"Go on with: visiontuner tune --resume {self.folder}"
                ) from None
            finally:
                tracking.close()

    def _run_trials(
        self, dataset: ImageDataset, record: SearchRecord, remaining: int, journal: ExitStack
    ) -> tuple[SearchState, Recorder, BackgroundTracking]:
        """The part of a search that needs Ray; `journal` closes the recorder."""
        from visiontuner.search.cluster import RayForSearch

        with RayForSearch(self.on) as ray:
            # An unknown backbone ends here, before there is a folder or a run to clean up.
            backbone = self._describe_backbone()
            recorder = journal.enter_context(closing(self._open_journal(dataset, record)))
            tracking = BackgroundTracking(
                self.folder, self.tracking_uri, self.adopted_run, self.observer
            )
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
            return state, recorder, tracking

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
            require_same_data(record, dataset)
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
                data=describe_data(self.experiment, dataset),
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
        # Ray's import and start fill one core for some seconds; the first part of the features,
        # writing the network as ONNX, the other.
        computing = beside(lambda: self._features(dataset, backbone))
        from visiontuner.search.run import run_trials

        # Packaging needs the network: load it while Ray starts, which is mostly waiting. A mistake
        # in it shows there as well.
        beside(self._load_backbone)
        ray.start()
        features = self._record_features(computing.result(), backbone, recorder)
        finished = sum(trial.finished for trial in recorder.record.trials.values())
        self.observer.note(_describe_search(self.experiment, finished, remaining))
        self.observer.trials_begin(recorder.record, finished + remaining)
        try:
            return run_trials(self.folder, self.experiment, features.folder, recorder)
        finally:
            self.observer.trials_end()

    def _features(
        self, dataset: ImageDataset, backbone: BackboneDescription
    ) -> tuple[FeatureSet, float]:
        """The features, computed or found, and the seconds it took."""
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
        return features, round(time.monotonic() - began, 3)

    def _record_features(
        self,
        found: tuple[FeatureSet, float],
        backbone: BackboneDescription,
        recorder: Recorder,
    ) -> FeatureSet:
        features, seconds = found
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
        note_findings(self.observer, features.findings)
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
        tracking: BackgroundTracking,
    ) -> SearchResult:
        best = recorder.record.best
        recorder.append("search_ended", state=state, best_trial=best and best.trial_id)
        if state == "interrupted":
            return self._result(state, recorder, tracking.close(timeout_seconds=10))
        if best is None:
            raise SearchFailed(_first_error(recorder.record))
        classifier = self._package(best, dataset, recorder.record)
        problem = tracking.close()
        model = None
        if problem is None:
            try:
                model = register_classifier(
                    self.folder, recorder.record, tracking.run_ids, self.tracking_uri
                )
            except TrackingError as error:
                problem = str(error)
        return self._result(state, recorder, problem, classifier=classifier, model=model)

    def _package(self, best: TrialRecord, dataset: ImageDataset, record: SearchRecord) -> Path:
        if self._had_ended and is_packaged(self.folder, record):
            return self.folder / CLASSIFIER_FOLDER  # and perhaps evaluated since
        self.observer.note(f"Packaging {best.trial_id} as a classifier.")
        return package_trial(
            self.folder,
            best,
            experiment=self.experiment,
            dataset=dataset,
            backbone=self._load_backbone(),
            cache=self.cache,
        )

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


def _with_absolute_paths(experiment: Experiment) -> Experiment:
    """So that a search can be resumed from another folder than it was begun in."""
    data, model = experiment.data, experiment.model
    source, weights = Path(data.source).expanduser(), Path(model.weights).expanduser()
    if data.source != "digits" and source.exists():
        data = data.model_copy(update={"source": str(source.resolve())})
    if model.weights not in ("default", "none") and weights.exists():
        model = model.model_copy(update={"weights": str(weights.resolve())})
    return experiment.model_copy(update={"data": data, "model": model})


def _first_error(record: SearchRecord) -> str:
    errors = [trial.error for trial in record.trials.values() if trial.error]
    if not errors:
        return "The search ended before any trial finished; give it more time."
    return f"All {len(record.trials)} trials failed. The first said: {errors[0]}"


def _describe_search(experiment: Experiment, finished: int, remaining: int) -> str:
    search = experiment.search
    names = " and ".join(name.replace("_", " ") for name in search.space)
    scheduler = "" if search.scheduler == "none" else f", {search.scheduler} stops the weak ones"
    done = f"{finished} trials are finished, " if finished else ""
    return f"{done}{remaining} trials over {names} to run ({search.algorithm}{scheduler})."
