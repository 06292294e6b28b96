"""A plan as Ray Tune's search algorithm."""

from __future__ import annotations

from collections import deque
from typing import Any

from ray.tune.search import Searcher

from visiontuner.experiment import Experiment
from visiontuner.journal import SearchRecord, best_epoch
from visiontuner.search.plan import Plan, PlannedTrial, trial_name
from visiontuner.search.space import Suggester


class PlanSearcher(Searcher):
    """Hands a plan to Ray Tune, one trial at a time, and tells Optuna how trials ended.

    Ray's own trial ids are forgotten here: `trial_id` in the config is the journal's.
    """

    def __init__(self, plan: Plan, experiment: Experiment, record: SearchRecord) -> None:
        super().__init__(metric=experiment.objective, mode=experiment.mode)
        self._known = deque(plan.known)
        self._suggestions_left = plan.suggestions
        self._next_number = plan.next_number
        self._stage = plan.stage
        self._record = record
        self._running: dict[str, PlannedTrial] = {}
        self._suggester: Suggester | None = None
        if experiment.search.algorithm == "optuna" and plan.suggestions:
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
        configuration = self._suggester.ask(name)
        return PlannedTrial(
            trial_id=name, attempt=1, configuration=configuration, stage=self._stage
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its journal, never from Ray's snapshot."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""
