"""Rules on the trials of a search together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

from visiontuner.diagnostics import thresholds as limits
from visiontuner.diagnostics.history import TrainingHistory
from visiontuner.experiment.schema import Experiment, Range
from visiontuner.journal import Finding

_Key = tuple[str, ...]

# Trainings that differ in these alone begin alike, unless a schedule stretches over all epochs.
_NO_EFFECT_YET = ("epochs", "early_stop")


class SimilarRuns:
    """Finds trainings with different settings and the same curves, one training at a time.

    Like Debugger's SimilarAcrossRuns it says that runs repeat each other; it compares losses,
    which every run has, instead of tensors.
    """

    def __init__(self) -> None:
        self._first: dict[_Key, tuple[str, Mapping[str, Any]]] = {}

    def add(self, name: str, history: TrainingHistory) -> Finding | None:
        """Take in one training that has ended; a finding if it repeats an earlier one."""
        key = _fingerprint(history)
        if key is None:
            return None
        earlier, configuration = self._first.setdefault(key, (name, history.configuration))
        different = sorted(
            setting
            for setting in {*configuration, *history.configuration}
            if setting not in _NO_EFFECT_YET
            and configuration.get(setting) != history.configuration.get(setting)
        )
        if not different:  # of this very training, or the same again
            return None
        values = "; ".join(
            f"{s} {_short(configuration.get(s))} and {_short(history.configuration.get(s))}"
            for s in different
        )
        return Finding(
            rule="similar_across_runs",
            severity="warning",
            evidence=f"the same curves as {earlier}, with other settings: {values}",
            advice=f"{', '.join(different)} has no effect here: leave such values out of the space "
            "(batches larger than the training set are all the same).",
            step=history.last_step,
        )


class UnequalHosts:
    """Finds machines of a search that train at less than half the speed of another one.

    Like Debugger's LoadBalancing, threshold 0.5, it says that workers have unequal work; it
    compares images a second of trials with the same batch size instead of GPUs' use.
    """

    def __init__(self) -> None:
        self._speeds: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._told = False

    def add(self, history: TrainingHistory) -> Finding | None:
        """Take in one training that has ended; a finding once a search."""
        speeds = history.curve("images_per_second").values
        if not speeds or history.host is None:
            return None
        batch = history.configuration.get("batch_size")
        by_host = self._speeds[batch]
        by_host[history.host].append(median(speeds))
        usual = {
            host: median(values)
            for host, values in by_host.items()
            if len(values) >= limits.HOST_TRIALS
        }
        if self._told or len(usual) < 2:
            return None
        slow, fast = min(usual, key=lambda h: usual[h]), max(usual, key=lambda h: usual[h])
        if usual[slow] >= limits.IMBALANCE * usual[fast]:
            return None
        self._told = True
        return Finding(
            rule="workload_imbalance",
            severity="warning",
            evidence=f"{slow} trains {usual[slow]:.0f} images/s and {fast} {usual[fast]:.0f}, with "
            f"batches of {batch} (medians of {limits.HOST_TRIALS} trials or more)",
            advice=f"See what else runs on {slow}, or leave it out: a search waits for its slowest "
            "machine; alike machines share the work evenly.",
            step=history.last_step,
        )


def few_steps(experiment: Experiment, images: int) -> Finding | None:
    """A training, with the largest batches that are searched, takes too few steps to learn.

    Args:
        images: for training.
    """
    batch = _largest(experiment, "batch_size")
    epochs = _largest(experiment, "epochs")
    in_epoch = math.ceil(images / batch)
    if not images or in_epoch * epochs >= limits.FEWEST_TRAINING_STEPS:
        return None
    steps = "1 step" if in_epoch == 1 else f"{in_epoch} steps"
    enough = math.ceil(limits.FEWEST_TRAINING_STEPS / in_epoch)
    return Finding(
        rule="few_steps",
        severity="warning",
        evidence=f"with batch size {batch} an epoch of {images:,} training images is {steps}, and "
        f"a training {in_epoch * epochs}",
        advice=f"Search smaller batches, or set training.epochs to {enough} or more.",
    )


def _largest(experiment: Experiment, name: str) -> int:
    """The largest value of a whole number that a trial can have."""
    domain = experiment.search.space.get(name)
    if isinstance(domain, Range):
        return int(domain.high)
    values = domain.values if domain else [getattr(experiment.training, name)]
    return max(int(value) for value in values)


def similar_across_runs(histories: Mapping[str, TrainingHistory]) -> dict[str, Finding]:
    """The findings by name, for those that repeat one before them."""
    runs = SimilarRuns()
    found = {name: runs.add(name, history) for name, history in histories.items()}
    return {name: finding for name, finding in found.items() if finding is not None}


def _fingerprint(history: TrainingHistory) -> _Key | None:
    train, valid = history.curve("train_loss"), history.curve("validation_loss")
    values = (*train.values[: limits.SIMILAR_EPOCHS], *valid.values[: limits.SIMILAR_EPOCHS])
    if min(len(train.values), len(valid.values)) < limits.SIMILAR_EPOCHS or len(set(values)) < 3:
        return None
    return tuple(f"{value:.{limits.SIMILAR_DIGITS}g}" for value in values)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
