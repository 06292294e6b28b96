"""What a search and a training have in common: journal, packaging, registration."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import visiontuner
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.data.findings import find_without_decoding
from visiontuner.diagnostics.rules import RECORDED_RULES
from visiontuner.diagnostics.rules_search import few_steps
from visiontuner.errors import ClassifierError, UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_whole
from visiontuner.journal import (
    Finding,
    JournalWriter,
    SearchRecord,
    TrialRecord,
    packaged_trial,
)
from visiontuner.model.classifier import Classifier
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EXPERIMENT_FILE,
    JOURNAL_FILE,
)
from visiontuner.search.live import Recorder
from visiontuner.search.plan import (
    NETWORK_FILE,
    kept_weights,
)
from visiontuner.text import has_secrets, next_command
from visiontuner.workflow.image_checks import novelty_finder
from visiontuner.workflow.inputs import (
    Inputs,
    Observer,
    describe_data,
    note_findings,
    require_same_data,
)

if TYPE_CHECKING:
    from visiontuner.search.run import SearchState


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
        model_int8: its int8 form there, where `package: int8` asked for it and it is good enough.
        tracking_problem: why MLflow does not hold everything; `sync` writes the rest.
    """

    folder: Path
    record: SearchRecord
    state: SearchState
    tracking_uri: str
    classifier: Path | None = None
    model: str | None = None
    model_int8: str | None = None
    tracking_problem: str | None = None

    @property
    def best(self) -> TrialRecord | None:
        """The trial or baseline that is kept."""
        return self.record.kept


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
        UserMistake: the images are not those the search began with.
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
    short = few_steps(experiment, len(dataset.splits["train"]))
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
        for finding in [*_serious_findings(dataset), *([short] if short else [])]:
            recorder.append("finding", **finding.to_dict())
    observer.note(f"Search folder: {folder}")
    _note_findings(folder, experiment, dataset, observer)
    if short:
        observer.note(f"warning: {short.evidence}. {short.advice}")
    _note_rules_without_recording(experiment, observer)
    return recorder


def _serious_findings(dataset: ImageDataset) -> list[Finding]:
    """What will spoil the result, as far as no image has to be decoded; errors first."""

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
        observer.note(f"All findings, and what to do: {next_command('prepare', *subject)}")


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


REFERENCE_IMAGES = 20


def package_trial(
    folder: Path,
    trial: TrialRecord,
    *,
    inputs: Inputs,
    record: SearchRecord,
) -> Path:
    """Package a trial or a baseline of a search as its `classifier/`, without training.

    Where it is to be refitted its refitted weights are taken, see `ValidationAnswers.refit`.

    Raises:
        ClassifierError: the trial's weights are not there or do not fit.
    """
    from visiontuner.model.package import package_classifier

    classifier = folder / CLASSIFIER_FOLDER
    experiment, dataset = inputs.experiment, inputs.dataset
    refitted = experiment.refits
    reference = _spread(dataset.splits["validation"], REFERENCE_IMAGES)
    package_classifier(
        folder=classifier,
        backbone=inputs.backbone,
        **_weights(folder, trial, refitted=refitted),
        class_names=dataset.class_names,
        dataset_root=dataset.root,
        reference_paths=[sample.path for sample in reference],
        reference_labels=[sample.label for sample in reference],
        metadata={
            "trial_id": trial.trial_id,
            "configuration": trial.configuration,
            "data_digest": dataset.digest,
            "trained_on": "train+validation" if refitted else "train",
            experiment.objective: trial.best_value,
        },
        cache=inputs.cache,
        find_novelty=novelty_finder(inputs, folder, record, trial),
    )
    return classifier


def _weights(folder: Path, trial: TrialRecord, *, refitted: bool) -> dict[str, Path]:
    """What the trial trained, under the name that `package_classifier` has for it."""

    weights = kept_weights(folder, trial.trial_id, refitted=refitted)
    if weights is None:
        raise ClassifierError(
            f"The weights of {trial.trial_id} are gone from {folder}. "
            f"`{next_command('evaluate', folder)}` trains the trial again."
        )
    return {"network_weights" if weights.name == NETWORK_FILE else "head_weights": weights}


def is_packaged(folder: Path, record: SearchRecord) -> bool:
    """Whether a trial of this search lies in `classifier/`, whole."""

    if record.named(packaged_trial(folder)) is None:
        return False
    try:
        Classifier.load(folder / CLASSIFIER_FOLDER, threads=1)
    except ClassifierError:
        return False
    return True


def _spread(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """`count` images spread evenly over a split, so that many classes are among them."""
    step = max(1, len(samples) // count)
    return samples[::step][:count]
