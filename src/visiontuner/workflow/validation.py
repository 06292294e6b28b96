"""What a search keeps of its trials' validation answers: which trial, temperature and threshold."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.errors import DataError
from visiontuner.experiment import Experiment
from visiontuner.journal import SearchRecord, TrialRecord, read_events

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from visiontuner.evaluation.calibration import ChosenThreshold
    from visiontuner.evaluation.choice import Choice, Preference

_LOGITS_TOLERANCE = 1e-3


class ValidationAnswers:
    """The validation logits of a search's trials and the labels that belong to them."""

    def __init__(self, folder: Path, record: SearchRecord, experiment: Experiment) -> None:
        self.folder = folder
        self.record = record
        self.experiment = experiment

    @cached_property
    def features_folder(self) -> Path:
        """Where the features are that the trials were trained on.

        Raises:
            DataError: the journal does not say.
        """
        ready = [e for e in read_events(self.folder).events if e["event"] == "features_ready"]
        if not ready:
            raise DataError(f"{self.folder} says nothing about its features. Search again.")
        return Path(ready[-1]["folder"])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 (N,), of the validation pictures in the order of the kept logits."""
        from visiontuner.model.store import FeatureSet

        try:
            return FeatureSet.open(self.features_folder).split("validation").labels
        except DataError:
            raise DataError(
                f"The features of this search are gone from {self.features_folder}. Any search on "
                "the same pictures and backbone computes them again."
            ) from None

    def logits(self, trial_id: str) -> NDArray[np.float64]:
        """float64, shape (N, num_classes): of the trial's best epoch, before any temperature."""
        import numpy as np

        from visiontuner.search.trial import LOGITS_FILE

        path = self.folder / "trials" / trial_id / LOGITS_FILE
        try:
            logits: NDArray[np.float64] = np.load(path, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"Cannot read {path} ({type(error).__name__}). Search again.") from None
        if len(logits) != len(self.labels):
            raise DataError(f"{path} is about other pictures than the features. Search again.")
        return logits

    def choose(self, prefer: Preference) -> Choice:
        """The trial to keep, and those that cannot be told apart from the best."""
        from visiontuner.evaluation.choice import (
            choose,
            picture_scores,
            tied_with_best,
            training_seconds,
        )

        ids = [trial.trial_id for trial in self.record.ranking()]
        scores = {
            trial_id: picture_scores(self.logits(trial_id), self.labels, self.experiment.objective)
            for trial_id in ids
        }
        return choose(
            ids[0],
            tied_with_best(scores, ids[0]),
            prefer=prefer,
            seconds=training_seconds(self.record),
        )

    def restore_head(self, trial: TrialRecord) -> str | None:
        """A search keeps the heads of its five best; another's is trained again: seconds.

        Returns:
            What was done, or None if the head was there.
        """
        import numpy as np

        from visiontuner.search.trial import HEAD_FILE, TrialTask

        if (self.folder / "trials" / trial.trial_id / HEAD_FILE).is_file():
            return None
        from visiontuner.search.head_trial import train_again

        kept = self.logits(trial.trial_id)
        train_again(
            {"trial_id": trial.trial_id, "configuration": trial.configuration},
            TrialTask(
                experiment=self.experiment,
                search_folder=self.folder.resolve(),
                features_folder=self.features_folder,
                threads=int(self.experiment.search.cpus_per_trial) or 1,
            ),
            best_epoch=trial.best_epoch or 1,
        )
        difference = float(np.abs(self.logits(trial.trial_id) - kept).max())
        said = f"Trained {trial.trial_id} again: its head was not among those kept."
        if difference <= _LOGITS_TOLERANCE:
            return said
        return (
            f"{said} warning: its validation logits differ by {difference:.2g} from the search's: "
            "another machine or number of threads."
        )

    def calibrate(
        self, trial_id: str, precision: float
    ) -> tuple[float, ChosenThreshold, list[str]]:
        """Temperature, the threshold for a wanted precision, and what must be said of them."""
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
