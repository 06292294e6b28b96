"""Which configurations are still to run: from the experiment and what the journal already holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from visiontuner.experiment import Configuration, Experiment
from visiontuner.journal import SearchRecord, StageName
from visiontuner.search.space import clean, draw_beforehand


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A configuration with its place in the journal; `attempt` counts from 1.

    In a search with two stages it has its stage, and in the second the trial it starts from.
    """

    trial_id: str
    attempt: int
    configuration: Configuration
    stage: StageName | None = None
    starts_from: str | None = None

    def to_config(self) -> dict[str, Any]:
        """What Ray hands to the worker and back to the callbacks."""
        staged = {"stage": self.stage, "starts_from": self.starts_from}
        return {
            "trial_id": self.trial_id,
            "attempt": self.attempt,
            "configuration": dict(self.configuration),
            **{name: value for name, value in staged.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Trials that are known already, and how many more Optuna may suggest."""

    known: tuple[PlannedTrial, ...]
    suggestions: int
    next_number: int
    stage: StageName | None = None

    @property
    def remaining(self) -> int:
        return len(self.known) + self.suggestions


def make_plan(
    experiment: Experiment, record: SearchRecord, *, stage: StageName | None = None
) -> Plan:
    """Everything that has not finished: begun and interrupted trials first, then the rest.

    A trial that begins again keeps its id and gets the next attempt. With a random or grid search
    the list is the one of an uninterrupted search, less what is finished.
    """
    begun = [
        PlannedTrial(
            trial_id=trial.trial_id,
            attempt=trial.attempt + 1,
            configuration=clean(trial.configuration, experiment.search.space),
            stage=stage,
        )
        for trial in record.trials.values()
        if not trial.finished
    ]
    if experiment.search.algorithm == "optuna":
        first = [clean(c, experiment.search.space) for c in experiment.first_trials()]
        listed = list(enumerate(first[: experiment.search.trials], start=1))
        total = experiment.search.trials
    else:
        listed = list(enumerate(draw_beforehand(experiment), start=1))
        total = len(listed)
    unstarted = [
        PlannedTrial(
            trial_id=trial_name(number), attempt=1, configuration=configuration, stage=stage
        )
        for number, configuration in listed
        if trial_name(number) not in record.trials
    ]
    known = (*begun, *unstarted)
    finished = len(record.trials) - len(begun)
    names = [*record.trials, *(planned.trial_id for planned in known)]
    return Plan(
        known=known,
        suggestions=max(0, total - finished - len(known)),
        next_number=highest_number(names) + 1,
        stage=stage,
    )


def trial_name(number: int) -> str:
    """1 -> `t0001`."""
    return f"t{number:04d}"


def highest_number(trial_ids: Iterable[str]) -> int:
    """`t0001`, `t0012` -> 12; 0 for none."""
    return max((int(trial_id[1:]) for trial_id in trial_ids), default=0)
