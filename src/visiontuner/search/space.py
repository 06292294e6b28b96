"""What is searched -> configurations, drawn beforehand or suggested by Optuna one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from visiontuner.experiment.schema import INTEGERS, Configuration, Domain, Experiment, Values


def to_distributions(space: Mapping[str, Domain]) -> dict[str, BaseDistribution]:
    """Optuna's distribution for every searched name; names in INTEGERS give whole numbers."""
    return {name: _to_distribution(name, domain) for name, domain in space.items()}


def draw_beforehand(experiment: Experiment) -> list[Configuration]:
    """All configurations of a random or grid search, `first` leading, from the seed alone.

    The same experiment gives the same list, which is what lets an interrupted search end with the
    trials of an uninterrupted one. A grid is run whole, whatever `search.trials` says.
    """
    search = experiment.search
    first = [clean(configuration, search.space) for configuration in experiment.first_trials()]
    if search.algorithm == "grid":
        return first + [c for c in _grid(search.space) if c not in first]
    sampler = optuna.samplers.RandomSampler(seed=experiment.seed)
    study = _quiet_study(sampler, "maximize")
    distributions = to_distributions(search.space)
    wanted = max(0, search.trials - len(first))
    drawn = [clean(study.ask(distributions).params, search.space) for _ in range(wanted)]
    return (first + drawn)[: search.trials]


class Suggester:
    """Optuna's TPE behind ask and tell; results of an earlier process can be told as well."""

    def __init__(self, experiment: Experiment, *, trials_told: int = 0) -> None:
        self._space = experiment.search.space
        self._distributions = to_distributions(self._space)
        # A resumed search must not draw its first process's random start once more.
        sampler = optuna.samplers.TPESampler(seed=experiment.seed + trials_told)
        self._study = _quiet_study(sampler, "minimize" if experiment.mode == "min" else "maximize")
        self._asked: dict[str, optuna.Trial] = {}

    def ask(self, trial_id: str) -> Configuration:
        trial = self._study.ask(self._distributions)
        self._asked[trial_id] = trial
        return clean(trial.params, self._space)

    def tell(self, trial_id: str, configuration: Configuration, value: float | None) -> None:
        """One ended trial's objective; None for a failed trial."""
        asked = self._asked.pop(trial_id, None)
        state = optuna.trial.TrialState.COMPLETE if value is not None else _FAIL
        if asked is not None:
            self._study.tell(asked, value, state=state)
        else:
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=dict(configuration),
                    distributions=self._distributions,
                    value=value,
                    state=state,
                )
            )


_FAIL = optuna.trial.TrialState.FAIL


def clean(configuration: Mapping[str, Any], space: Mapping[str, Domain]) -> Configuration:
    """Values as plain int, float and str, names in the order of the space."""
    return {name: _clean_value(name, configuration[name]) for name in space}


def _clean_value(name: str, value: Any) -> float | int | str:
    if isinstance(value, str):
        return value
    return int(value) if name in INTEGERS else float(value)


def _to_distribution(name: str, domain: Domain) -> BaseDistribution:
    if isinstance(domain, Values):
        return CategoricalDistribution([_clean_value(name, value) for value in domain.values])
    log = domain.scale == "log"
    if name in INTEGERS:
        return IntDistribution(int(domain.low), int(domain.high), log=log)
    return FloatDistribution(domain.low, domain.high, log=log)


def _grid(space: Mapping[str, Domain]) -> list[Configuration]:
    choices = [d.values for d in space.values() if isinstance(d, Values)]
    rows = [dict(zip(space, values, strict=True)) for values in itertools.product(*choices)]
    return [clean(row, space) for row in rows]


def _quiet_study(
    sampler: optuna.samplers.BaseSampler, direction: Literal["minimize", "maximize"]
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction=direction, sampler=sampler)
