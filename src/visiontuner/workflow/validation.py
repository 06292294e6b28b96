"""What a search keeps of its trials' validation answers: which trial, temperature and threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

from visiontuner.errors import ClassifierError, DataError
from visiontuner.experiment import Experiment
from visiontuner.journal import SearchRecord, TrialRecord, read_events
from visiontuner.locations import writable_cache_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from visiontuner.evaluation.calibration import ChosenThreshold
    from visiontuner.evaluation.choice import Choice, Preference
    from visiontuner.search.labels import Stores
    from visiontuner.workflow.inputs import Inputs

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
        from visiontuner.search.labels import Stores

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
        import numpy as np

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
        import numpy as np

        from visiontuner.search.trial import LOGITS_FILE

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
        from visiontuner.evaluation.calibration import picture_losses
        from visiontuner.search.trial import SCORES_FILE

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
        import numpy as np

        from visiontuner.search.trial import SCORES_FILE

        try:
            with np.load(self._file(trial_id, SCORES_FILE), allow_pickle=False) as file:
                return PictureScores(file["correct"].astype(bool), file["log_loss"])
        except (OSError, ValueError, LookupError, EOFError, BadZipFile):
            return None

    def _read_logits(self, trial_id: str) -> NDArray[np.float64]:
        import numpy as np

        from visiontuner.search.trial import LOGITS_FILE

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
        from visiontuner.evaluation.choice import (
            Choice,
            choose,
            tied_with_best,
            training_seconds,
        )

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
        from visiontuner.evaluation.choice import scores_of_answers

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
        from visiontuner.search.stages import stage_of
        from visiontuner.search.weights import kept_weights

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
        import numpy as np

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
        from visiontuner.model.network_files import read_tensors
        from visiontuner.search.weights import kept_weights

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
        from visiontuner.search.stages import make_task, stage_of
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
        from visiontuner.search.labels import Stores

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
        from visiontuner.evaluation.calibration import (
            calibration_notes,
            choose_threshold,
            fit_temperature,
            probabilities_of,
        )

        logits = self.logits(trial_id)
        temperature = fit_temperature(logits, self.labels)
        probabilities = probabilities_of(logits, temperature)
        threshold = choose_threshold(probabilities, self.labels, precision)
        return temperature, threshold, calibration_notes(logits, self.labels, temperature)

    def _calibration_taken_over(self) -> tuple[float, ChosenThreshold | None, list[str]]:
        from visiontuner.evaluation.calibration import ChosenThreshold
        from visiontuner.model.classifier import read_threshold

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
