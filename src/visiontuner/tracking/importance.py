"""Which searched value decided the outcome: PED-ANOVA over the finished trials, by Optuna.

Not fANOVA: its forest needs scikit-learn, whose import alone costs 2 s at the end of a search.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from visiontuner.journal import SearchRecord, TrialRecord

MIN_TRIALS = 8
# A search has tens of trials: the best quarter of 16 is four, the usual tenth is one or two.
_BEST_SHARE = 0.25


def importances(record: SearchRecord) -> dict[str, float]:
    """How much each searched value decides whether a trial is among the best quarter.

    Returns:
        Fractions that sum to 1, by name; empty under 8 finished trials with finite values, or where
        nothing varied.

    Source: Watanabe et al. 2023, https://arxiv.org/abs/2304.10255
    """
    trials = [t for t in record.searching().ranking() if math.isfinite(t.best_value or 0.0)]
    trials = sorted(trials, key=lambda trial: trial.trial_id)
    names = [
        name
        for name in (trials[0].configuration if trials else {})
        if all(name in trial.configuration for trial in trials)
        and len({trial.configuration[name] for trial in trials}) > 1
    ]
    varied = len({trial.best_value for trial in trials}) > 1
    if len(trials) < MIN_TRIALS or not names or not varied:
        return {}
    return _ped_anova(trials, names, record.mode)


def _ped_anova(trials: list[TrialRecord], names: list[str], mode: str) -> dict[str, float]:
    import optuna
    from optuna.trial import create_trial

    with _without("sklearn"):
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's own notices
            study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
            domains = {name: _domain([t.configuration[name] for t in trials]) for name in names}
            for trial in trials:
                params: Mapping[str, Any] = {n: trial.configuration[n] for n in names}
                study.add_trial(
                    create_trial(params=dict(params), distributions=domains, value=trial.best_value)
                )
            evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
            shares = get_param_importances(study, evaluator=evaluator)
            return {name: float(share) for name, share in shares.items()}
    finally:
        optuna.logging.set_verbosity(verbosity)


def _domain(values: list[Any]) -> Any:
    """The domain that the values came from, as far as they show it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distinct = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(distinct) <= 6 or not all(isinstance(value, int | float) for value in distinct):
        return CategoricalDistribution(distinct)
    low, high = float(distinct[0]), float(distinct[-1])
    return FloatDistribution(low, high, log=low > 0 and high / low > 20)


@contextmanager
def _without(package: str) -> Iterator[None]:
    """As if a package were not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
