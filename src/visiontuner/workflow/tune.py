"""A search from the images to the registered model; `--from` begins with what another found."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from visiontuner import interrupts
from visiontuner.data.arrays import DecodedImages, FeatureSet
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.manifest import (
    MANIFEST_FILE,
    compare_images,
    describe_classes,
    read_manifest,
    write_manifest,
)
from visiontuner.errors import (
    DataError,
    DiskError,
    JournalError,
    SearchFailed,
    SearchInterrupted,
    TrackingError,
    UserMistake,
)
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import disk_problem
from visiontuner.journal import SearchRecord, TrialRecord, read_events
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EXPERIMENT_FILE,
    JOURNAL_FILE,
    SEARCHES,
    tracking_uri,
)
from visiontuner.search.plan import (
    Stores,
    plan_stage,
    read_labels,
    remaining_trials,
    settle,
    stages_of,
)
from visiontuner.search.ray_cluster import RayForSearch, describe_cluster, require_room
from visiontuner.search.warm_start import take_over
from visiontuner.text import next_command, one_line
from visiontuner.tracking.run_plans import take_project_run
from visiontuner.workflow.inputs import Inputs, Observer, Silent, StoreRecorder, with_absolute_paths
from visiontuner.workflow.prepare import compute_features_of, leave_out_missing
from visiontuner.workflow.run import (
    SearchResult,
    claim_folder,
    is_packaged,
    open_journal,
    package_trial,
    read_record,
)
from visiontuner.workflow.selection import (
    Kept,
    ValidationAnswers,
    baseline_store,
    choose_and_record,
    compute_baselines,
    deal_folds,
    record_baselines,
)
from visiontuner.workflow.tracking_process import BackgroundTracking, register_int8

if TYPE_CHECKING:
    from concurrent.futures import Future

    from visiontuner.search.live import Recorder
    from visiontuner.search.plan import Plan, Stage
    from visiontuner.search.run import SearchState

T = TypeVar("T")


# The stages of a search, one after the other: what their trials train on, then the trials.


class StageRunner:
    """Runs what a search's journal does not hold yet."""

    def __init__(self, inputs: Inputs, folder: Path, recorder: Recorder, ray: RayForSearch) -> None:
        self.inputs = inputs
        self.folder = folder
        self.recorder = recorder
        self.ray = ray
        self.observer = inputs.observer
        self._stores = StoreRecorder(inputs, recorder)
        self.baselines: Future[list[Kept]] | None = None
        budget = inputs.experiment.search.time_budget
        self._deadline = None if budget is None else time.monotonic() + budget

    def run(self) -> SearchState:
        """All stages; the first one that does not complete is the last."""

        state: SearchState = "completed"
        for stage in stages_of(self.inputs.experiment):
            plan = plan_stage(stage, self.recorder.record)
            if plan.remaining:
                state = self._run_stage(stage, plan)
            if state != "completed":
                break
        return state

    def _run_stage(self, stage: Stage, plan: Plan) -> SearchState:
        if self.ray.joins and not self.inputs.on_cluster:
            self._start_ray()
            self.inputs.join_cluster()
            self.observer.note(describe_cluster())
        networks = self.inputs.experiment.search.backbones
        if networks:
            return self._run_networks(stage, plan)
        # Ray's import and start fill one core for some seconds; the first part of the features,
        # writing the network as ONNX, the other.
        computing = self.inputs.beside(lambda: self._store(stage))
        # Packaging needs the network: load it while Ray starts, which is mostly waiting. A
        # mistake in it shows there as well.
        self.inputs.beside(lambda: self.inputs.backbone)
        stores = self._stores.record(*self._with_ray(computing))
        if stage.name == "network":
            self._prepare_heads(plan, stores)
        return self._run_trials(stage, plan, stores)

    def _store(self, stage: Stage) -> tuple[FeatureSet | DecodedImages, float]:
        """What the trials train on; baselines begin as soon as it is there."""
        store, seconds = self.inputs.store(on_images=stage.on_images)
        if isinstance(store, FeatureSet):
            deal_folds(self.inputs, self.folder, store.folder)
            if self.inputs.experiment.has_baselines:
                self.baselines = self.inputs.beside(
                    functools.partial(
                        compute_baselines,
                        self.inputs,
                        self.folder,
                        store.folder,
                        known=set(self.recorder.record.baselines),
                    )
                )
        return store, seconds

    def _run_networks(self, stage: Stage, plan: Plan) -> SearchState:
        """Heads on the features of several networks, which are computed one after the other."""
        computing = self.inputs.beside(
            lambda: compute_features_of(self.inputs, self.recorder, self._stores)
        )
        features_of = self._with_ray(computing)
        stores = Stores(features=next(iter(features_of.values())), images=None)
        assert stores.features is not None
        deal_folds(self.inputs, self.folder, stores.features)
        return self._run_trials(stage, plan, stores, features_of)

    def _with_ray(self, computing: Future[T]) -> T:
        """What is computed beside, once Ray runs."""
        try:
            self._start_ray()
            return interrupts.result(computing)
        except BaseException:  # a Ctrl-C, or a Ray that does not start
            self.inputs.stop()
            raise

    def _run_trials(
        self,
        stage: Stage,
        plan: Plan,
        stores: Stores,
        features_of: Mapping[str, Path] | None = None,
    ) -> SearchState:
        from visiontuner.search.run import run_trials

        record = self.recorder.record
        finished = sum(trial.finished for trial in record.trials.values())
        self.observer.note(describe_stage(stage, finished, plan.remaining, len(features_of or {})))
        self.observer.trials_begin(record, finished + plan.remaining)
        try:
            return run_trials(
                self.folder,
                stage,
                self.recorder,
                stores=stores,
                cache=self.inputs.cache,
                time_budget=self._seconds_left(),
                features_of=features_of,
            )
        finally:
            self.observer.trials_end()

    def _start_ray(self) -> None:
        if not self.ray.is_started:
            self.observer.note("Starting Ray.")
        try:
            self.ray.start()
        except SearchFailed as error:
            on = ["--on", "auto"] if self.ray.joins else []
            command = next_command("tune", *on, "--resume", self.folder)
            raise SearchFailed(f"{error} Then go on with: {command}") from error

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.1, self._deadline - time.monotonic())

    # the second stage

    def _prepare_heads(self, plan: Plan, stores: Stores) -> None:
        """The heads that networks begin with: on the disk, and of the same images."""
        self._require_same_images(stores)
        record = self.recorder.record
        answers = ValidationAnswers(self.folder, record, self.inputs.experiment, inputs=self.inputs)
        for planned in plan.known:
            if planned.starts_from is None:
                continue
            said = answers.restore(record.trials[planned.starts_from])
            if said:
                self.observer.note(said)

    def _require_same_images(self, stores: Stores) -> None:
        """Logits of both stages are compared image by image."""

        features = Stores.of(read_events(self.folder).events).features
        try:
            heads = read_labels(features=features)
        except DataError:
            return  # gone from the cache: the digest of the data is the same
        if not np.array_equal(heads.labels, stores.read_labels().labels):
            raise DataError(
                "Other images can be read now than when the heads were trained. "
                "Bring the images back as they were, or start a new search."
            )


def describe_stage(stage: Stage, finished: int, remaining: int, networks: int = 0) -> str:
    """What is about to run, in one line; `networks` is how many are searched."""
    search, model = stage.experiment.search, stage.experiment.model
    done = f"{finished} trials are finished, " if finished else ""
    if stage.name == "network":
        return (
            f"{done}{remaining} go on with the network (model.train: {model.train}) for "
            f"{stage.experiment.training.epochs} epochs."
        )
    names = " and ".join(name.replace("_", " ") for name in search.space if name != "backbone")
    if networks:
        names += f" on {networks} network" + "s" * (networks > 1)
    scheduler = "" if search.scheduler == "none" else f", {search.scheduler} stops the weak ones"
    how = "grid: every combination" if search.algorithm == "grid" else search.algorithm
    return f"{done}{remaining} trials over {names} to run ({how}{scheduler})."


Where = Literal["local", "auto"]
CHANGEABLE = "search.time_budget"
"""What `--set` may change with `--resume`: no trial depends on it."""


def run_search(
    experiment: Experiment,
    *,
    output: Path | None = None,
    on: Where = "local",
    start: EarlierSearch | None = None,
    observer: Observer | None = None,
) -> SearchResult:
    """Search, write every trial to MLflow, package and register the best.

    Args:
        start: a search whose best configurations are tried first, and whose trials Optuna is told.
        output: a new folder for the search; default: `searches/NAME-TIME` here.
        on: `local` starts a Ray on this machine, `auto` joins the cluster it is in.

    Raises:
        UserMistake: the folder is taken, or data or backbone do not fit the experiment.
        SearchFailed: no trial was usable; the message has the first trial's error.
    """
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserMistake(
            f"{output} already exists. Choose another --output, or go on with: "
            f"{next_command('tune', '--resume', output)}"
        )
    folder = output or SEARCHES / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = _Run(with_absolute_paths(experiment), folder, on, observer or Silent(), start)
    return run.run(is_named=output is not None)


def resume_search(
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    on: Where = "local",
    observer: Observer | None = None,
) -> SearchResult:
    """Go on with a search after any death: finished trials stay, the others run.

    Args:
        overrides: `search.time_budget=…`, for this time; `null` takes it away.

    Raises:
        JournalError: the folder holds no search, or another process is running it.
        UserMistake: the images are not those the search began with, or an override would make
            another search of it.
    """
    for override in overrides:
        if override.partition("=")[0].strip() != CHANGEABLE:
            raise UserMistake(
                "--resume goes on with the search as it was, and "
                f"{override!r} would make another one of it; only {CHANGEABLE} can be set."
            )
    path = folder / EXPERIMENT_FILE
    if not path.is_file():
        raise JournalError(f"{folder} is no search folder: it has no {EXPERIMENT_FILE}.")
    if (folder / JOURNAL_FILE).is_file() and SearchRecord.load(folder).is_training:
        raise JournalError(
            f"{folder} holds one training: {next_command('train', '--resume', folder)}"
        )
    return _Run(Experiment.load(path, overrides), folder, on, observer or Silent()).run()


class _Run:
    """One run of a search, from the images to the registered model."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        on: Where,
        observer: Observer,
        start: EarlierSearch | None = None,
    ) -> None:
        self.experiment = experiment
        self.start = start
        self.folder = folder
        self.on = on
        self.observer = observer
        self.inputs = Inputs(experiment, observer)
        self.tracking_uri = tracking_uri()
        self.project_run = take_project_run()
        self._facts: dict[str, Any] = {}  # for a new journal's first line
        self._left_out: Mapping[str, str] = {}  # networks whose weights cannot be had, and why

    def run(self, *, is_named: bool = True) -> SearchResult:
        """Everything; a folder that nobody has named gets a name that nobody else has taken."""

        with (
            interrupts.handled(),
            closing(self.inputs),
            BackgroundTracking(self.tracking_uri, self.project_run, self.observer) as tracking,
            ExitStack() as journal,
        ):
            record = read_record(self.folder, self.inputs.dataset)
            if not record.started:
                self._settle()
                self._fit_space()
                self._take_over()
            remaining = remaining_trials(self.experiment, record)
            # Not one that was killed or stopped between its last trial and the choice.
            whole = (record.ended or {}).get("state") == "completed"
            self._had_ended = record.best is not None and not remaining and whole
            self._require_what_it_needs(record)
            if not is_named:
                self.folder = claim_folder(self.folder)
            journal.enter_context(interrupts.in_order())
            state, recorder = self._run_trials(record, remaining, tracking, journal)
            try:
                return self._conclude(state, recorder, tracking)
            except KeyboardInterrupt:
                raise SearchInterrupted(
                    "Stopped after the last trial. "
                    f"Go on with: {next_command('tune', '--resume', self.folder)}"
                ) from None

    def _settle(self) -> None:
        """What `auto` means for these images, from now on in the experiment itself."""
        dataset = self.inputs.dataset
        self.experiment = self.inputs.experiment = settle(
            self.experiment,
            images=sum(len(dataset.splits[name]) for name in ("train", "validation")),
            own_validation=dataset.own_validation,
        )

    def _fit_space(self) -> None:
        """No batches of more than all training images, where the file does not ask for them."""
        images = len(self.inputs.dataset.splits["train"])
        fitting = self.experiment.for_images(images)
        sizes = fitting.search.space.get("batch_size")
        if sizes != self.experiment.search.space.get("batch_size"):
            self.observer.note(
                f"There are {images:,} training images: the default search space has batch sizes "
                f"up to that, {sizes}."
            )
        self.experiment = self.inputs.experiment = fitting

    def _take_over(self) -> None:
        """What an earlier search is good for here, for the journal's first line."""
        if self.start is not None:
            facts, said = take_over_search(self.start, self.experiment, self.inputs.dataset)
            self._facts = {"from": facts}
            for line in said:
                self.observer.note(line)

    def _require_what_it_needs(self, record: SearchRecord) -> None:
        """What cannot work ends here, before there is a folder or a run to clean up."""

        if self.experiment.search.backbones:
            self._left_out = leave_out_missing(self.inputs, record)
        else:
            _ = self.inputs.description
        if self.on == "local":
            require_room(self.experiment.search)

    def _run_trials(
        self,
        record: SearchRecord,
        remaining: int,
        tracking: BackgroundTracking,
        journal: ExitStack,
    ) -> tuple[SearchState, Recorder]:
        """The part of a search that needs Ray; `journal` closes the recorder."""

        with RayForSearch(self.on, on_loss=self._tell_that_ray_is_gone) as ray:
            recorder = journal.enter_context(closing(self._open_journal(record)))
            tracking.begin(self.folder)
            for name, reason in self._left_out.items():
                recorder.append("network_left_out", backbone=name, reason=reason)
            state: SearchState = "completed"
            try:
                stages = StageRunner(self.inputs, self.folder, recorder, ray)
                if remaining:
                    state = stages.run()
                if state != "interrupted" and not self._had_ended:
                    self._choose(recorder, stages.baselines)
            except KeyboardInterrupt:
                state = "interrupted"
            except Exception as error:
                if disk_problem(error) is not None:
                    raise self._interrupted_by_disk(error, recorder) from None
                recorder.append("search_ended", state="failed", best_trial=None, error=str(error))
                raise
            # Before Ray ends, which takes seconds that a signal may not leave.
            best = recorder.record.best
            recorder.append("search_ended", state=state, best_trial=best and best.trial_id)
            return state, recorder

    def _choose(self, recorder: Recorder, baselines: Future[list[Kept]] | None) -> None:
        """Baselines beside the trials, and what is kept of them all.

        Args:
            baselines: computed while Ray started; None where that depends on the trials.
        """
        if recorder.record.best is None:
            return
        if self.experiment.has_baselines:
            store = baseline_store(self.folder, recorder.record)
            known = set(recorder.record.baselines)
            computing = baselines or self.inputs.beside(
                lambda: compute_baselines(self.inputs, self.folder, store, known=known)
            )
            if not computing.done() or computing.result():
                self.observer.note("Baselines: logistic regression and nearest neighbours.")
            found = interrupts.result(computing)
            record_baselines(found, recorder)
        choose_and_record(self.folder, recorder, self.inputs)

    def _tell_that_ray_is_gone(self) -> None:
        self.observer.trials_end()
        self.observer.note(
            "Error: A Ray process was killed, perhaps because memory was full. Finished trials "
            f"are kept. Go on with: {next_command('tune', '--resume', self.folder)}"
        )

    def _interrupted_by_disk(self, error: Exception, recorder: Recorder) -> DiskError:
        """Nothing has failed for good: the search goes on where there is room."""
        best = recorder.record.best
        with suppress(SearchFailed):  # the journal's own disk may be the full one
            recorder.append("search_ended", state="interrupted", best_trial=best and best.trial_id)
        return DiskError(
            f"{one_line(error, 500).rstrip('.')}. The search is interrupted, nothing is lost. Make "
            f"room, then go on with: {next_command('tune', '--resume', self.folder)}"
        )

    def _open_journal(self, record: SearchRecord) -> Recorder:
        dataset = self.inputs.dataset
        recorder = open_journal(
            self.folder, self.experiment, dataset, record, self.observer, **self._facts
        )
        with suppress(OSError):  # a later search then says less of its images
            if not (self.folder / MANIFEST_FILE).exists():
                write_manifest(self.folder, dataset)
        return recorder

    def _conclude(
        self, state: SearchState, recorder: Recorder, tracking: BackgroundTracking
    ) -> SearchResult:
        if state == "interrupted":
            return self._result(state, recorder, tracking.close(timeout_seconds=10, hard=True))
        kept = recorder.record.kept
        if kept is None:
            raise SearchFailed(
                _first_error(recorder.record, self.folder, self.experiment.search.time_budget)
            )
        tracking.begin_to_close()
        classifier = self._package(kept, recorder.record)
        self.observer.note("Writing to MLflow.")
        problem = tracking.close()
        model, int8 = None, None
        if problem is None:
            try:
                model = tracking.register()
                int8 = register_int8(self.folder, self.experiment, self.observer)
            except TrackingError as error:
                problem = str(error)
        parts = {"classifier": classifier, "model": model, "model_int8": int8}
        return self._result(state, recorder, problem, **parts)

    def _package(self, kept: TrialRecord, record: SearchRecord) -> Path:
        if self._had_ended and is_packaged(self.folder, record):
            return self.folder / CLASSIFIER_FOLDER  # and perhaps evaluated since
        answers = ValidationAnswers(self.folder, record, self.experiment, inputs=self.inputs)

        def package() -> Path:
            if said := answers.refit(kept):
                self.observer.note(said)
            self.observer.note(f"Packaging {kept.trial_id} as a classifier.")
            return package_trial(
                self.folder,
                kept,
                inputs=self.inputs.of_trial(kept),
                record=record,
            )

        return interrupts.result(self.inputs.beside(package))

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


def _first_error(record: SearchRecord, folder: Path, budget: float | None) -> str:
    errors = [trial.error for trial in record.trials.values() if trial.error]
    if not errors:
        more = ("--set", f"{CHANGEABLE}={math.ceil(10 * (budget or 60))}s")
        return (
            "The time budget ended before any trial finished, and trials begin again. Raise it, "
            f"or remove it (null): {next_command('tune', '--resume', folder, *more)}"
        )
    return f"All {len(record.trials)} trials failed. The first said: {errors[0]}"


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
