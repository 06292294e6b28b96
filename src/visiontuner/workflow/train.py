"""One training with given hyperparameters, in this process: a search folder with one trial.

Everything that looks at a search looks at it the same way: MLflow, evaluate, promote, report.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from visiontuner import interrupts
from visiontuner.diagnostics.history import TRACE_FILE
from visiontuner.errors import (
    DataError,
    JournalError,
    SearchFailed,
    SearchInterrupted,
    TrackingError,
    TrialFailed,
    UserMistake,
    VisiontunerError,
)
from visiontuner.evaluation.baselines import REGRESSION
from visiontuner.experiment.schema import SEARCHABLE, Configuration, Experiment, Training
from visiontuner.io.files import temporary_folder
from visiontuner.journal import SearchRecord, TrialRecord, newest_search, packaged_trial
from visiontuner.model.classifier import Classifier, read_threshold
from visiontuner.model.classifier_files import recalibrate
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EXPERIMENT_FILE,
    JOURNAL_FILE,
    SEARCHES,
    tracking_uri,
)
from visiontuner.search.live import LiveRules, end_trial, findings_of
from visiontuner.search.plan import HEAD_FILE, TrialTask, stage_named, stage_of
from visiontuner.text import next_command
from visiontuner.tracking.run_plans import take_project_run
from visiontuner.workflow.inputs import (
    Inputs,
    Observer,
    Silent,
    StoreRecorder,
    training_threads,
    with_absolute_paths,
)
from visiontuner.workflow.run import (
    SearchResult,
    is_packaged,
    open_journal,
    package_trial,
    read_record,
)
from visiontuner.workflow.selection import ValidationAnswers
from visiontuner.workflow.tracking_process import BackgroundTracking, register_int8

if TYPE_CHECKING:
    from visiontuner.search.live import Recorder
    from visiontuner.search.plan import Stores, TrainedOn
    from visiontuner.serving.lineage import Lineage
    from visiontuner.training.loop import EpochResult, StepDone


# Whose hyperparameters a training takes: a search's best trial, a run's, or a model's.


CHAMPION = "champion"
# What `evaluate` asks for where nobody says otherwise.
_PRECISION = 0.95
_OF_THE_SEARCH = re.compile(r"search\.(?!cpus_per_trial\b|gpus_per_trial\b)")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What turns logits into probabilities to trust, and which trial it was fitted on."""

    temperature: float
    threshold: float | None
    abstains: bool
    wanted_precision: float
    fitted_on: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The trial that a training takes its hyperparameters from.

    Attributes:
        description: for people: `t0005 of searches/dogs`.
        experiment: as it was resolved for that trial.
        configuration: its searched values, by name.
        facts: for the journal: search_id, trial_id, and the run or the model it was found by.
        class_names: what it tells apart, in order.
        folder: of its search, where that is on this machine.
        head_trial: whose head a network may begin with: its own, if it trained nothing else, or
            the one it began with itself.
        model_id: of its logged model, where it has one.
        data_digest: of its images, splits included.
        complete: it ran all its epochs, and measured them on validation.
        model_of: what the model of the origin learnt from; None if that is another trial's.
    """

    description: str
    experiment: dict[str, Any]
    configuration: Configuration
    facts: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    folder: Path | None = None
    head_trial: str | None = None
    model_id: str | None = None
    data_digest: str | None = None
    complete: bool = False
    model_of: TrainedOn | None = "train"

    def head(self) -> Path | None:
        """A trained head for a network to begin with; None if none was kept."""
        if self.folder is None or self.head_trial is None:
            return None

        path = self.folder / "trials" / self.head_trial / HEAD_FILE
        if path.is_file():
            return path
        record = SearchRecord.load(self.folder)
        if record.folds is None:
            return None
        experiment = Experiment.load(self.folder / EXPERIMENT_FILE)
        answers = ValidationAnswers(self.folder, record, experiment)
        try:
            return answers.head_of_train(record.trials[self.head_trial])
        except DataError:  # what it was trained on is gone
            return None

    def calibration(self) -> Calibration | None:
        """Temperature and threshold that the origin got from images it had not seen.

        Those of its evaluated classifier; else fitted now, on the validation answers that its
        search kept. None where neither is there.
        """
        if self.folder is not None:
            return _calibration_of_folder(self.folder, self.facts["trial_id"])
        return _calibration_of_model(self.model_id, self.description) if self.model_id else None


def find_origin(text: str, *, name: str | None = None) -> Origin:
    """What `--from` names.

    Args:
        text: a search folder (its best trial), an MLflow run of a trial, `champion`, or a model as
            NAME, NAME/VERSION, NAME@ALIAS or models:/….
        name: of the registered model that `champion` is looked for in; default: the newest
            search's.

    Raises:
        UserMistake: there is no such thing, or it says nothing about its hyperparameters.
        TrackingError: MLflow is away or refuses.
    """
    folder = Path(text)
    if (folder / JOURNAL_FILE).is_file():
        return _from_folder(folder)
    if folder.is_dir():
        raise UserMistake(f"{folder} is no search folder: it has no {JOURNAL_FILE}.")
    if text == CHAMPION:
        text = f"{name or _newest_name()}@{CHAMPION}"
    from visiontuner.workflow.lineage import trace

    return _from_lineage(text, trace(text))


def starting_head(origin: Origin, inputs: Inputs) -> Path | None:
    """The origin's trained head, where a network can begin with it; says so, or why not."""
    head = origin.head()
    if head is None or not inputs.experiment.trains_on_images:
        return None
    theirs, ours = origin.experiment["model"], inputs.experiment.model
    same = all(theirs[name] == getattr(ours, name) for name in ("backbone", "weights"))
    if not same or origin.class_names != inputs.dataset.class_names:
        inputs.observer.note(
            "The head starts anew: the one of the origin is for another backbone, other "
            "weights or other classes."
        )
        return None
    inputs.observer.note("The network begins with the origin's trained head.")
    return head


def one_training(
    raw: Mapping[str, Any], overrides: Sequence[str], origin: Origin | None, *, where: str
) -> Experiment:
    """An experiment whose search is one configuration: its `search.first`.

    Without an origin the configuration is what `training` says for the names that a search looks
    at by default; with one it is what that trial's search looked at.

    Raises:
        ExperimentError: naming the key, the value and the rule it breaks.
        UserMistake: an override of what is searched.
    """
    for override in overrides:
        if _OF_THE_SEARCH.match(override.strip()):
            raise UserMistake(
                f"{override!r} is about a search; one training has no space. Set the value itself, "
                "for example training.learning_rate=0.003."
            )
    names: Sequence[str] = ("learning_rate", "batch_size")
    resolved = {key: value for key, value in raw.items() if key != "search"}
    if origin is not None:
        names = [name for name in SEARCHABLE if name in origin.configuration]
        resolved["training"] = {**(raw.get("training") or {}), **origin.configuration}
    search = raw.get("search") or {}
    kept = {key: search[key] for key in ("cpus_per_trial", "gpus_per_trial") if key in search}
    if "data" in resolved:
        resolved["data"] = {**(resolved["data"] or {}), "validation": "holdout", "folds": None}
    checked = Experiment.parse({**resolved, "search": kept}, overrides, where=where)
    configuration: Configuration = {n: getattr(checked.training, n) for n in names}
    one = {
        **checked.search.model_dump(include={"cpus_per_trial", "gpus_per_trial"}),
        "trials": 1,
        "algorithm": "random",
        "scheduler": "none",
        "baselines": False,
        "space": {name: {"values": [value]} for name, value in configuration.items()},
        "first": [configuration],
    }
    complete = {**checked.model_dump(mode="json"), "search": one}
    complete["data"] |= {"validation": "holdout", "folds": None}
    complete["training"] |= {"refit": "off"}
    return Experiment.parse(complete, where=where)


def _from_folder(folder: Path) -> Origin:
    record = SearchRecord.load(folder)
    best = record.best
    if best is None:
        raise UserMistake(
            f"{folder} has no usable trial yet. Wait for its end, or "
            f"`{next_command('diagnose', folder)}` says what went wrong."
        )
    experiment = stage_of(Experiment.load(folder / EXPERIMENT_FILE), best).experiment
    learnt_from: TrainedOn = "train+validation" if experiment.refits else "train"
    return Origin(
        description=f"{best.trial_id} of {folder}",
        experiment=experiment.model_dump(mode="json"),
        configuration=_of_training(best.configuration),
        facts=_facts(record, best) | {"folder": str(folder.resolve())},
        class_names=tuple(record.started["data"]["class_names"]),
        folder=folder.resolve(),
        head_trial=best.trial_id if experiment.model.train == "head" else best.starts_from,
        data_digest=record.started["data"].get("digest"),
        model_of=learnt_from if record.kept is best else None,
        complete=best.state == "completed" and not record.is_unvalidated,
    )


def _facts(record: SearchRecord, trial: TrialRecord) -> dict[str, Any]:
    return {"search_id": record.search_id, "trial_id": trial.trial_id}


def _from_lineage(text: str, lineage: Lineage) -> Origin:
    trial, model = lineage.trial or {}, lineage.model or {}
    if lineage.experiment is None or not trial.get("trial_id"):
        raise UserMistake(
            f"{text} says nothing about its hyperparameters: its runs are gone from MLflow, or "
            "nothing was trained there. Name a search folder, or a trial's run."
        )
    if trial["trial_id"] == REGRESSION:
        raise UserMistake(
            f"{text} is a logistic regression, which has no hyperparameters of a training. Name "
            "the search's folder, or a trial's run."
        )
    searched = Experiment.parse(lineage.experiment, where=text)
    params = trial.get("configuration") or {}
    experiment = stage_named(searched, trial.get("stage")).experiment.for_configuration(params)
    facts = {
        "search_id": (lineage.search or {}).get("search_id"),
        "trial_id": trial["trial_id"],
        "run_id": trial.get("run_id"),
        "model": model.get("uri"),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    return Origin(
        description=f"{trial['trial_id']} of {model.get('uri') or 'run ' + str(text)}",
        experiment=experiment.model_dump(mode="json"),
        configuration=_read_params(params),
        facts=known,
        class_names=tuple((lineage.data or {}).get("class_names") or ()),
        model_id=model.get("model_id"),
        data_digest=(lineage.data or {}).get("digest"),
        model_of="train+validation" if experiment.refits else "train",
        # A training on validation too has no best value.
        complete=trial.get("state") == "completed" and bool(trial.get("best")),
    )


def _read_params(params: Mapping[str, str]) -> Configuration:
    """MLflow keeps text; what is no searched value was somebody else's."""
    searched = {name: v for name, v in _of_training(params).items() if name in SEARCHABLE}
    training = Training.model_validate(searched)
    return {name: getattr(training, name) for name in SEARCHABLE if name in searched}


def _of_training(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The searched values without the network, which is `model.backbone` of the experiment."""
    return {name: value for name, value in configuration.items() if name != "backbone"}


def _newest_name() -> str:
    try:
        return str(SearchRecord.load(newest_search()).started["experiment"]["name"])
    except JournalError:
        raise UserMistake(
            "Whose champion? There is no search here that would tell. Name the model: "
            f"--from NAME@{CHAMPION}."
        ) from None


# calibration


def _calibration_of_folder(folder: Path, trial_id: str) -> Calibration | None:
    if packaged_trial(folder) == trial_id:
        found = _read_calibration(folder / CLASSIFIER_FOLDER, f"{trial_id} of {folder.name}")
        if found is not None:
            return found
    answers = ValidationAnswers(
        folder, SearchRecord.load(folder), Experiment.load(folder / EXPERIMENT_FILE)
    )
    try:
        temperature, threshold, _ = answers.calibrate(trial_id, _PRECISION)
    except VisiontunerError:  # its answers are gone: then it stays unset
        return None
    if threshold is None:  # of a training on validation too, that had nothing to take over
        return None
    return Calibration(
        temperature=temperature,
        threshold=threshold.value,
        abstains=threshold.value is None,
        wanted_precision=_PRECISION,
        fitted_on=f"{trial_id} of {folder.name}",
    )


def _calibration_of_model(model_id: str, description: str) -> Calibration | None:
    from visiontuner.serving.lineage import download_classifier
    from visiontuner.workflow.promote import open_store

    try:
        with temporary_folder() as temporary:
            folder = download_classifier(open_store(), model_id, temporary)
            return _read_calibration(folder, description)
    except VisiontunerError:
        return None


def _read_calibration(classifier: Path, fitted_on: str) -> Calibration | None:
    """Of a classifier that was evaluated; another one's temperature is 1 because nobody set it."""

    try:
        read = Classifier.load(classifier, threads=1)
    except VisiontunerError:
        return None
    calibration = read.metadata.get("calibration")
    if calibration is None:
        return None
    return Calibration(
        temperature=read.temperature,
        threshold=read.threshold,
        abstains=read.abstains,
        wanted_precision=float(calibration.get("wanted_precision", _PRECISION)),
        # Of a training on validation itself: what its own origin was fitted on.
        fitted_on=str(calibration.get("fitted_on") or fitted_on),
    )


TRIAL_ID = "t0001"
START_HEAD_FILE = "start_head.safetensors"
CHANGEABLE = ("training.workers", "training.micro_batch_size", "training.record_every_steps")


class TrainingObserver(Observer, Protocol):
    """Observes a training, step by step."""

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
        """After step `step` (from 1) of `steps` in an epoch; reading the loss takes time."""


class SilentTraining(Silent):
    """A TrainingObserver that shows nothing."""

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None: ...


def train(
    experiment: Experiment,
    *,
    origin: Origin | None = None,
    trained_on: TrainedOn = "train",
    output: Path | None = None,
    trace_steps: tuple[int, int] | None = None,
    observer: TrainingObserver | None = None,
) -> SearchResult:
    """Train once, write it to MLflow, package and register it.

    Args:
        experiment: as `train_from.one_training` makes it: its search is this one configuration.
        origin: where the configuration comes from. A network begins with its trained head, if it
            has one for the same backbone and classes.
        trained_on: with `train+validation` the last epoch counts, no validation metric is kept, and
            the temperature is the origin's.
        output: a new folder; default: `searches/NAME-train-TIME` here.
        trace_steps: the first and the last step of which a profiler's trace is written.

    Raises:
        UserMistake: the folder is taken, or data or backbone do not fit the experiment.
        SearchFailed: the training cannot be used or cannot go on; the message says why.
        SearchInterrupted: it was stopped in order; the message has the command that goes on.
    """
    folder = output or SEARCHES / f"{experiment.name}-train-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserMistake(
            f"{folder} already exists. Choose another --output, or go on with: "
            f"{next_command('train', '--resume', folder)}"
        )
    observer = observer or SilentTraining()
    if trained_on != "train" and experiment.training.early_stop is not None:
        observer.note("No early stop: no validation images are left to stop by.")
        training = experiment.training.model_copy(update={"early_stop": None})
        experiment = experiment.model_copy(update={"training": training})
    run = _Training(with_absolute_paths(experiment), folder, observer, trace_steps)
    return run.begin(origin, trained_on)


def resume_training(
    folder: Path, *, overrides: Sequence[str] = (), observer: TrainingObserver | None = None
) -> SearchResult:
    """Go on with a training after any interruption, from its last whole epoch.

    On a CPU in fp32 the numbers are those of a training that was not interrupted. One that ended is
    packaged and registered if it is not yet.

    Args:
        overrides: `section.key=value` of what leaves the numbers as they are, `CHANGEABLE`.

    Raises:
        JournalError: the folder holds no training, or another process is running it.
        UserMistake: the images are not those it began with.
        CheckpointError: the checkpoint is of another network, class list or setting.
    """
    if not (folder / JOURNAL_FILE).is_file() or not (folder / EXPERIMENT_FILE).is_file():
        raise JournalError(f"{folder} holds no training: `visiontuner train` begins one.")
    record = SearchRecord.load(folder)
    if record.started and not record.is_training:
        raise JournalError(f"{folder} holds a search: {next_command('tune', '--resume', folder)}")
    for override in overrides:
        if override.partition("=")[0].strip() not in CHANGEABLE:
            raise UserMistake(
                f"{override!r} would make another training of it; only {', '.join(CHANGEABLE)} can "
                "be set with --resume."
            )
    experiment = Experiment.load(folder / EXPERIMENT_FILE, overrides)
    return _Training(experiment, folder, observer or SilentTraining()).go_on()


class _Training:
    """One run of a training, from the images to the registered model."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        observer: TrainingObserver,
        trace_steps: tuple[int, int] | None = None,
    ) -> None:
        self.experiment = experiment
        self.folder = folder
        self.observer = observer
        self.trace_steps = trace_steps
        self.inputs = Inputs(experiment, observer)
        self.tracking_uri = tracking_uri()
        self.project_run = take_project_run()

    def begin(self, origin: Origin | None, trained_on: TrainedOn) -> SearchResult:
        _ = self.inputs.dataset, self.inputs.description  # mistakes in them leave no folder
        facts: dict[str, Any] = {"trained_on": trained_on, "from": None}
        if origin is not None:
            self.observer.note(f"Hyperparameters: {origin.description}.")
            if self._repeats(origin, trained_on):
                self.observer.note(self._what_would_differ(origin))
            facts["from"] = {"description": origin.description, **origin.facts}
            self._keep_head(origin)
            if trained_on != "train":
                facts["calibration"] = self._calibration(origin)
        return self._run(SearchRecord(), facts)

    def go_on(self) -> SearchResult:
        return self._run(read_record(self.folder, self.inputs.dataset), {})

    def _run(self, record: SearchRecord, facts: dict[str, Any]) -> SearchResult:
        _ = self.inputs.description
        trial = record.trials.get(TRIAL_ID)
        had_ended = trial is not None and trial.state in ("completed", "stopped_early")
        recorder = open_journal(
            self.folder, self.experiment, self.inputs.dataset, record, self.observer, **facts
        )
        with (
            interrupts.handled(),
            interrupts.in_order(),
            closing(self.inputs),
            closing(recorder),
            BackgroundTracking(self.tracking_uri, self.project_run, self.observer) as tracking,
        ):
            tracking.begin(self.folder)
            with self._ending_in_order(recorder, tracking):
                if not had_ended:
                    self._train(recorder)
            return self._conclude(recorder, tracking, had_ended=had_ended)

    # before the first step

    def _repeats(self, origin: Origin, trained_on: TrainedOn) -> bool:
        """Whether everything that decides the weights is as it was for the origin's trial."""
        known = origin.data_digest is not None and origin.complete
        if not known or trained_on != origin.model_of:
            return False
        theirs = one_training(origin.experiment, (), origin, where=origin.description)
        same_images = origin.data_digest == self.inputs.dataset.digest
        return same_images and _deciding(theirs) == _deciding(self.experiment)

    def _what_would_differ(self, origin: Origin) -> str:
        more = {"head": "last_stage", "last_stage": "all"}.get(self.experiment.model.train)
        network = f", --set model.train={more}" if more else ""
        other = "train" if origin.model_of == "train+validation" else "train+validation"
        return (
            f"warning: nothing differs from {origin.description}, so this trains the same model "
            "again and registers it as a new version. It would be another one with --epochs, "
            f"--on {other}{network}, or another value with --set."
        )

    def _keep_head(self, origin: Origin) -> None:
        """A copy of the head that the network begins with: the training can then go on alone."""
        head = starting_head(origin, self.inputs)
        if head is None:
            return
        folder = self.folder / "trials" / TRIAL_ID
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(head, folder / START_HEAD_FILE)

    def _calibration(self, origin: Origin) -> dict[str, Any] | None:
        """What the journal keeps of the origin's calibration."""
        if origin.class_names != self.inputs.dataset.class_names:
            return None
        found = origin.calibration()
        return None if found is None else asdict(found)

    # the training

    def _train(self, recorder: Recorder) -> None:
        """Until the trial has ended; the journal has all of it."""

        stores = self._stores(recorder)
        self._warn()
        record = recorder.record
        attempt = record.trials[TRIAL_ID].attempt + 1 if record.trials else 1
        (configuration,) = self.experiment.search.first or ({},)
        recorder.append(
            "trial_started", trial_id=TRIAL_ID, attempt=attempt, configuration=configuration
        )
        self.observer.trials_begin(record, 1)
        rules = LiveRules(self.folder, self.experiment, stores.read_labels, recorder)
        try:
            self._run_epochs(self._task(stores, recorder.record), recorder, rules)
        except TrialFailed as error:
            if not error.deterministic:
                raise
            rules.end(TRIAL_ID, error=str(error))
            end_trial(recorder, TRIAL_ID, "failed", error=str(error))
            return
        finally:
            self.observer.trials_end()
        rules.end(TRIAL_ID)
        self._tell_of_trace()
        whole = record.trials[TRIAL_ID].epochs[-1].step >= self.experiment.training.epochs
        end_trial(
            recorder,
            TRIAL_ID,
            "completed" if whole else "stopped_early",
            reason=rules.reasons.get(TRIAL_ID),
        )

    def _tell_of_trace(self) -> None:
        path = self.folder / "trials" / TRIAL_ID / TRACE_FILE
        if self.trace_steps is not None and path.is_file():
            self.observer.note(f"Trace: {path} (open it in https://ui.perfetto.dev)")
        elif self.trace_steps is not None:
            self.observer.note(
                f"warning: no trace; the training has no step {self.trace_steps[0]}, or the "
                "profiler failed."
            )

    def _stores(self, recorder: Recorder) -> Stores:
        """What is trained on, ready and in the journal."""
        stores = StoreRecorder(self.inputs, recorder)
        if not self.experiment.trains_on_images:
            computing = self.inputs.beside(self.inputs.features)
            return stores.record(*interrupts.result(computing))
        dataset = self.inputs.dataset
        if recorder.record.is_unvalidated:
            dataset = dataset.with_validation_in_train()
        decoding = self.inputs.beside(lambda: self.inputs.images(dataset))
        return stores.record(*interrupts.result(decoding))

    def _warn(self) -> None:
        """What of the settings a training alone does not show."""
        training, images = self.experiment.training, len(self.inputs.dataset.splits["train"])
        if training.batch_size > images:
            self.observer.note(
                f"warning: batch_size {training.batch_size} is more than the {images} training "
                "images: every epoch is a single step. Choose a smaller one."
            )

    def _task(self, stores: Stores, record: SearchRecord) -> TrialTask:
        folder = self.folder.resolve()
        head = folder / "trials" / TRIAL_ID / START_HEAD_FILE
        return TrialTask(
            experiment=self.experiment,
            search_folder=folder,
            threads=training_threads(self.experiment),
            features_folder=stores.features,
            images_folder=stores.images,
            cache=self.inputs.cache,
            start_heads={TRIAL_ID: head} if head.is_file() else {},
            checkpoints=True,
            trained_on=record.started["trained_on"],
            trace_steps=self.trace_steps,
        )

    def _run_epochs(self, task: TrialTask, recorder: Recorder, rules: LiveRules) -> None:
        trial = recorder.record.trials[TRIAL_ID]
        config = {"trial_id": TRIAL_ID, "configuration": trial.configuration}
        who = {"trial_id": TRIAL_ID, "attempt": trial.attempt}
        with closing(_epochs(config, task, self._on_step)) as results:
            for result in results:
                metrics = _metrics(result, unvalidated=recorder.record.is_unvalidated)
                stop = rules.stops(TRIAL_ID, result.epoch, metrics, result.findings)
                steps = {"step_losses": result.step_losses} if result.step_losses else {}
                recorder.append("epoch", **who, step=result.epoch, metrics=metrics, **steps)
                for finding in findings_of(result.notes, result.epoch):
                    recorder.append("finding", **who, **asdict(finding))
                    self.observer.note(f"{finding.severity}: {finding.evidence}.")
                rules.write_waiting(TRIAL_ID)
                if stop:
                    return

    def _on_step(self, done: StepDone) -> None:
        steps = done.steps_per_epoch
        self.observer.step(
            done.epoch, done.step - (done.epoch - 1) * steps, steps, lambda: float(done.loss)
        )

    @contextmanager
    def _ending_in_order(self, recorder: Recorder, tracking: BackgroundTracking) -> Iterator[None]:
        """Whatever ends a training, its journal and MLflow say so, and a person how to go on."""
        go_on = f"Go on with: {next_command('train', '--resume', self.folder)}"
        try:
            yield
        except KeyboardInterrupt:
            where = self._interrupt(recorder, "stopped")
            tracking.close(timeout_seconds=10, hard=True)
            raise SearchInterrupted(f"Stopped{where}; nothing is lost. {go_on}") from None
        except VisiontunerError as error:
            self._interrupt(recorder, str(error))
            if isinstance(error, UserMistake):
                raise
            raise SearchFailed(f"{error} What is done is kept. {go_on}") from None
        except Exception as error:
            self._interrupt(recorder, f"{type(error).__name__}: {error}")
            raise

    def _interrupt(self, recorder: Recorder, reason: str) -> str:
        """Close the journal of a training that can go on; where it was, for a sentence."""

        self.observer.trials_end()
        trial = recorder.record.trials.get(TRIAL_ID)
        if trial is not None and trial.state == "running":
            end_trial(recorder, TRIAL_ID, "interrupted", reason=reason)
        recorder.append("search_ended", state="interrupted", best_trial=None)
        if trial is None or trial.finished:
            return ""
        done = trial.epochs[-1].step if trial.epochs else 0
        return f" in epoch {done + 1} of {self.experiment.training.epochs}"

    # after the last epoch

    def _conclude(
        self, recorder: Recorder, tracking: BackgroundTracking, *, had_ended: bool
    ) -> SearchResult:
        record = recorder.record
        best = record.best
        recorder.append("search_ended", state="completed", best_trial=best and best.trial_id)
        if best is None:
            raise SearchFailed(f"The training failed: {record.trials[TRIAL_ID].error}")
        with self._ending_in_order(recorder, tracking):
            if not (had_ended and is_packaged(self.folder, record)):
                self._package(best, record)
        problem, model, int8 = tracking.close(), None, None
        if problem is None:
            try:
                model = tracking.register()
                int8 = register_int8(self.folder, self.experiment, self.observer)
            except TrackingError as error:
                problem = str(error)
        # Not before: until here the training could be gone on with.
        shutil.rmtree(self.folder / "trials" / TRIAL_ID / "checkpoint", ignore_errors=True)
        return SearchResult(
            folder=self.folder,
            record=record,
            state="completed",
            tracking_uri=self.tracking_uri,
            tracking_problem=problem,
            classifier=self.folder / CLASSIFIER_FOLDER,
            model=model,
            model_int8=int8,
        )

    def _package(self, trial: TrialRecord, record: SearchRecord) -> None:
        self.observer.note("Packaging it as a classifier.")
        package_trial(
            self.folder,
            trial,
            inputs=self.inputs,
            record=record,
        )
        calibration = record.started.get("calibration")
        if calibration is not None:
            threshold, abstains = read_threshold(calibration)
            recalibrate(
                self.folder / CLASSIFIER_FOLDER,
                temperature=calibration["temperature"],
                threshold=threshold,
                abstains=abstains,
                metadata={
                    "calibration": {
                        name: calibration[name] for name in ("wanted_precision", "fitted_on")
                    }
                },
            )


def _deciding(experiment: Experiment) -> dict[str, Any]:
    """What of an experiment decides the weights, besides the images."""
    unimportant = {name.removeprefix("training.") for name in CHANGEABLE}
    return {
        "training": experiment.training.model_dump(exclude=unimportant),
        "model": experiment.model,
        "seed": experiment.seed,
        "objective": experiment.objective,
    }


def _epochs(
    config: dict[str, Any], task: TrialTask, on_step: Callable[[StepDone], None]
) -> Generator[EpochResult, None, None]:
    """The epochs, on images or on features."""
    if task.images_folder is not None:
        from visiontuner.search.trial import train_network_epochs as train_network

        return train_network(config, task, on_step=on_step)
    from visiontuner.search.trial import train_head_epochs as train_head

    return train_head(config, task, on_step=on_step)


def _metrics(result: EpochResult, *, unvalidated: bool) -> dict[str, float]:
    """Without what was measured on images that were trained on."""
    return {
        name: value
        for name, value in result.metrics.to_dict().items()
        if not (unvalidated and name.startswith("validation_"))
    }
