"""Searches side by side: how good each was after how many seconds and trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from visiontuner.evaluation.compare import IN_ORDER, Mode, RunSummary, mode_of

_MOST_TOLD = 6


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """The best so far of one search, a point for each trial that ended, in the order they did.

    `seconds` are wall time since the search began (features included, and pauses before a resume),
    `best` is NaN until a trial ended in order. All three have shape (num_trials,), float64 but
    for the names.
    """

    name: str
    objective: str
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]
    best: NDArray[np.float64]
    trials: tuple[str, ...]

    @property
    def mode(self) -> Mode:
        return mode_of(self.objective)

    @property
    def final(self) -> float:
        return float(self.best[-1]) if len(self.best) else math.nan

    def reached(self, value: float) -> int | None:
        """The first position at which the best so far is at least as good as a value."""
        at_least = self.best <= value if self.mode == "min" else self.best >= value
        return int(np.argmax(at_least)) if at_least.any() else None


def search_progress(runs: Sequence[RunSummary]) -> list[SearchProgress]:
    """One for each search that has an ended trial and says what it optimised."""
    groups: dict[tuple[str, str], list[RunSummary]] = {}
    for run in runs:
        if run.trial_id:
            groups.setdefault((run.search_id, run.search), []).append(run)
    found = [_progress(name, members) for (_, name), members in groups.items()]
    return [progress for progress in found if progress is not None]


def describe_progress(searches: Sequence[SearchProgress]) -> list[str]:
    """A sentence for each search, the best first, then how each pair of the best three compares."""
    if len({search.objective for search in searches}) > 1:
        told = [_outcome(search) for search in searches[:_MOST_TOLD]]
        return [*told, *_rest(searches), "They optimised different things, so none is ahead."]
    ranked = sorted(searches, key=_rank)
    told = [_outcome(search) for search in ranked[:_MOST_TOLD]] + _rest(ranked)
    pairs = [_comparison(a, b) for a, b in combinations(ranked[:3], 2) if _comparable(a, b)]
    if pairs:
        pairs.append("One search each: whether a difference is more than chance is not said here.")
    return told + pairs


def _progress(name: str, runs: Sequence[RunSummary]) -> SearchProgress | None:
    objective = next((run.objective for run in runs if run.objective), None)
    ended = sorted(
        (r for r in runs if r.ended is not None and r.state not in ("running", "interrupted")),
        key=lambda r: (r.ended or 0.0, r.trial_id),
    )
    if objective is None or not ended:
        return None
    starts = [r.started if r.search_started is None else r.search_started for r in runs]
    began = min((start for start in starts if start is not None), default=ended[0].ended or 0.0)
    values = np.array([_value(run) for run in ended], dtype=float)
    keep_better = np.fmin if mode_of(objective) == "min" else np.fmax
    return SearchProgress(
        name=name,
        objective=objective,
        seconds=np.array([max(0.0, (run.ended or began) - began) for run in ended]),
        values=values,
        best=keep_better.accumulate(values),
        trials=tuple(run.trial_id for run in ended),
    )


def _value(run: RunSummary) -> float:
    usable = run.state in IN_ORDER and run.best_value is not None and math.isfinite(run.best_value)
    return float(run.best_value) if usable and run.best_value is not None else math.nan


def _outcome(search: SearchProgress) -> str:
    count, last = len(search.trials), _seconds(search.seconds[-1])
    head = f"{search.name}: {_trials(count)} in {last}"
    position = search.reached(search.final)
    if position is None:
        return f"{head}, none of them ended in order."
    when = _seconds(search.seconds[position])
    return (
        f"{head}, best {search.objective} {search.final:.4f} ({search.trials[position]}) "
        f"after {when} and {_trials(position + 1)}."
    )


def _rest(searches: Sequence[SearchProgress]) -> list[str]:
    left = len(searches) - _MOST_TOLD
    return [f"And {left} more."] if left > 0 else []


def _rank(search: SearchProgress) -> tuple[bool, float, float]:
    """Best in the end first, the sooner of equals; last those without a result."""
    if not _has_result(search):
        return (True, 0.0, 0.0)
    value = search.final if search.mode == "min" else -search.final
    return (False, value, float(search.seconds[search.reached(search.final) or 0]))


def _comparable(leader: SearchProgress, other: SearchProgress) -> bool:
    return _has_result(leader) and _has_result(other)


def _has_result(search: SearchProgress) -> bool:
    return math.isfinite(search.final)


def _comparison(leader: SearchProgress, other: SearchProgress) -> str:
    gap = abs(leader.final - other.final)
    position = leader.reached(other.final)
    needed = other.reached(other.final)
    assert position is not None
    assert needed is not None
    end = f"ends {gap:.4f} better than" if gap else "ends as good as"
    return (
        f"{leader.name} {end} {other.name}; it reached {other.final:.4f} after "
        f"{_seconds(leader.seconds[position])} and {_trials(position + 1)}, {other.name} after "
        f"{_seconds(other.seconds[needed])} and {_trials(needed + 1)}."
    )


def _trials(count: int) -> str:
    return f"{count:,} trial" + ("" if count == 1 else "s")


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 180 else f"{value / 60:.1f} min"
