"""What a search keeps: baselines beside its trials, their validation answers, the choice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from visiontuner.data.arrays import FeatureSet
from visiontuner.data.dataset import Sample, find_units
from visiontuner.data.folds import assign_folds
from visiontuner.errors import ClassifierError, DataError, UserMistake
from visiontuner.evaluation.baselines import (
    NEIGHBOURS,
    REGRESSION,
    Baseline,
    is_affordable,
    logistic_regression,
    nearest_neighbours,
)
from visiontuner.evaluation.calibration import (
    ChosenThreshold,
    calibration_notes,
    choose_threshold,
    fit_temperature,
    image_losses,
    probabilities_of,
)
from visiontuner.evaluation.choice import (
    Candidate,
    Choice,
    Preference,
    Told,
    choose,
    describe_gain,
    estimate_accuracy,
    training_seconds,
)
from visiontuner.evaluation.intervals import Interval
from visiontuner.evaluation.scores import macro_f1
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_whole
from visiontuner.journal import (
    SearchRecord,
    TrialRecord,
    read_events,
)
from visiontuner.model.classifier import read_threshold
from visiontuner.paths import (
    writable_cache_folder,
)
from visiontuner.search.live import Recorder
from visiontuner.search.plan import (
    FOLDS_FILE,
    HEAD_FILE,
    LOGITS_FILE,
    PATH_SCORES_FILE,
    REFIT_FILE,
    SCORES_FILE,
    Stores,
    TrainedOn,
    TrialTask,
    kept_weights,
    make_task,
    read_folds,
    stage_of,
)
from visiontuner.workflow.inputs import Inputs

# Baselines beside the trials of a search: judged by the same images, and kept like a trial.


Kept = tuple[Baseline, dict[str, float]]
"""A baseline and its metrics."""


def baseline_store(folder: Path, record: SearchRecord) -> Path:
    """The features that baselines are made of: beside several networks, the best trial's."""
    best = record.best
    backbone = None if best is None else best.configuration.get("backbone")
    return Stores.of(read_events(folder).events, backbone).features or folder


def compute_baselines(
    inputs: Inputs, folder: Path, store: Path, *, known: Container[str] = ()
) -> list[Kept]:
    """Compute the baselines that a search does not know yet, and write their files.

    Args:
        store: of the features.

    Raises:
        DataError: the features are gone or damaged.
    """
    features = FeatureSet.open(store)
    images = sum(len(features.split(name).labels) for name in ("train", "validation"))
    if not is_affordable(images, features.feature_dim, len(features.class_names)):
        inputs.observer.note(f"No baselines: {images:,} images would take them minutes.")
        return []
    found = []
    for name in (REGRESSION, NEIGHBOURS):
        if name not in known:
            made = make_baseline(
                name,
                folder,
                store,
                refitted=inputs.experiment.refits,
                between_fits=inputs.require_going_on,
            )
            found.append(made)
    return found


def record_baselines(found: Sequence[Kept], recorder: Recorder) -> None:
    """Write them to the journal, with the network that they are on beside several."""
    best = recorder.record.best
    own = {} if best is None else best.configuration
    network = {name: value for name, value in own.items() if name == "backbone"}
    for baseline, metrics in found:
        recorder.append(
            "baseline_ended",
            name=baseline.name,
            configuration={**baseline.configuration, **network},
            metrics=metrics,
            seconds=round(baseline.seconds, 3),
        )


def make_baseline(
    name: str,
    folder: Path,
    store: Path,
    *,
    refitted: bool,
    between_fits: Callable[[], None] = lambda: None,
) -> Kept:
    """Compute a baseline of a search and write its files; its metrics are returned beside it.

    Args:
        store: of the features.
        refitted: fit its weights to all images of train and validation.
        between_fits: called again and again; what it raises ends the computation.
    """
    features = FeatureSet.open(store)
    splits = [features.split(name) for name in ("train", "validation")]
    labels = np.concatenate([split.labels for split in splits])
    values = np.concatenate([split.features for split in splits])
    folds = read_folds(folder)
    if folds is None:
        folds = np.repeat([-1, 0], [len(split.labels) for split in splits])
    make: Callable[..., Baseline] = nearest_neighbours
    if name == REGRESSION:
        make = functools.partial(logistic_regression, refit=refitted, between_fits=between_fits)
    baseline = make(values, labels, folds, num_classes=len(features.class_names))
    return baseline, _keep_baseline(folder, baseline, labels[folds >= 0], refitted=refitted)


def _keep_baseline(
    folder: Path, baseline: Baseline, labels: NDArray[np.int64], *, refitted: bool
) -> dict[str, float]:
    """Its answers, scores and weights, in the places and under the names of a trial's.

    Returns:
        Its metrics.
    """
    place = folder / "trials" / baseline.name
    place.mkdir(parents=True, exist_ok=True)
    logits = baseline.logits.astype(np.float32)  # as they are kept
    predicted = logits.argmax(axis=1)
    correct, losses = predicted == labels, image_losses(logits, labels)
    write_whole(place / LOGITS_FILE, lambda file: np.save(file, logits))
    write_whole(place / SCORES_FILE, lambda file: np.savez(file, correct=correct, log_loss=losses))
    if baseline.weights is not None and baseline.biases is not None:
        tried, path_losses = np.asarray(baseline.path_correct), np.asarray(baseline.path_losses)
        write_whole(
            place / PATH_SCORES_FILE,
            lambda file: np.savez(file, correct=tried, log_loss=path_losses),
        )
        head = safetensors.numpy.save({"weight": baseline.weights, "bias": baseline.biases})
        name = REFIT_FILE if refitted else HEAD_FILE
        write_whole(place / name, lambda file: file.write(head))
    return {
        "validation_loss": float(losses.mean()),
        "validation_accuracy": float(correct.mean()),
        "validation_macro_f1": macro_f1(predicted, labels),
        "epoch_seconds": baseline.seconds,
    }


def deal_folds(inputs: Inputs, folder: Path, features: Path) -> None:
    """Write down which fold each image is in, where trials are judged by folds.

    Raises:
        UserMistake: there are fewer images than folds.
    """
    data = inputs.experiment.data
    if data.validation != "folds" or data.folds is None or read_folds(folder) is not None:
        return
    known = {s.path: s for of in inputs.dataset.splits.values() for s in of}
    store = FeatureSet.open(features)
    samples = [known[p] for name in ("train", "validation") for p in store.split(name).paths]
    try:
        folds = folds_of(samples, data.folds)
    except ValueError as error:
        raise UserMistake(f"{error}; give data.folds a smaller number.") from None
    write_whole(folder / FOLDS_FILE, lambda file: np.save(file, folds))


def folds_of(samples: Sequence[Sample], folds: int) -> NDArray[np.int64]:
    """Each image's fold, shape (N,); those of one group and copies are in one fold.

    Raises:
        ValueError: fewer images or groups than folds.
    """
    labels, digests = [s.label for s in samples], [s.digest for s in samples]
    units = list(map(find_units(samples), samples))
    groups = units if len(set(units)) < len(units) else None
    return assign_folds(labels, digests, folds=folds, groups=groups)


# What a search keeps of its trials' validation answers: which trial, temperature and threshold.


_LOSS_TOLERANCE = 1e-3  # nats
_NAMED = 6


class ImageScores(NamedTuple):
    """Of each validation image: whether the answer is right, and its loss in nats, both (N,)."""

    correct: NDArray[np.bool_]
    log_loss: NDArray[np.floating]


class ValidationAnswers:
    """The validation logits of a search's trials and the labels that belong to them.

    Args:
        inputs: the search's images, from which comes what is gone from the cache.
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
        """int64 (N,), of the validation images in the order of the kept logits.

        Raises:
            DataError: neither the features nor the decoded images are there, nor the images.
        """
        try:
            return self.stores.read_labels(folds=self.record.folds is not None).labels
        except DataError:
            if self.inputs is not None:
                return self._labels_of_images(self.inputs)
            raise self._gone() from None

    def _gone(self) -> DataError:
        where = self.stores.features or self.stores.images
        return DataError(
            f"What this search was trained on is gone from {where}. Any search on the same "
            "images and backbone computes it again."
        )

    def _labels_of_images(self, inputs: Inputs) -> NDArray[np.int64]:
        """Of the images that can be read: those that trials were measured on."""

        splits = ("validation",) if self.record.folds is None else ("train", "validation")
        samples = [sample for split in splits for sample in inputs.dataset.splits[split]]
        best = self.record.ranking()[0].trial_id
        kept = self._read_scores(best)
        if len(samples) != len(self._read_logits(best) if kept is None else kept.correct):
            samples = [sample for split in splits for sample in inputs.readable(split)]
        return np.array([sample.label for sample in samples], dtype=np.int64)

    def logits(self, trial_id: str) -> NDArray[np.float64]:
        """float64, shape (N, num_classes): of the trial's best epoch, before any temperature.

        Raises:
            DataError: they are gone, damaged or of other images.
        """

        logits = self._read_logits(trial_id)
        path = self._file(trial_id, LOGITS_FILE)
        if len(logits) != len(self.labels):
            raise DataError(f"{path} is about other images than the search's. Search again.")
        kept = self._read_scores(trial_id)
        if kept is not None and not np.array_equal(logits.argmax(axis=1) == self.labels, kept[0]):
            raise DataError(f"{path} is damaged: its answers are not those that were scored.")
        return logits

    def scores(self, trial_id: str) -> ImageScores:
        """Of the trial's best epoch; every trial keeps them, of earlier versions its logits.

        Raises:
            DataError: they are gone, damaged or of other images.
        """

        kept = self._read_scores(trial_id)
        if kept is None:
            logits = self.logits(trial_id)
            return ImageScores(
                logits.argmax(axis=1) == self.labels, image_losses(logits, self.labels)
            )
        if len(kept.correct) != len(self.labels):
            path = self._file(trial_id, SCORES_FILE)
            raise DataError(f"{path} is about other images than the search's. Search again.")
        return kept

    def _file(self, trial_id: str, name: str) -> Path:
        return self.folder / "trials" / trial_id / name

    def _read_scores(self, trial_id: str) -> ImageScores | None:
        """None where there are none that can be read; what zip's own checksums belie cannot."""

        try:
            with np.load(self._file(trial_id, SCORES_FILE), allow_pickle=False) as file:
                return ImageScores(file["correct"].astype(bool), file["log_loss"])
        except (OSError, ValueError, LookupError, EOFError, BadZipFile):
            return None

    def _read_logits(self, trial_id: str) -> NDArray[np.float64]:
        path = self._file(trial_id, LOGITS_FILE)
        try:
            logits: NDArray[np.float64] = np.load(path, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"Cannot read {path} ({type(error).__name__}). Search again.") from None
        return logits

    def choose(
        self,
        prefer: Preference,
        *,
        milliseconds: Mapping[str, float] | None = None,
        within: float | None = None,
        max_latency_ms: float | None = None,
    ) -> Choice:
        """What to keep: a trial that ran to its end, or a baseline.

        Of a training on validation too there is one trial alone.

        Args:
            milliseconds: of an answer, by network; `fastest` and `max_latency_ms` need it.
            within: with `fastest`, by how much less accurate than the best a network may be, as a
                fraction; None: it has to be tied with the best.
            max_latency_ms: only networks that answer as fast.

        Raises:
            UserMistake: no network answers as fast.
        """

        ranking = self.record.ranking()
        if self.record.is_unvalidated:
            only = ranking[0].trial_id
            reason = f"{only} was trained on the validation images too: there is no choice."
            return Choice(best=only, tied=(only,), chosen=only, reason=reason)
        candidates = self._candidates(ranking)
        said = []
        if milliseconds is not None:
            candidates, why = self._of_fast_networks(
                candidates,
                milliseconds,
                within=within,
                limit=max_latency_ms,
                fastest=prefer == "fastest",
            )
            said += why
        choice = self._choose_among(candidates, "best" if prefer == "fastest" else prefer)
        said.append(choice.reason)
        ready = {candidate.name for candidate in candidates if candidate.can_be_kept}
        if prefer == "cheapest" and not ready.issuperset(choice.tied):
            kept = len(ready.intersection(choice.tied))
            said.append(f"Only the {kept} whose networks were kept can be taken.")
        if not self.record.ran_to_its_end(ranking[0]):
            said.append("No trial ran to its end; the furthest are compared.")
        compared = {candidate.name for candidate in candidates}
        missing = [t.trial_id for t in self._comparable(ranking) if t.trial_id not in compared]
        if missing and milliseconds is None:
            named = ", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
            said.append(f"Not compared, since their validation answers are gone: {named}.")
        return replace(choice, reason=" ".join(said))

    def _choose_among(
        self, candidates: Sequence[Candidate], prefer: Literal["best", "cheapest"]
    ) -> Choice:
        best = self.record.named(candidates[0].name)
        assert best is not None
        return choose(
            candidates,
            self.labels,
            objective=self.experiment.objective,
            mode=self.experiment.mode,
            simplest=[REGRESSION, *self._defaults_first_of(best)],
            prefer=prefer,
        )

    def network_of(self, name: str) -> str:
        """The network of a trial or a baseline."""
        trial = self.record.named(name)
        own = None if trial is None else trial.configuration.get("backbone")
        return str(own or self.experiment.model.backbone)

    def _of_fast_networks(
        self,
        candidates: Sequence[Candidate],
        milliseconds: Mapping[str, float],
        *,
        within: float | None,
        limit: float | None,
        fastest: bool,
    ) -> tuple[list[Candidate], list[str]]:
        """The candidates to choose among, and why it is these; by the cost of their networks."""
        found, said = list(candidates), []
        if limit is not None:
            found = [c for c in found if milliseconds[self.network_of(c.name)] <= limit]
            if not found:
                name = min(milliseconds, key=milliseconds.__getitem__)
                raise UserMistake(
                    f"No network of this search answers in {limit:g} ms. The fastest, {name}, "
                    f"takes {milliseconds[name]:.1f} ms; give --max-latency-ms that, or search "
                    "smaller networks (visiontuner backbones --recommend)."
                )
            said.append(f"Networks that answer in {limit:g} ms were compared.")
        if not fastest:
            return found, said
        best = self._choose_among(found, "best")
        most = next(c for c in found if c.name == best.best).correct.mean()
        near = {
            self.network_of(c.name)
            for c in found
            if c.name in best.tied or (within is not None and c.correct.mean() >= most - within)
        }
        network = min(near, key=lambda name: (milliseconds[name], name))
        how = "tied with" if within is None else f"tied with or within {100 * within:g} points of"
        said.append(
            f"{network} is the fastest of {len(near)} networks that are {how} the best: "
            f"{milliseconds[network]:.1f} ms an image on one thread."
        )
        return [c for c in found if self.network_of(c.name) == network], said

    def accuracy_by_network(self) -> dict[str, Interval]:
        """Accuracy to expect of the best of each network, corrected for its choice."""
        by_network: dict[str, list[Candidate]] = {}
        for candidate in self._candidates(self.record.ranking()):
            by_network.setdefault(self.network_of(candidate.name), []).append(candidate)
        return {
            name: estimate_accuracy(
                np.stack([c.correct for c in own], axis=1).astype(bool),
                np.stack([c.losses for c in own], axis=1),
            )
            for name, own in by_network.items()
        }

    def _comparable(self, ranking: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Those that ran to their end; where none did, those that came furthest."""
        ended = [trial for trial in ranking if self.record.ran_to_its_end(trial)]
        furthest = len(ranking[0].epochs)
        return ended or [trial for trial in ranking if len(trial.epochs) == furthest]

    def _candidates(self, ranking: Sequence[TrialRecord]) -> list[Candidate]:
        """Of each trial whose answers are there; the best one's, which is the first, must be."""

        seconds, found = training_seconds(self.record), []
        regression = self.record.baselines.get(REGRESSION)
        for trial in [*self._comparable(ranking), *filter(None, [regression])]:
            try:
                kept = self.scores(trial.trial_id)
            except DataError:
                if trial is ranking[0]:
                    raise
                continue
            stage = stage_of(self.experiment, trial)
            found.append(
                Candidate(
                    name=trial.trial_id,
                    value=math.nan if trial.best_value is None else trial.best_value,
                    correct=kept.correct,
                    losses=kept.log_loss,
                    seconds=seconds.get(trial.trial_id),
                    can_be_kept=self._is_quick_to_package(trial.trial_id),
                    is_network=stage.experiment.model.train != "head",
                )
            )
        return found

    def _defaults(self) -> list[str]:
        """The ids of trials with the values under `training`: one for each network at most."""
        training = self.experiment.training
        return [
            trial.trial_id
            for trial in self.record.trials.values()
            if all(
                getattr(training, name) == value
                for name, value in trial.configuration.items()
                if name != "backbone"
            )
        ]

    def _defaults_first_of(self, best: TrialRecord) -> list[str]:
        """Those of each network, the best trial's network first."""
        network = best.configuration.get("backbone")
        return sorted(
            self._defaults(),
            key=lambda name: self.record.trials[name].configuration.get("backbone") != network,
        )

    def describe_gain(self, choice: Choice) -> str | None:
        """What the search gave beside the baselines and the defaults; None without any."""
        ranking = self._comparable(self.record.ranking())
        labels = {name: name.replace("_", " ") for name in self.record.baselines}
        labels |= dict.fromkeys(self._defaults_first_of(ranking[0])[:1], "defaults")
        search = Told("Search", ranking[0].trial_id, ranking[0].best_value or math.nan)
        others = [
            Told(label, name, trial.best_value)
            for name, label in labels.items()
            if (trial := self.record.named(name)) is not None and trial.best_value is not None
        ]
        if not self.record.baselines:
            return None
        return describe_gain(search, others, choice.tied, objective=self.experiment.objective)

    def estimate(self) -> Interval | None:
        """Accuracy to expect of what was chosen, on other images; None where none was judged."""
        if self.record.is_unvalidated:
            return None
        candidates = self._candidates(self.record.ranking())
        correct, losses = (
            np.stack([getattr(c, name) for c in candidates], axis=1)
            for name in ("correct", "losses")
        )
        path = self._file(REGRESSION, PATH_SCORES_FILE)
        if REGRESSION in self.record.baselines and path.is_file():
            with np.load(path, allow_pickle=False) as tried:
                correct = np.concatenate([correct, tried["correct"]], axis=1)
                losses = np.concatenate([losses, tried["log_loss"]], axis=1)
        if len(correct) < 2:
            return None
        return estimate_accuracy(correct.astype(bool), losses)

    def _is_quick_to_package(self, trial_id: str) -> bool:
        """Whether its weights are there, or a matter of seconds."""

        refitted = self.experiment.refits
        if kept_weights(self.folder, trial_id, refitted=refitted) is not None:
            return True
        trial = self.record.trials.get(trial_id)
        return trial is not None and not stage_of(self.experiment, trial).on_images

    def restore(self, trial: TrialRecord) -> str | None:
        """A search keeps weights and logits of its five best; another trial is trained again.

        So is one of which either is damaged.

        For a head that takes seconds, for a network as long as the trial did.

        Returns:
            What was done, or None if both were there.
        """

        if trial.trial_id in self.record.baselines:
            return self._restore_baseline(trial.trial_id)
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
            f"{said} warning: an image's validation loss differs by {difference:.2g} nats from "
            "the search's: another machine or number of threads."
        )

    def _restore_baseline(self, name: str) -> str | None:
        refits = self.experiment.refits
        if self.has_logits(name) and kept_weights(self.folder, name, refitted=refits) is not None:
            return None
        stores = self._stores_to_train_on(self.record.baselines[name], on_images=False)
        make_baseline(name, self.folder, stores.features or self.folder, refitted=refits)
        return f"Computed {name} again: its files were gone or damaged."

    def refit(self, trial: TrialRecord) -> str | None:
        """Train what is kept on train and validation, where that is to be and is not done yet.

        Returns:
            What was done, or None.
        """
        if not self.experiment.refits or self.record.is_unvalidated:
            return None
        if trial.trial_id in self.record.baselines:
            return None  # fitted to all of them by itself
        if kept_weights(self.folder, trial.trial_id, refitted=True) is not None:
            return None
        self._train_one_head(trial, "train+validation")
        return f"Trained {trial.trial_id} on train and validation: that is the model."

    def head_of_train(self, trial: TrialRecord) -> Path:
        """The head of a trial that was judged by folds, trained on the training images alone."""
        kept = kept_weights(self.folder, trial.trial_id)
        return kept or self._train_one_head(trial, "train")

    def _train_one_head(self, trial: TrialRecord, trained_on: TrainedOn) -> Path:
        from visiontuner.search.trial import train_one_head

        config = {"trial_id": trial.trial_id, "configuration": trial.configuration}
        return train_one_head(config, self._task(trial), trained_on=trained_on)

    def _why_to_train_again(self, trial_id: str) -> str | None:
        from visiontuner.model.network import read_tensors

        weights = kept_weights(self.folder, trial_id)
        if not self.experiment.refits:  # else they are of no use
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

        config = {"trial_id": trial.trial_id, "configuration": trial.configuration}
        train_again(config, self._task(trial), kept_epoch=trial.best_epoch or 1)

    def _task(self, trial: TrialRecord) -> TrialTask:
        """What a trial of this search is handed when it runs in this process."""
        stage = stage_of(self.experiment, trial)
        starts = {}
        if trial.starts_from is not None:
            starts[trial.trial_id] = trial.starts_from
            self.restore(self.record.trials[trial.starts_from])
        return make_task(
            self.folder,
            stage,
            stores=self._stores_to_train_on(trial, on_images=stage.on_images),
            cache=writable_cache_folder(),
            threads=int(self.experiment.search.cpus_per_trial) or 1,
            starts=starts,
        )

    def _stores_to_train_on(self, trial: TrialRecord, *, on_images: bool) -> Stores:
        """Those of the trial's network; computed again if they are gone from the cache."""
        backbone = trial.configuration.get("backbone")
        known = Stores.of(read_events(self.folder).events, backbone)
        found = Stores(None, known.images) if on_images else Stores(known.features, None)
        if any(found) and found.are_verified:
            return found
        if self.inputs is None:
            raise self._gone()
        store, _ = self.inputs.of_trial(trial).store(on_images=on_images)
        if on_images:
            return Stores(features=None, images=store.folder)
        return Stores(features=store.folder, images=None)

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
        seen = "The validation images were trained on, so nothing was fitted on them"
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


def choose_and_record(folder: Path, recorder: Recorder, inputs: Inputs) -> None:
    """Choose what to keep and write it down, with the accuracy that other images may expect.

    Where answers are gone or damaged nothing is chosen: the best trial is kept.
    """
    record = recorder.record
    answers = ValidationAnswers(folder, record, inputs.experiment, inputs=inputs)
    try:
        choice, estimate = answers.choose("best"), answers.estimate()
        gain = answers.describe_gain(choice)
    except DataError as error:
        inputs.observer.note(f"warning: nothing was compared: {error}")
        return
    recorder.append(
        "choice_made",
        chosen=choice.chosen,
        best=choice.best,
        tied=list(choice.tied),
        reason=choice.reason,
        gain=gain,
        estimate=None if estimate is None else estimate.to_dict(),
        images=len(answers.labels),
    )
