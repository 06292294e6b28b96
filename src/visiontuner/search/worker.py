"""What Ray calls in a worker process. Without torch: the driver need not wait for its import."""

from __future__ import annotations

from typing import Any

from visiontuner.search.plan import TrialTask
from visiontuner.workarounds import python as garbage


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """Train one configuration; `config` holds `trial_id` and `configuration`."""
    task = task.for_trial(config["configuration"])
    if task.driver is not None:
        from visiontuner.search.remote import local_copy

        with local_copy(task, config["trial_id"]) as here:
            _train(config, here)
    else:
        _train(config, task)


def _train(config: dict[str, Any], task: TrialTask) -> None:
    if task.images_folder is not None:
        with garbage.left_alone():
            from visiontuner.search.trial import train_network

        train_network(config, task)
    else:
        with garbage.left_alone():
            from visiontuner.search.trial import train_head

        train_head(config, task)
