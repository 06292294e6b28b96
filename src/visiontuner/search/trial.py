"""What one Ray worker is handed. Without torch: the driver need not wait for its import."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visiontuner import garbage
from visiontuner.experiment import Experiment, Training

if TYPE_CHECKING:
    from visiontuner.search.hosts import Home

HEAD_FILE = "head.safetensors"
NETWORK_FILE = "network.safetensors"
LOGITS_FILE = "validation_logits.npy"
SCORES_FILE = "validation_scores.npz"
CHECKPOINT_FOLDER = "checkpoint"

TrainedOn = Literal["train", "train+validation"]


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What all trials share; paths are absolute, since workers run in folders of their own.

    Args:
        features_folder: what heads are trained on.
        threads: of one trial's arithmetic.
        pictures_folder: a `PictureStore`; if it is given, trials run the network on it.
        cache: where the network's weights are kept; needed with pictures.
        start_heads: by trial id the trained head (safetensors) that a network begins with.
        checkpoints: keep the whole state of a running training in `trials/ID/checkpoint` after
            every epoch, and go on from there. Whoever runs the trial removes it at the end.
        trained_on: with `train+validation` no picture is left to choose an epoch by: the last one's
            weights are kept, and no logits. `pictures_folder` then holds all of them as `train`.
        trace_steps: the first and the last step of which a profiler's trace is written.
        home: where these paths are, in a cluster of several machines.
    """

    experiment: Experiment
    search_folder: Path
    threads: int
    features_folder: Path | None = None
    pictures_folder: Path | None = None
    cache: Path | None = None
    start_heads: Mapping[str, Path] = field(default_factory=dict)
    checkpoints: bool = False
    trained_on: TrainedOn = "train"
    trace_steps: tuple[int, int] | None = None
    home: Home | None = None

    def keeps(self, *, is_best: bool) -> bool:
        """Whether an epoch's files replace those of the epochs before it."""
        return is_best or self.trained_on != "train"

    def trial_folder(self, trial_id: str) -> Path:
        """Where the files of a trial's best epoch lie."""
        return self.search_folder / "trials" / trial_id


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration; `config` holds `trial_id` and `configuration`."""
    if task.home is not None:
        from visiontuner.search.hosts import at_this_machine

        with at_this_machine(task, config["trial_id"]) as here:
            _train(config, here)
    else:
        _train(config, task)


def _train(config: dict[str, Any], task: TrialTask) -> None:
    if task.pictures_folder is not None:
        with garbage.left_alone():
            from visiontuner.search.network_trial import train_network

        train_network(config, task)
    else:
        with garbage.left_alone():
            from visiontuner.search.head_trial import train_head

        train_head(config, task)


def train_again(config: dict[str, Any], task: TrialTask, *, best_epoch: int) -> None:
    """Write the files of a finished trial's best epoch anew; the seed makes the same numbers.

    For a head that takes seconds, for a network as long as the trial did. What was recorded of the
    trial itself stays.
    """
    training = task.experiment.training.model_copy(update={"record_every_steps": 0})
    unrecorded = task.experiment.model_copy(update={"training": training})
    task = replace(task, experiment=unrecorded)
    if task.pictures_folder is not None:
        from visiontuner.search import network_trial

        epochs = network_trial.train_epochs(config, task)
    else:
        from visiontuner.search import head_trial

        epochs = head_trial.train_epochs(config, task)
    with closing(epochs):
        next(result for result in epochs if result.epoch == best_epoch)


def settings_of(training: Training, configuration: Mapping[str, Any]) -> Training:
    """The experiment's training settings with a trial's own values in place."""
    return Training.model_validate({**training.model_dump(), **configuration})
