"""Which configurations are still to run: from the experiment and what the journal already holds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from visiontuner.experiment import Configuration, Experiment
from visiontuner.journal import SearchRecord, best_epoch
from visiontuner.search.space import Suggester, clean, draw_beforehand


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A configuration with its place in the journal; `attempt` counts from 1."""

    trial_id: str
    attempt: int
    configuration: Configuration

    def to_config(self) -> dict[str, Any]:
        """What Ray hands to the worker and back to the callbacks."""
        return {
            "trial_id": self.trial_id,
            "attempt": self.attempt,
            "configuration": dict(self.configuration),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Trials that are known already, and how many more Optuna may suggest."""

    known: tuple[PlannedTrial, ...]
    suggestions: int
    next_number: int

    @property
    def remaining(self) -> int:
        return len(self.known) + self.suggestions


def make_plan(experiment: Experiment, record: SearchRecord) -> Plan:
    """Everything that has not finished: begun and interrupted trials first, then the rest.

    A trial that begins again keeps its id and gets the next attempt. With a random or grid search
    the list is the one of an uninterrupted search, less what is finished.
    """
    begun = [
        PlannedTrial(
            trial_id=trial.trial_id,
            attempt=trial.attempt + 1,
            configuration=clean(trial.configuration, experiment.search.space),
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
        PlannedTrial(trial_id=trial_name(number), attempt=1, configuration=configuration)
        for number, configuration in listed
        if trial_name(number) not in record.trials
    ]
    known = (*begun, *unstarted)
    finished = len(record.trials) - len(begun)
    highest = max((_number(t) for t in [*record.trials, *(p.trial_id for p in known)]), default=0)
    return Plan(
        known=known,
        suggestions=max(0, total - finished - len(known)),
        next_number=highest + 1,
    )


def trial_name(number: int) -> str:
    """1 -> `t0001`."""
    return f"t{number:04d}"


def _number(trial_id: str) -> int:
    return int(trial_id[1:])


class PlanSearcher(Searcher):
    """Hands a plan to Ray Tune, one trial at a time, and tells Optuna how trials ended.

    Ray's own trial ids are forgotten here: `trial_id` in the config is the journal's.
    """

    def __init__(self, plan: Plan, experiment: Experiment, record: SearchRecord) -> None:
        super().__init__(metric=experiment.objective, mode=experiment.mode)
        self._known = deque(plan.known)
        self._suggestions_left = plan.suggestions
        self._next_number = plan.next_number
        self._record = record
        self._running: dict[str, PlannedTrial] = {}
        self._suggester: Suggester | None = None
        if experiment.search.algorithm == "optuna":
            ended = [t for t in record.trials.values() if t.finished]
            self._suggester = Suggester(experiment, trials_told=len(ended))
            for trial in ended:
                self._suggester.tell(trial.trial_id, trial.configuration, trial.best_value)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        planned = self._next()
        if planned is None:
            return Searcher.FINISHED  # type: ignore[return-value]  # Ray's word for "no more"
        self._running[trial_id] = planned
        return planned.to_config()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        planned = self._running.pop(trial_id, None)
        if planned is None or self._suggester is None:
            return
        self._suggester.tell(
            planned.trial_id, planned.configuration, None if error else self._value(planned)
        )

    def _value(self, planned: PlannedTrial) -> float | None:
        """The best objective so far: Ray tells the searcher before the journal closes the trial."""
        record = self._record.trials.get(planned.trial_id)
        best = record and best_epoch(record.epochs, self._record.objective, self._record.mode)
        return best.metrics[self._record.objective] if best else None

    def _next(self) -> PlannedTrial | None:
        if self._known:
            return self._known.popleft()
        if self._suggester is None or self._suggestions_left == 0:
            return None
        self._suggestions_left -= 1
        name = trial_name(self._next_number)
        self._next_number += 1
        return PlannedTrial(trial_id=name, attempt=1, configuration=self._suggester.ask(name))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its journal, never from Ray's snapshot."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""
