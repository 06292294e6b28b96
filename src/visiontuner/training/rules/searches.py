"""Rules on the trials of a search together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visiontuner.journal import Finding
from visiontuner.training.rules import thresholds as limits
from visiontuner.training.rules.history import TrainingHistory

_Key = tuple[str, ...]


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
            if configuration.get(setting) != history.configuration.get(setting)
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
