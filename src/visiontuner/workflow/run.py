"""What a search and a training have in common: journal, packaging, registration."""

from __future__ import annotations

import math
import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

import visiontuner
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.data.findings import find_without_decoding
from visiontuner.diagnostics.rules import RECORDED_RULES
from visiontuner.errors import ClassifierError, DataError, UserMistake
from visiontuner.evaluation.calibration import (
    ChosenThreshold,
    calibration_notes,
    choose_threshold,
    fit_temperature,
    picture_losses,
    probabilities_of,
)
from visiontuner.evaluation.choice import (
    Choice,
    choose,
    scores_of_answers,
    tied_with_best,
    training_seconds,
)
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_whole
from visiontuner.journal import (
    Finding,
    JournalWriter,
    SearchRecord,
    TrialRecord,
    packaged_trial,
    read_events,
)
from visiontuner.model.classifier import Classifier, read_threshold
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EXPERIMENT_FILE,
    JOURNAL_FILE,
    writable_cache_folder,
)
from visiontuner.search.live import Recorder
from visiontuner.search.plan import (
    LOGITS_FILE,
    NETWORK_FILE,
    SCORES_FILE,
    Stores,
    kept_weights,
    make_task,
    stage_of,
)
from visiontuner.text import has_secrets, next_command
from visiontuner.workflow.inputs import Observer, describe_data, note_findings, require_same_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from visiontuner.evaluation.choice import Preference
    from visiontuner.model.backbones import Backbone
    from visiontuner.search.run import SearchState
    from visiontuner.workflow.inputs import Inputs


# Which code on which machine: what a result can be traced back to.


PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnxruntime",
    "ray",
    "optuna",
    "mlflow",
    "numpy",
    "pillow",
)


def describe_code() -> dict[str, Any]:
    """visiontuner's version, and commit and dirty state where it runs from a git checkout."""
    source = Path(visiontuner.__file__).resolve().parent
    version = metadata.version("visiontuner") if _installed("visiontuner") else "unknown"
    commit = _git(source, "rev-parse", "HEAD")
    changed = _git(source, "status", "--porcelain", "--", str(source)) if commit else None
    return {
        "version": version,
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
    }


def describe_machine() -> dict[str, Any]:
    """Host, processor count, platform and the versions that results depend on."""
    return {
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of one git command, or None without git or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# How a search ended, and where it lies.


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


def claim_folder(folder: Path) -> Path:
    """Make a folder that nobody else has: the given one, or with -2, -3 … behind its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own, number = folder, 1
    while True:
        try:
            own.mkdir()
        except FileExistsError:
            number += 1
            own = folder.with_name(f"{folder.name}-{number}")
        else:
            return own


# Open the journal of a search folder, a new one or one that an earlier process left.


def read_record(folder: Path, dataset: ImageDataset) -> SearchRecord:
    """What an earlier process of this search left; empty for a new one.

    Raises:
        UserMistake: the pictures are not those the search began with.
    """
    if not (folder / JOURNAL_FILE).exists():
        return SearchRecord()
    record = SearchRecord.load(folder)
    if record.started:
        require_same_data(record, dataset)
    return record


def open_journal(
    folder: Path,
    experiment: Experiment,
    dataset: ImageDataset,
    record: SearchRecord,
    observer: Observer,
    **facts: Any,
) -> Recorder:
    """The folder with its experiment file, and its journal with one more line; close it at the end.

    Args:
        facts: more of what a new journal's first line says.

    Raises:
        UserMistake: the folder cannot be written.
        JournalError: another process is writing this journal.
    """

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / EXPERIMENT_FILE).exists():
            write_experiment(folder, experiment)
    except OSError as error:
        raise UserMistake(
            f"Cannot write the search folder {folder}: {error.strerror}. "
            "Name another one with --output."
        ) from None
    journal = JournalWriter(folder, record.search_id or uuid.uuid4().hex)
    recorder = Recorder(journal, record, [observer.event])
    described = {
        "code": describe_code(),
        "machine": describe_machine(),
    }
    if record.started:
        recorder.append("search_resumed", **described)
    else:
        recorder.append(
            "search_started",
            name=folder.resolve().name,
            experiment=experiment.model_dump(mode="json"),
            data=describe_data(experiment, dataset),
            **described,
            **facts,
        )
        for finding in _serious_findings(dataset):
            recorder.append("finding", **finding.to_dict())
    observer.note(f"Search folder: {folder}")
    _note_findings(folder, experiment, dataset, observer)
    _note_rules_without_recording(experiment, observer)
    return recorder


def _serious_findings(dataset: ImageDataset) -> list[Finding]:
    """What will spoil the result, as far as no picture has to be decoded; errors first."""

    found = [*dataset.findings, *find_without_decoding(dataset)]
    serious = [finding for finding in found if finding.severity != "info"]
    return sorted(serious, key=lambda finding: finding.severity != "error")


def _note_findings(
    folder: Path, experiment: Experiment, dataset: ImageDataset, observer: Observer
) -> None:
    found = _serious_findings(dataset)
    note_findings(observer, found)
    if found:
        source = experiment.data.source
        subject = ("--data", source)
        if has_secrets(source):
            subject = ("--experiment", str(folder / EXPERIMENT_FILE))
        observer.note(f"All of it, and what to do: {next_command('prepare', *subject)}")


def _note_rules_without_recording(experiment: Experiment, observer: Observer) -> None:
    """Which rules are to stop trials and will have nothing to look at."""

    blind = [rule for rule in experiment.rules.stop_on if rule in RECORDED_RULES]
    if blind and not experiment.record_every_steps:
        observer.note(
            f"warning: rules.stop_on: {', '.join(blind)} will stop no trial, since nothing is "
            "recorded; set training.record_every_steps, 50 for example."
        )


def write_experiment(folder: Path, experiment: Experiment) -> None:
    """The experiment file of a search folder, with every secret that its data's address needs.

    It is its owner's alone then: a search is resumed from it.

    Raises:
        OSError: the folder cannot be written.
    """
    private = has_secrets(experiment.model_dump(mode="json"))
    content = experiment.to_yaml().encode()
    write_whole(folder / EXPERIMENT_FILE, lambda file: file.write(content), private=private)


# A trial of a search -> the classifier in its folder.


REFERENCE_PICTURES = 20


def package_trial(
    folder: Path,
    trial: TrialRecord,
    *,
    experiment: Experiment,
    dataset: ImageDataset,
    backbone: Backbone,
    cache: Path,
) -> Path:
    """Package a trial of a search as its `classifier/`, without training.

    Raises:
        ClassifierError: the trial's weights are not there or do not fit.
    """
    from visiontuner.model.package import package_classifier

    classifier = folder / CLASSIFIER_FOLDER
    reference = _spread(dataset.splits["validation"], REFERENCE_PICTURES)
    package_classifier(
        folder=classifier,
        backbone=backbone,
        **_weights(folder, trial),
        class_names=dataset.class_names,
        dataset_root=dataset.root,
        reference_paths=[sample.path for sample in reference],
        reference_labels=[sample.label for sample in reference],
        metadata={
            "trial_id": trial.trial_id,
            "configuration": trial.configuration,
            "data_digest": dataset.digest,
            experiment.objective: trial.best_value,
        },
        cache=cache,
    )
    return classifier


def _weights(folder: Path, trial: TrialRecord) -> dict[str, Path]:
    """What the trial trained, under the name that `package_classifier` has for it."""

    weights = kept_weights(folder, trial.trial_id)
    if weights is None:
        raise ClassifierError(
            f"The weights of {trial.trial_id} are gone from {folder}. "
            f"`{next_command('evaluate', folder)}` trains the trial again."
        )
    return {"network_weights" if weights.name == NETWORK_FILE else "head_weights": weights}


def is_packaged(folder: Path, record: SearchRecord) -> bool:
    """Whether a trial of this search lies in `classifier/`, whole."""

    if packaged_trial(folder) not in record.trials:
        return False
    try:
        Classifier.load(folder / CLASSIFIER_FOLDER, threads=1)
    except ClassifierError:
        return False
    return True


def _spread(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """`count` pictures spread evenly over a split, so that many classes are among them."""
    step = max(1, len(samples) // count)
    return samples[::step][:count]


# What a search keeps of its trials' validation answers: which trial, temperature and threshold.


_LOSS_TOLERANCE = 1e-3  # nats
_NAMED = 6


class PictureScores(NamedTuple):
    """Of each validation picture: whether the answer is right, and its loss in nats, both (N,)."""

    correct: NDArray[np.bool_]
    log_loss: NDArray[np.floating]


class ValidationAnswers:
    """The validation logits of a search's trials and the labels that belong to them.

    Args:
        inputs: the search's pictures, from which comes what is gone from the cache.
    """

    def __init__(
        self,
        folder: Path,
        record: SearchRecord,
        experiment: Experiment,
        *,
        inputs: Inputs | None = None,
    ) -> None:
        self.folder = folder
        self.record = record
        self.experiment = experiment
        self.inputs = inputs

    @cached_property
    def stores(self) -> Stores:
        """What the trials were trained on, as the journal says."""

        return Stores.of(read_events(self.folder).events)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 (N,), of the validation pictures in the order of the kept logits.

        Raises:
            DataError: neither the features nor the decoded pictures are there, nor the pictures.
        """
        try:
            return self.stores.read_labels().labels
        except DataError:
            if self.inputs is not None:
                return self._labels_of_pictures(self.inputs)
            raise self._gone() from None

    def _gone(self) -> DataError:
        where = self.stores.features or self.stores.pictures
        return DataError(
            f"What this search was trained on is gone from {where}. Any search on the same "
            "pictures and backbone computes it again."
        )

    def _labels_of_pictures(self, inputs: Inputs) -> NDArray[np.int64]:
        """Of the pictures that can be read: those that trials were measured on."""

        samples = inputs.dataset.splits["validation"]
        best = self.record.ranking()[0].trial_id
        kept = self._read_scores(best)
        if len(samples) != len(self._read_logits(best) if kept is None else kept.correct):
            samples = tuple(inputs.readable("validation"))
        return np.array([sample.label for sample in samples], dtype=np.int64)

    def logits(self, trial_id: str) -> NDArray[np.float64]:
        """float64, shape (N, num_classes): of the trial's best epoch, before any temperature.

        Raises:
            DataError: they are gone, damaged or of other pictures.
        """

        logits = self._read_logits(trial_id)
        path = self._file(trial_id, LOGITS_FILE)
        if len(logits) != len(self.labels):
            raise DataError(f"{path} is about other pictures than the search's. Search again.")
        kept = self._read_scores(trial_id)
        if kept is not None and not np.array_equal(logits.argmax(axis=1) == self.labels, kept[0]):
            raise DataError(f"{path} is damaged: its answers are not those that were scored.")
        return logits

    def scores(self, trial_id: str) -> PictureScores:
        """Of the trial's best epoch; every trial keeps them, of earlier versions its logits.

        Raises:
            DataError: they are gone, damaged or of other pictures.
        """

        kept = self._read_scores(trial_id)
        if kept is None:
            logits = self.logits(trial_id)
            return PictureScores(
                logits.argmax(axis=1) == self.labels, picture_losses(logits, self.labels)
            )
        if len(kept.correct) != len(self.labels):
            path = self._file(trial_id, SCORES_FILE)
            raise DataError(f"{path} is about other pictures than the search's. Search again.")
        return kept

    def _file(self, trial_id: str, name: str) -> Path:
        return self.folder / "trials" / trial_id / name

    def _read_scores(self, trial_id: str) -> PictureScores | None:
        """None where there are none that can be read; what zip's own checksums belie cannot."""

        try:
            with np.load(self._file(trial_id, SCORES_FILE), allow_pickle=False) as file:
                return PictureScores(file["correct"].astype(bool), file["log_loss"])
        except (OSError, ValueError, LookupError, EOFError, BadZipFile):
            return None

    def _read_logits(self, trial_id: str) -> NDArray[np.float64]:
        path = self._file(trial_id, LOGITS_FILE)
        try:
            logits: NDArray[np.float64] = np.load(path, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"Cannot read {path} ({type(error).__name__}). Search again.") from None
        return logits

    def choose(self, prefer: Preference) -> Choice:
        """The trial to keep, and those that cannot be told apart from the best.

        Of a training on validation too it is the only one.
        """

        ids = [trial.trial_id for trial in self.record.ranking()]
        if self.record.is_unvalidated:
            reason = f"{ids[0]} was trained on the validation pictures too: there is no choice."
            return Choice(best=ids[0], tied=(ids[0],), chosen=ids[0], reason=reason)
        scores = self._scores(ids)
        tied = tied_with_best(scores, ids[0])
        ready = {trial_id for trial_id in tied if self._is_quick_to_package(trial_id)}
        seconds = training_seconds(self.record)
        choice = choose(
            ids[0],
            tied,
            prefer=prefer,
            seconds={trial_id: s for trial_id, s in seconds.items() if trial_id in ready},
        )
        said = [choice.reason]
        if prefer == "cheapest" and len(ready) < len(tied):
            said.append(f"Only the {len(ready)} whose networks were kept can be taken.")
        if missing := [trial_id for trial_id in ids if trial_id not in scores]:
            named = ", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
            said.append(f"Not compared, since their validation answers are gone: {named}.")
        return replace(choice, reason=" ".join(said))

    def _scores(self, trial_ids: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Of each trial whose answers are there; the best one's, which is the first, must be."""

        scores = {}
        for trial_id in trial_ids:
            try:
                kept = self.scores(trial_id)
            except DataError:
                if trial_id == trial_ids[0]:
                    raise
                continue
            scores[trial_id] = scores_of_answers(*kept, self.labels, self.experiment.objective)
        return scores

    def _is_quick_to_package(self, trial_id: str) -> bool:
        """Whether its weights are there, or a matter of seconds."""

        if kept_weights(self.folder, trial_id) is not None:
            return True
        return not stage_of(self.experiment, self.record.trials[trial_id]).on_pictures

    def restore(self, trial: TrialRecord) -> str | None:
        """A search keeps weights and logits of its five best; another trial is trained again.

        So is one of which either is damaged.

        For a head that takes seconds, for a network as long as the trial did.

        Returns:
            What was done, or None if both were there.
        """

        why = self._why_to_train_again(trial.trial_id)
        if why is None:
            return None
        kept = self.scores(trial.trial_id)
        self._train_again(trial)
        again = self.scores(trial.trial_id)
        difference = float(np.abs(again.log_loss - kept.log_loss).max())
        said = f"Trained {trial.trial_id} again: {why}."
        if difference <= _LOSS_TOLERANCE:
            return said
        return (
            f"{said} warning: a picture's validation loss differs by {difference:.2g} nats from "
            "the search's: another machine or number of threads."
        )

    def _why_to_train_again(self, trial_id: str) -> str | None:
        from visiontuner.model.network import read_tensors

        weights = kept_weights(self.folder, trial_id)
        if weights is None:
            return "its weights were not among those kept"
        try:
            read_tensors(weights)
        except ClassifierError:
            return "its weights were damaged"
        if self.has_logits(trial_id):
            return None
        return "its validation logits were gone or damaged"

    def has_logits(self, trial_id: str) -> bool:
        """Whether a trial's logits are there and those that were scored, if it keeps any."""
        if self.record.is_unvalidated:
            return True
        try:
            self.logits(trial_id)
        except DataError:
            return False
        return True

    def _train_again(self, trial: TrialRecord) -> None:
        from visiontuner.search.trial import train_again

        stage = stage_of(self.experiment, trial)
        starts = {}
        if trial.starts_from is not None:
            starts[trial.trial_id] = trial.starts_from
            self.restore(self.record.trials[trial.starts_from])
        task = make_task(
            self.folder,
            stage,
            stores=self._stores_to_train_on(on_pictures=stage.on_pictures),
            cache=writable_cache_folder(),
            threads=int(self.experiment.search.cpus_per_trial) or 1,
            starts=starts,
        )
        config = {"trial_id": trial.trial_id, "configuration": trial.configuration}
        train_again(config, task, best_epoch=trial.best_epoch or 1)

    def _stores_to_train_on(self, *, on_pictures: bool) -> Stores:
        """Those of the search; computed again if they are gone from the cache."""

        known = self.stores
        found = Stores(None, known.pictures) if on_pictures else Stores(known.features, None)
        if any(found) and found.are_verified:
            return found
        if self.inputs is None:
            raise self._gone()
        store, _ = self.inputs.store(on_pictures=on_pictures)
        if on_pictures:
            return Stores(features=None, pictures=store.folder)
        return Stores(features=store.folder, pictures=None)

    def calibrate(
        self, trial_id: str, precision: float
    ) -> tuple[float, ChosenThreshold | None, list[str]]:
        """Temperature, the threshold for a wanted precision, and what must be said of them.

        A training on validation too has those of the trial that it took its values from, or none.
        """
        if self.record.is_unvalidated:
            return self._calibration_taken_over()

        logits = self.logits(trial_id)
        temperature = fit_temperature(logits, self.labels)
        probabilities = probabilities_of(logits, temperature)
        threshold = choose_threshold(probabilities, self.labels, precision)
        return temperature, threshold, calibration_notes(logits, self.labels, temperature)

    def _calibration_taken_over(self) -> tuple[float, ChosenThreshold | None, list[str]]:
        seen = "The validation pictures were trained on, so nothing was fitted on them"
        taken = self.record.started.get("calibration")
        if taken is None:
            return 1.0, None, [f"{seen}: there is no temperature and no threshold."]
        value, abstains = read_threshold(taken)
        threshold = ChosenThreshold(
            wanted_precision=taken["wanted_precision"],
            value=value,
            precision=math.nan,
            coverage=math.nan,
        )
        return (
            taken["temperature"],
            None if value is None and not abstains else threshold,
            [f"{seen}: temperature and threshold are those of {taken['fitted_on']}."],
        )
