"""What a search will run: its stages, its trials, what a worker is handed; without Ray or torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import (
    DecodedImages,
    FeatureSet,
    array_path,
    find_damage,
    has_checksums,
)
from visiontuner.data.folds import folds_for
from visiontuner.errors import DataError
from visiontuner.experiment.schema import Configuration, Experiment, Stages, Training
from visiontuner.journal import Event, SearchRecord, StageName, TrialRecord
from visiontuner.search.space import WarmStart, clean, draw_beforehand, leading


def settle(experiment: Experiment, *, images: int, own_validation: bool) -> Experiment:
    """The experiment with what `auto` means for its data, as the search folder keeps it.

    Args:
        images: of training and validation.
        own_validation: whether the user says which images are for validation.
    """
    data, search = experiment.data, experiment.search
    if data.validation == "auto":
        folds = data.folds or folds_for(images)
        takes = experiment.refits and not own_validation and folds is not None
        changes = {"validation": "folds", "folds": folds} if takes else {"validation": "holdout"}
        data = data.model_copy(update=changes)
    elif data.validation == "folds" and data.folds is None:
        data = data.model_copy(update={"folds": folds_for(images) or 5})
    if search.scheduler == "auto":  # heads take seconds, and ASHA judges them by luck
        networks = experiment.trains_on_images and search.stages is None
        scheduler = "asha" if networks else "none"
        search = search.model_copy(update={"scheduler": scheduler})
    return experiment.model_copy(update={"data": data, "search": search})


# The labels of the validation images, from whatever the trials of a search were trained on.


class ValidationLabels(NamedTuple):
    """Labels int64 (N,), in the order of the trials' logits, and the class names."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def read_labels(
    *,
    features: Path | None = None,
    images: Path | None = None,
    splits: Sequence[str] = ("validation",),
) -> ValidationLabels:
    """From the first store that is named and still there; both hold the same images in order.

    They are verified first, but in a store of an earlier version, which has nothing to do it by.

    Raises:
        DataError: none is there and as it was written.
    """
    if features is not None:
        try:
            return _read_labels(FeatureSet.open(features), splits)
        except DataError:
            if images is None:
                raise
    if images is None:
        raise DataError("The journal says nothing of what its trials were trained on.")
    return _read_labels(DecodedImages.open(images), splits)


def _read_labels(store: FeatureSet | DecodedImages, splits: Sequence[str]) -> ValidationLabels:
    folder = store.folder
    if has_checksums(folder):
        damage = find_damage(folder, [array_path(folder, name, "labels").name for name in splits])
        if damage is not None:
            raise DataError(f"The labels in {folder} {damage}. Search again to write them anew.")
    labels = np.concatenate([store.split(name).labels for name in splits])
    return ValidationLabels(labels, store.class_names)


class Stores(NamedTuple):
    """Where the features and the images of a search lie, as far as it has them."""

    features: Path | None
    images: Path | None

    @classmethod
    def of(cls, events: Iterable[Event], backbone: str | None = None) -> Stores:
        """As a search's journal names them last.

        Args:
            backbone: of this network, where several are searched.
        """
        found: dict[str, Path] = {}
        for event in events:
            if backbone is not None and event.get("backbone") != backbone:
                continue
            if event["event"] in ("features_ready", "images_ready") and event.get("folder"):
                found[event["event"]] = Path(str(event["folder"]))
        return cls(found.get("features_ready"), found.get("images_ready"))

    @property
    def are_verified(self) -> bool:
        """Whether all that is named is there and as it was written; this reads all of it."""
        return all(find_damage(folder) is None for folder in self if folder is not None)

    def read_labels(self, *, folds: bool = False) -> ValidationLabels:
        """Of the images that trials are judged by: of folds those of training come first."""
        splits = ("train", "validation") if folds else ("validation",)
        return read_labels(features=self.features, images=self.images, splits=splits)


# ASHA rung epochs, shared by the scheduler and the workers.


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Asynchronous successive halving (Li et al. 2018): of its trials, one in three goes on.

    With 20 epochs, trials are compared after 2, 6 and 18.

    Args:
        first: epochs before a trial may be stopped.
        last: epochs of the longest trial.
    """

    first: int
    last: int
    factor: int = 3

    @classmethod
    def of(cls, experiment: Experiment) -> Rungs | None:
        """Those of a search; None where every trial runs to its end."""
        if experiment.search.scheduler != "asha":
            return None
        domain = experiment.search.space.get("epochs")
        values = getattr(domain, "values", None) or (getattr(domain, "high", None),)
        epochs = int(max(values)) if domain is not None else experiment.training.epochs
        return cls(first=max(1, epochs // 9), last=epochs)

    def __contains__(self, epoch: int) -> bool:
        rung = self.first
        while rung < epoch:
            rung *= self.factor
        return rung == epoch <= self.last


# What one Ray worker is handed. Without torch: the driver need not wait for its import.


HEAD_FILE = "head.safetensors"
NETWORK_FILE = "network.safetensors"
LOGITS_FILE = "validation_logits.npy"
SCORES_FILE = "validation_scores.npz"
REFIT_FILE = "refit.safetensors"
PATH_SCORES_FILE = "path_scores.npz"
FOLDS_FILE = "folds.npy"
CHECKPOINT_FOLDER = "checkpoint"

TrainedOn = Literal["train", "train+validation"]


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What all trials share; paths are absolute, since workers run in folders of their own.

    Args:
        features_folder: what heads are trained on.
        threads: of one trial's arithmetic.
        images_folder: a `DecodedImages`; if it is given, trials run the network on it.
        cache: where the network's weights are kept; needed with images.
        start_heads: by trial id the trained head (safetensors) that a network begins with.
        checkpoints: keep the whole state of a running training in `trials/ID/checkpoint` after
            every epoch, and go on from there. Whoever runs the trial removes it at the end.
        trained_on: with `train+validation` no image is left to choose an epoch by: the last one's
            weights are kept, and no logits. `images_folder` then holds all of them as `train`.
        trace_steps: the first and the last step of which a profiler's trace is written.
        driver: the node that these paths are on, in a cluster of several machines.
        folds: int64, (N,), of the training and then the validation images: heads are judged by
            cross-validation, each image by the head that did not learn from its fold.
        only_epoch: write the files of this epoch, whatever it is.
        features_of: by network the features that heads are trained on, where several networks are
            searched; `features_folder` is then the one of the trial's network, see `for_trial`.
    """

    experiment: Experiment
    search_folder: Path
    threads: int
    features_folder: Path | None = None
    images_folder: Path | None = None
    cache: Path | None = None
    start_heads: Mapping[str, Path] = field(default_factory=dict)
    checkpoints: bool = False
    trained_on: TrainedOn = "train"
    trace_steps: tuple[int, int] | None = None
    driver: DriverNode | None = None
    folds: NDArray[np.int64] | None = None
    only_epoch: int | None = None
    features_of: Mapping[str, Path] = field(default_factory=dict)

    def for_trial(self, configuration: Mapping[str, Any]) -> TrialTask:
        """The task of a trial's own network, where several are searched."""
        name = configuration.get("backbone")
        if name is None:
            return self
        experiment = self.experiment.for_configuration(configuration)
        folder = self.features_of.get(str(name), self.features_folder)
        return replace(self, experiment=experiment, features_folder=folder, features_of={})

    def keeps(self, epoch: int, *, is_kept: bool, is_last: bool) -> bool:
        """Whether an epoch's files replace those of the epochs before it.

        Where the last epoch is kept, earlier ones are written if the trial may end with them.
        """
        if self.only_epoch is not None:
            return epoch == self.only_epoch
        if self.trained_on != "train":
            return True
        ends = is_last or may_be_stopped(self.experiment, epoch)
        return is_kept and (ends or not self.experiment.training.keeps_last)

    def trial_folder(self, trial_id: str) -> Path:
        """Where the files of a trial's best epoch lie."""
        return self.search_folder / "trials" / trial_id


def may_be_stopped(experiment: Experiment, epoch: int) -> bool:
    """Whether the driver may end a trial with this epoch: nothing is then written afterwards."""
    rungs = Rungs.of(experiment)
    return bool(experiment.rules.stop_on) or (rungs is not None and epoch in rungs)


def settings_of(training: Training, configuration: Mapping[str, Any]) -> Training:
    """The experiment's training settings with a trial's own values in place."""
    own = {name: value for name, value in configuration.items() if name != "backbone"}
    return Training.model_validate({**training.model_dump(), **own})


# Which configurations are still to run: from the experiment and what the journal already holds.


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A configuration with its place in the journal; `attempt` counts from 1.

    In a search with two stages it has its stage, and in the second the trial it starts from.
    """

    trial_id: str
    attempt: int
    configuration: Configuration
    stage: StageName | None = None
    starts_from: str | None = None

    def to_config(self) -> dict[str, Any]:
        """What Ray hands to the worker and back to the callbacks."""
        staged = {"stage": self.stage, "starts_from": self.starts_from}
        return {
            "trial_id": self.trial_id,
            "attempt": self.attempt,
            "configuration": dict(self.configuration),
            **{name: value for name, value in staged.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Trials that are known already, and how many more Optuna may suggest."""

    known: tuple[PlannedTrial, ...]
    suggestions: int
    next_number: int
    stage: StageName | None = None

    @property
    def remaining(self) -> int:
        return len(self.known) + self.suggestions


def make_plan(
    experiment: Experiment, record: SearchRecord, *, stage: StageName | None = None
) -> Plan:
    """Everything that has not finished: begun and interrupted trials first, then the rest.

    A trial that begins again keeps its id and gets the next attempt. With a random or grid search
    the list is the one of an uninterrupted search, less what is finished.
    """
    begun = [
        PlannedTrial(
            trial_id=trial.trial_id,
            attempt=trial.attempt + 1,
            configuration=clean(trial.configuration, experiment.search.space),
            stage=stage,
        )
        for trial in record.trials.values()
        if not trial.finished
    ]
    listed: list[tuple[int, Configuration]]
    if races_networks(experiment):
        listed = []  # which network is next follows from the trials before: `NetworkRace`
        total = experiment.search.trials
    elif experiment.search.algorithm == "optuna":
        first = leading(experiment, WarmStart.of(record))
        listed = list(enumerate(first[: experiment.search.trials], start=1))
        total = experiment.search.trials
    else:
        listed = list(enumerate(draw_beforehand(experiment, WarmStart.of(record)), start=1))
        total = len(listed)
    unstarted = [
        PlannedTrial(
            trial_id=trial_name(number), attempt=1, configuration=configuration, stage=stage
        )
        for number, configuration in listed
        if trial_name(number) not in record.trials
    ]
    known = (*begun, *unstarted)
    finished = len(record.trials) - len(begun)
    names = [*record.trials, *(planned.trial_id for planned in known)]
    return Plan(
        known=known,
        suggestions=max(0, total - finished - len(known)),
        next_number=highest_number(names) + 1,
        stage=stage,
    )


def races_networks(experiment: Experiment) -> bool:
    """Whether the trials before decide which network the next trial is of; a grid is run whole."""
    return bool(experiment.search.backbones) and experiment.search.algorithm != "grid"


def trial_name(number: int) -> str:
    """1 -> `t0001`."""
    return f"t{number:04d}"


def highest_number(trial_ids: Iterable[str]) -> int:
    """`t0001`, `t0012` -> 12; 0 for none."""
    return max((int(trial_id[1:]) for trial_id in trial_ids), default=0)


# The stages of a search: one, or heads on features first and the best of them as networks then.
#
# Both stages share one journal and one row of trial ids. What the second one runs follows from the
# first one's trials alone, so that a search that is resumed goes on with the same list.


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a search.

    Args:
        name: None where there is only one.
        experiment: what its trials run.
        search: the experiment of the whole search.
    """

    name: StageName | None
    experiment: Experiment
    search: Experiment

    @property
    def on_images(self) -> bool:
        """Whether its trials run the network; otherwise they train heads on features."""
        return self.experiment.trains_on_images


def stages_of(experiment: Experiment) -> tuple[Stage, ...]:
    """The stages of a search in their order."""
    if experiment.search.stages is None:
        return (Stage(name=None, experiment=experiment, search=experiment),)
    return (
        Stage(name="head", experiment=experiment.head_stage(), search=experiment),
        Stage(name="network", experiment=experiment.network_stage(), search=experiment),
    )


def stage_of(experiment: Experiment, trial: TrialRecord) -> Stage:
    """The stage that a trial or a baseline belongs to, with its own network."""
    stage = stage_named(experiment, trial.stage)
    own = stage.experiment.for_configuration(trial.configuration)
    return replace(stage, experiment=own)


def stage_named(experiment: Experiment, name: str | None) -> Stage:
    """The stage of a search that a trial says it is of; the first if it says nothing."""
    stages = stages_of(experiment)
    return next((stage for stage in stages if stage.name == name), stages[0])


def plan_stage(stage: Stage, record: SearchRecord) -> Plan:
    """What of a stage has not finished; the second one is known when the first one has ended."""
    if stage.name == "network":
        return _plan_networks(stage.search, record)
    return make_plan(stage.experiment, record.searching(), stage=stage.name)


def remaining_trials(experiment: Experiment, record: SearchRecord) -> int:
    """How many trials are still to run, all stages together.

    As long as the first of two stages runs, the second one counts with the most that it may have.
    """
    stages = stages_of(experiment)
    first = plan_stage(stages[0], record).remaining
    if len(stages) == 1:
        return first
    if first:
        return first + _settings(experiment).best + len(experiment.first_trials())
    return plan_stage(stages[1], record).remaining


def make_task(
    folder: Path,
    stage: Stage,
    *,
    stores: Stores,
    cache: Path,
    threads: int,
    starts: Mapping[str, str] | None = None,
    checkpoints: bool = False,
    features_of: Mapping[str, Path] | None = None,
) -> TrialTask:
    """What the trials of a stage are handed.

    Args:
        features_of: by network, where several are searched.
        starts: by trial id the trial of the first stage whose head it begins with.
    """
    search_folder = folder.resolve()
    images = stores.images if stage.on_images else None
    features = None if stage.on_images else stores.features
    return TrialTask(
        experiment=stage.experiment,
        search_folder=search_folder,
        threads=threads,
        features_folder=features and features.resolve(),
        images_folder=images and images.resolve(),
        cache=cache.resolve(),
        start_heads={
            trial_id: search_folder / "trials" / head / HEAD_FILE
            for trial_id, head in (starts or {}).items()
        },
        checkpoints=checkpoints,
        folds=None if stage.on_images else read_folds(folder),
        features_of={name: path.resolve() for name, path in (features_of or {}).items()},
    )


def read_folds(folder: Path) -> NDArray[np.int64] | None:
    """The fold of each training and then each validation image of a search; None for a hold-out.

    Raises:
        DataError: they are damaged.
    """
    try:
        folds: NDArray[np.int64] = np.load(folder / FOLDS_FILE, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"Cannot read {folder / FOLDS_FILE} ({type(error).__name__}). Search again."
        ) from None
    return folds


def starting_heads(experiment: Experiment, record: SearchRecord) -> list[TrialRecord]:
    """The head trials that the second stage goes on with: the best, then those of `first`."""
    if experiment.search.stages is None:
        return []
    heads = [trial for trial in record.ranking() if trial.stage == "head"]
    space = experiment.search.space
    first = [clean(c, space) for c in experiment.first_trials()]
    best = heads[: _settings(experiment).best]
    return [*best, *(t for t in heads if t not in best and t.configuration in first)]


def _plan_networks(experiment: Experiment, record: SearchRecord) -> Plan:
    heads = starting_heads(experiment, record)
    offset = highest_number(record.searching().trials)
    planned = [
        PlannedTrial(
            trial_id=trial_name(offset + position),
            attempt=_attempts(record, trial_name(offset + position)) + 1,
            configuration=_network_configuration(experiment, head.configuration),
            stage="network",
            starts_from=head.trial_id,
        )
        for position, head in enumerate(heads, start=1)
    ]
    waiting = [p for p in planned if not _is_finished(record, p.trial_id)]
    begun = [p for p in waiting if p.attempt > 1]
    return Plan(
        known=(*begun, *(p for p in waiting if p.attempt == 1)),
        suggestions=0,
        next_number=offset + len(heads) + 1,
        stage="network",
    )


def _network_configuration(experiment: Experiment, head: Configuration) -> Configuration:
    """The head's values; epochs and, if it has one, the learning rate are the stage's own."""
    stages = _settings(experiment)
    configuration = dict(head)
    if "epochs" in configuration:
        configuration["epochs"] = stages.epochs
    if stages.learning_rate is not None:
        configuration["learning_rate"] = stages.learning_rate
    return configuration


def _settings(experiment: Experiment) -> Stages:
    return experiment.search.stages or Stages()


def _attempts(record: SearchRecord, trial_id: str) -> int:
    return record.trials[trial_id].attempt if trial_id in record.trials else 0


def _is_finished(record: SearchRecord, trial_id: str) -> bool:
    return trial_id in record.trials and record.trials[trial_id].finished


# Which trials' weights and logits stay on the disk: those of the best, and of what still runs.


WEIGHTS_KEPT = 5


class WeightsOnDisk:
    """Takes the weights of ended trials off the disk that are not among the best of their stage.

    Their validation logits go with them, where the scores are there that every trial keeps.
    A running or interrupted trial keeps its own, so that there are never more than `keep` and those
    of the running ones; in the first of two stages also the heads that the second begins with.
    """

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        record: SearchRecord,
        *,
        keep: int = WEIGHTS_KEPT,
    ) -> None:
        self._folder = folder
        self._experiment = experiment
        self._record = record
        self._keep = keep
        self._removed: set[str] = set()  # many trials end: each is looked at once

    def prune(self) -> None:
        """To be called when a trial has ended, and before the first one begins."""
        kept = self._kept()
        for trial in self._record.trials.values():
            if not trial.finished or trial.trial_id in self._removed:
                continue
            folder = self._folder / "trials" / trial.trial_id
            shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)
            for half_written in folder.glob(".*.part"):  # by a worker that was killed
                half_written.unlink(missing_ok=True)
            if trial.trial_id not in kept:
                scored = (folder / SCORES_FILE).is_file()  # not by an earlier version
                for name in (HEAD_FILE, NETWORK_FILE, *([LOGITS_FILE] if scored else [])):
                    (folder / name).unlink(missing_ok=True)
                self._removed.add(trial.trial_id)

    def _kept(self) -> set[str]:
        kept = {trial.trial_id for trial in starting_heads(self._experiment, self._record)}
        ranking = self._record.ranking()
        for stage in {trial.stage for trial in ranking}:
            of_stage = [trial.trial_id for trial in ranking if trial.stage == stage]
            kept |= set(of_stage[: self._keep])
        return kept


def kept_weights(folder: Path, trial_id: str, *, refitted: bool = False) -> Path | None:
    """The head or the network of a trial's kept epoch, if it is among those on the disk.

    Args:
        refitted: the head that was trained on train and validation instead.
    """
    for name in (REFIT_FILE,) if refitted else (NETWORK_FILE, HEAD_FILE):
        path = folder / "trials" / trial_id / name
        if path.is_file():
            return path
    return None


@dataclass(frozen=True, kw_only=True)
class DriverNode:
    """The driver's machine: where it is in the cluster, and who reads and writes files there.

    Args:
        search: another text for every run of a search.
    """

    node_id: str
    files: Any  # handle of the actor `_Files`
    search: str

    @property
    def is_here(self) -> bool:
        import ray

        return ray.get_runtime_context().get_node_id() == self.node_id
