"""What a search can take over from an earlier one: configurations to begin with, trials to tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visiontuner.experiment.schema import Configuration, Experiment
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.search.plan import settings_of, stages_of
from visiontuner.search.space import ToldTrial, WarmStart, clean

MOST_FIRST = 3
"""Configurations that a search begins with; more would be a second run of the earlier search."""
_GOOD = 0.5
"""The share of the earlier trials that they are taken from."""

# Neither of them changes what a configuration is worth.
_WITHOUT_EFFECT = ("workers", "micro_batch_size", "record_every_steps", "refit")


@dataclass(frozen=True, kw_only=True)
class TakenOver:
    """A warm start, and what is to be said of it.

    Args:
        first_trials: the earlier trials whose configurations are tried first, in order.
        notes: whole sentences for people.
    """

    start: WarmStart
    first_trials: tuple[str, ...]
    notes: tuple[str, ...]


def take_over(
    record: SearchRecord, theirs: Experiment, ours: Experiment, *, same_classes: bool
) -> TakenOver:
    """The best configurations of an earlier search, and its trials for Optuna.

    A configuration is taken with a value for every searched name: the earlier trial's, or what that
    search had fixed. It is taken if the space holds all of them. Trials are told where the value
    means the same: same objective, classes and network.

    Args:
        record: of the earlier search, with usable trials.
        theirs: its experiment; `ours` is the new search's.
        same_classes: whether both searches tell the same classes apart.
    """
    theirs, ours = stages_of(theirs)[0].experiment, stages_of(ours)[0].experiment
    ranking = record.searching().ranking()
    fitting = {
        trial.trial_id: configuration
        for trial in ranking
        if (configuration := _in_space(trial, theirs, ours)) is not None
    }
    first = _best(ranking, fitting, theirs, ours)
    reason = _why_not_told(theirs, ours, same_classes=same_classes)
    told = [] if reason else _told(ranking, fitting, theirs, ours)
    notes = [_describe_first(tuple(first), ours)]
    if ours.search.algorithm == "optuna":
        notes.append(_describe_told(len(told), len(ranking), len(fitting), reason))
    differing = _differing_training(theirs, ours)
    if told and differing:
        notes.append(f"They were trained otherwise: {', '.join(differing)}.")
    start = WarmStart(first=tuple(first.values()), told=tuple(told))
    return TakenOver(start=start, first_trials=tuple(first), notes=tuple(notes))


def _in_space(trial: TrialRecord, theirs: Experiment, ours: Experiment) -> Configuration | None:
    """The trial's values for the names that are searched now; None if one lies outside."""
    values: Mapping[str, Any] = {
        **settings_of(theirs.training, trial.configuration).model_dump(),
        "backbone": _network_of(trial, theirs),
    }
    space = ours.search.space
    if not all(domain.holds(values[name]) for name, domain in space.items()):
        return None
    return clean(values, space)


def _network_of(trial: TrialRecord, theirs: Experiment) -> str:
    return str(trial.configuration.get("backbone", theirs.model.backbone))


def _best(
    ranking: list[TrialRecord],
    fitting: Mapping[str, Configuration],
    theirs: Experiment,
    ours: Experiment,
) -> dict[str, Configuration]:
    """By trial id, the best first; those of a network that is searched now before all others.

    Only of the better half: three of four trials would be the bad ones as well.
    """
    good = ranking[: math.ceil(_GOOD * len(ranking))]
    networks = ours.search.backbones or (ours.model.backbone,)
    own = [clean(c, ours.search.space) for c in ours.first_trials()]
    found: dict[str, Configuration] = {}
    for trial in sorted(good, key=lambda t: _network_of(t, theirs) not in networks):
        configuration = fitting.get(trial.trial_id)
        known = configuration is None or configuration in own or configuration in found.values()
        if configuration is not None and not known and len(found) < MOST_FIRST:
            found[trial.trial_id] = configuration
    return found


def _why_not_told(theirs: Experiment, ours: Experiment, *, same_classes: bool) -> str | None:
    """Why no trial's value can be compared; None if some can."""
    if not same_classes:
        return "the classes are others"
    if theirs.objective != ours.objective:
        return f"the objective was {theirs.objective} and is {ours.objective}"
    for name in ("train", "image_size", "weights", "views"):
        old, new = getattr(theirs.model, name), getattr(ours.model, name)
        if old != new:
            return f"model.{name} was {old} and is {new}"
    networks = ours.search.backbones or (ours.model.backbone,)
    if not {*networks} & {*(theirs.search.backbones or (theirs.model.backbone,))}:
        was = ", ".join(theirs.search.backbones or (theirs.model.backbone,))
        return f"the network was {was} and is {', '.join(networks)}"
    return None


def _told(
    ranking: list[TrialRecord],
    fitting: Mapping[str, Configuration],
    theirs: Experiment,
    ours: Experiment,
) -> list[ToldTrial]:
    if ours.search.algorithm != "optuna":
        return []
    networks = ours.search.backbones or (ours.model.backbone,)
    return [
        ToldTrial(
            trial_id=trial.trial_id,
            configuration=fitting[trial.trial_id],
            value=trial.best_value,
        )
        for trial in sorted(ranking, key=lambda trial: trial.trial_id)
        if trial.trial_id in fitting
        and trial.best_value is not None
        and _network_of(trial, theirs) in networks
    ]


def _describe_first(trials: tuple[str, ...], ours: Experiment) -> str:
    if not trials:
        space = ", ".join(f"{name} {domain}" for name, domain in ours.search.space.items())
        return f"None of its other good configurations lies in the search space ({space})."
    own = "the defaults, then " if ours.first_trials() else ""
    return f"Tried first: {own}the configuration{'s' * (len(trials) > 1)} of {', '.join(trials)}."


def _describe_told(told: int, usable: int, fitting: int, reason: str | None) -> str:
    if reason is not None:
        return f"Optuna is told none of its trials: {reason}."
    trials = f"{usable} trial{'s' * (usable != 1)}"
    number = f"its {trials}" if told == usable else f"{told} of its {trials}"
    counts = {"outside the search space": usable - fitting, "of other networks": fitting - told}
    left = "".join(f"; {count} are {what}" for what, count in counts.items() if count)
    return f"Optuna is told {number}{left}."


def _differing_training(theirs: Experiment, ours: Experiment) -> list[str]:
    """Settings that were others and that neither search looked at: `epochs 5, now 20`."""
    searched = {*theirs.search.space, *ours.search.space, *_WITHOUT_EFFECT}
    old, new = theirs.training.model_dump(mode="json"), ours.training.model_dump(mode="json")
    return [
        f"{name} {_short(old[name])}, now {_short(new[name])}"
        for name in new
        if name not in searched and old[name] != new[name]
    ]


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return "of its own"
    return "none" if value is None else str(value)
