"""What is searched -> configurations, drawn beforehand or suggested by Optuna one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from visiontuner.experiment.schema import INTEGERS, Configuration, Domain, Experiment, Values
from visiontuner.journal import SearchRecord


@dataclass(frozen=True, kw_only=True)
class ToldTrial:
    """A trial of an earlier search as Optuna is told it."""

    trial_id: str
    configuration: Configuration
    value: float


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a search takes over from an earlier one; its journal's first line keeps it, as `from`.

    Args:
        first: configurations to try after the experiment's own first ones.
        told: trials that Optuna is told before it suggests the first configuration.
    """

    first: tuple[Configuration, ...] = ()
    told: tuple[ToldTrial, ...] = ()

    @classmethod
    def of(cls, record: SearchRecord) -> Self:
        """That of a search; empty for one that began without."""
        kept = record.started.get("from") or {}
        return cls(
            first=tuple(kept.get("first") or ()),
            told=tuple(ToldTrial(**trial) for trial in kept.get("told") or ()),
        )

    @property
    def seed_offset(self) -> int:
        """Added to the seed, or the draws of the earlier search would be repeated."""
        return len(self.first) + len(self.told)

    def for_backbone(self, name: str) -> Self:
        """What of it is about one of several networks, without `backbone`."""
        first = [_of_network(c) for c in self.first if c["backbone"] == name]
        told = [
            ToldTrial(
                trial_id=t.trial_id, configuration=_of_network(t.configuration), value=t.value
            )
            for t in self.told
            if t.configuration["backbone"] == name
        ]
        return type(self)(first=tuple(first), told=tuple(told))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `of` reads them back."""
        return {"first": [dict(c) for c in self.first], "told": [asdict(t) for t in self.told]}


NOTHING = WarmStart()


def _of_network(configuration: Configuration) -> Configuration:
    return {name: value for name, value in configuration.items() if name != "backbone"}


def leading(experiment: Experiment, start: WarmStart = NOTHING) -> list[Configuration]:
    """The configurations that a search begins with: its own first ones, then those taken over."""
    space = experiment.search.space
    own = [clean(configuration, space) for configuration in experiment.first_trials()]
    taken = [clean(configuration, space) for configuration in start.first]
    return own + [configuration for configuration in taken if configuration not in own]


def to_distributions(space: Mapping[str, Domain]) -> dict[str, BaseDistribution]:
    """Optuna's distribution for every searched name; names in INTEGERS give whole numbers."""
    return {name: _to_distribution(name, domain) for name, domain in space.items()}


def draw_beforehand(experiment: Experiment, start: WarmStart = NOTHING) -> list[Configuration]:
    """All configurations of a random or grid search, `leading` ones first, from the seed alone.

    The same experiment gives the same list, which is what lets an interrupted search end with the
    trials of an uninterrupted one. A grid is run whole, whatever `search.trials` says.
    """
    search = experiment.search
    first = leading(experiment, start)
    if search.algorithm == "grid":
        return first + [c for c in _grid(search.space) if c not in first]
    sampler = optuna.samplers.RandomSampler(seed=experiment.seed + start.seed_offset)
    study = _quiet_study(sampler, "maximize")
    distributions = to_distributions(search.space)
    wanted = max(0, search.trials - len(first))
    drawn = [clean(study.ask(distributions).params, search.space) for _ in range(wanted)]
    return (first + drawn)[: search.trials]


class Suggester:
    """Optuna's TPE behind ask and tell; results of an earlier process can be told as well."""

    def __init__(
        self, experiment: Experiment, *, trials_told: int = 0, start: WarmStart = NOTHING
    ) -> None:
        self._space = experiment.search.space
        self._distributions = to_distributions(self._space)
        # A resumed search must not draw its first process's random start once more.
        seed = experiment.seed + trials_told + start.seed_offset
        sampler = optuna.samplers.TPESampler(seed=seed)
        self._study = _quiet_study(sampler, "minimize" if experiment.mode == "min" else "maximize")
        self._asked: dict[str, optuna.Trial] = {}
        for trial in start.told:
            self.tell(trial.trial_id, clean(trial.configuration, self._space), trial.value)

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
