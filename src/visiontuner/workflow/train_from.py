"""Whose hyperparameters a training takes: a search's best trial, a run's, or a model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.commands import next_command
from visiontuner.data.files import temporary_folder
from visiontuner.errors import JournalError, UserMistake, VisiontunerError
from visiontuner.experiment import SEARCHABLE, Configuration, Experiment, Training
from visiontuner.journal import FILE_NAME, SearchRecord
from visiontuner.layout import CLASSIFIER_FOLDER, EXPERIMENT_FILE
from visiontuner.locations import newest_search

if TYPE_CHECKING:
    from visiontuner.journal import TrialRecord
    from visiontuner.serving.lineage import Lineage
    from visiontuner.workflow.inputs import Inputs

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
        data_digest: of its pictures, splits included.
        complete: it ran all its epochs, and measured them on validation.
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

    def head(self) -> Path | None:
        """A trained head for a network to begin with; None if none was kept."""
        if self.folder is None or self.head_trial is None:
            return None
        from visiontuner.search.trial import HEAD_FILE

        path = self.folder / "trials" / self.head_trial / HEAD_FILE
        return path if path.is_file() else None

    def calibration(self) -> Calibration | None:
        """Temperature and threshold that the origin got from pictures it had not seen.

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
    if (folder / FILE_NAME).is_file():
        return _from_folder(folder)
    if folder.is_dir():
        raise UserMistake(f"{folder} is no search folder: it has no {FILE_NAME}.")
    if text == CHAMPION:
        text = f"{name or _newest_name()}@{CHAMPION}"
    from visiontuner.workflow.lineage import trace

    return _from_lineage(text, trace(text))


def starting_head(origin: Origin, inputs: Inputs) -> Path | None:
    """The origin's trained head, where a network can begin with it; says so, or why not."""
    head = origin.head()
    if head is None or not inputs.experiment.trains_on_pictures:
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
    checked = Experiment.parse({**resolved, "search": kept}, overrides, where=where)
    configuration: Configuration = {n: getattr(checked.training, n) for n in names}
    one = {
        **checked.search.model_dump(include={"cpus_per_trial", "gpus_per_trial"}),
        "trials": 1,
        "algorithm": "random",
        "scheduler": "none",
        "space": {name: {"values": [value]} for name, value in configuration.items()},
        "first": [configuration],
    }
    complete = {**checked.model_dump(mode="json"), "search": one}
    return Experiment.parse(complete, where=where)


def _from_folder(folder: Path) -> Origin:
    from visiontuner.search.stages import stage_of

    record = SearchRecord.load(folder)
    best = record.best
    if best is None:
        raise UserMistake(
            f"{folder} has no usable trial yet. Wait for its end, or "
            f"`{next_command('diagnose', folder)}` says what went wrong."
        )
    experiment = stage_of(Experiment.load(folder / EXPERIMENT_FILE), best).experiment
    return Origin(
        description=f"{best.trial_id} of {folder}",
        experiment=experiment.model_dump(mode="json"),
        configuration=dict(best.configuration),
        facts=_facts(record, best) | {"folder": str(folder.resolve())},
        class_names=tuple(record.started["data"]["class_names"]),
        folder=folder.resolve(),
        head_trial=best.trial_id if experiment.model.train == "head" else best.starts_from,
        data_digest=record.started["data"].get("digest"),
        complete=best.state == "completed" and not record.is_unvalidated,
    )


def _facts(record: SearchRecord, trial: TrialRecord) -> dict[str, Any]:
    return {"search_id": record.search_id, "trial_id": trial.trial_id}


def _from_lineage(text: str, lineage: Lineage) -> Origin:
    from visiontuner.search.stages import stage_named

    trial, model = lineage.trial or {}, lineage.model or {}
    if lineage.experiment is None or not trial.get("trial_id"):
        raise UserMistake(
            f"{text} says nothing about its hyperparameters: its runs are gone from MLflow, or "
            "nothing was trained there. Name a search folder, or a trial's run."
        )
    searched = Experiment.parse(lineage.experiment, where=text)
    experiment = stage_named(searched, trial.get("stage")).experiment
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
        configuration=_read_params(trial.get("configuration") or {}),
        facts=known,
        class_names=tuple((lineage.data or {}).get("class_names") or ()),
        model_id=model.get("model_id"),
        data_digest=(lineage.data or {}).get("digest"),
        # A training on validation too has no best value.
        complete=trial.get("state") == "completed" and bool(trial.get("best")),
    )


def _read_params(params: Mapping[str, str]) -> Configuration:
    """MLflow keeps text; what is no searched value was somebody else's."""
    searched = {name: value for name, value in params.items() if name in SEARCHABLE}
    training = Training.model_validate(searched)
    return {name: getattr(training, name) for name in SEARCHABLE if name in searched}


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
    from visiontuner.workflow.packaging import packaged_trial
    from visiontuner.workflow.validation import ValidationAnswers

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
    from visiontuner.model.classifier import Classifier

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
