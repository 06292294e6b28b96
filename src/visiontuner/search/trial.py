"""What one Ray worker is handed. Without torch: the driver need not wait for its import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontuner.experiment import Experiment, Training

HEAD_FILE = "head.safetensors"
LOGITS_FILE = "validation_logits.npy"


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What all trials share; paths are absolute, since workers run in folders of their own."""

    experiment: Experiment
    search_folder: Path
    features_folder: Path
    threads: int


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration; `config` holds `trial_id` and `configuration`."""
    from visiontuner.search.head_trial import train_head

    train_head(config, task)


def settings_of(training: Training, configuration: dict[str, Any]) -> Training:
    """The experiment's training settings with a trial's own values in place."""
    return Training.model_validate({**training.model_dump(), **configuration})
