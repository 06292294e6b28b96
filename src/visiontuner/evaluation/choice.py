"""Which trial of a search is kept, and whether the search space was large enough."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import eye_array

from visiontuner.evaluation.baselines import REGRESSION
from visiontuner.evaluation.calibration import image_losses
from visiontuner.evaluation.intervals import (
    CONFIDENCE,
    SIGNIFICANCE_LEVEL,
    Interval,
    resampled_sums,
    share_interval,
    sign_flipped_sums,
)
from visiontuner.experiment.schema import INTEGERS, Domain, Objective, Range, Space, Values
from visiontuner.journal import Event, SearchRecord, TrialRecord

# Which trial of a search is kept: the best one, or one that cannot be told apart from it.


Preference = Literal["best", "cheapest", "fastest"]

# Equal sums of floats, added in another order.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The trial to keep.

    Args:
        best: the trial with the best objective.
        tied: trials that cannot be told apart from it, best first, `best` included.
        chosen: one of `tied`.
        reason: one sentence.
    """

    best: str
    tied: tuple[str, ...]
    chosen: str
    reason: str


def image_scores(
    logits: NDArray[np.floating], labels: NDArray[np.integer], objective: Objective
) -> NDArray[np.float64]:
    """What the objective is made of, for each validation image; higher is better.

    For `validation_loss` the image's loss with its sign changed, for `validation_accuracy` 1 for
    a right answer and 0 for a wrong one. Macro F1 is no mean over images; its nearest relative,
    macro recall, is: right answers, weighted so that every class has the same say.

    Args:
        logits: float, shape (N, C).
        labels: int, shape (N,), values in [0, C).

    Returns:
        float64, shape (N,).
    """
    correct = np.argmax(logits, axis=1) == labels
    return scores_of_answers(correct, image_losses(logits, labels), labels, objective)


def scores_of_answers(
    correct: NDArray[np.generic],
    losses: NDArray[np.floating],
    labels: NDArray[np.integer],
    objective: Objective,
) -> NDArray[np.float64]:
    """The same from what is kept of every trial.

    Args:
        correct: bool or uint8, shape (N,): whether each answer is right.
        losses: float, shape (N,): of each image in nats.
        labels: int, shape (N,).
    """
    if objective == "validation_loss":
        return -losses.astype(np.float64)
    scores: NDArray[np.float64] = correct.astype(np.float64)
    if objective == "validation_macro_f1":
        counts = np.bincount(labels)
        scores *= len(labels) / ((counts > 0).sum() * counts[labels])
    return scores


def tied_with_best(
    values: Mapping[str, NDArray[np.floating]],
    best: str,
    *,
    seed: int = 7,
    resamples: int = 2000,
) -> tuple[str, ...]:
    """Trials that the validation images cannot tell apart from the best.

    The best of many equal trials is ahead of the others by luck, and more so the more there are. So
    a gap counts, in units of its standard error, if it is larger than 95 % of the largest gaps that
    the best of equally good trials has: the images are drawn again, and every trial's mean is
    taken off. Trials that are behind leave, and the others are asked again without them. Besides,
    fewer than 5 % of the gaps that chance makes by flipping the images' signs may be as large.

    Args:
        values: by trial id: float, shape (N,), a score of each image, higher is better, the same
            images in the same order; see `image_scores`.

    Returns:
        Trial ids, `best` first, then by mean score; of equals by id.

    Raises:
        ValueError: `best` is not among them, the images differ, or a score is not finite.

    Source: Westfall and Young 1993, chapter 2 (step-down); Hansen et al. 2011,
        https://doi.org/10.3982/ECTA5771; Efron and Tibshirani 1993, chapter 15
    """
    ids = [best, *sorted(trial_id for trial_id in values if trial_id != best)]
    scores = _columns(values, ids)
    gaps = scores[:, :1] - scores  # (N, T): by how much the best is ahead on each image
    gap, total = gaps.mean(axis=0), len(gaps)
    by_chance = np.abs(sign_flipped_sums(gaps, seed=seed, resamples=resamples)) / total
    p_value = (by_chance >= np.abs(gap) - _ROUNDING).mean(axis=0)
    ahead = _beyond_the_luck_of_the_best(scores, seed=seed, resamples=resamples)
    behind = ahead & (p_value < SIGNIFICANCE_LEVEL)
    tied = [i for i in range(1, len(ids)) if not behind[i]]
    tied.sort(key=lambda i: (gap[i], ids[i]))
    return (best, *(ids[i] for i in tied))


def _beyond_the_luck_of_the_best(
    scores: NDArray[np.float64], *, seed: int, resamples: int
) -> NDArray[np.bool_]:
    """Which trials, shape (T,), are further behind the first than equally good ones would be.

    Args:
        scores: float64, shape (N, T), of the best trial in the first column.
    """
    total, trials = scores.shape
    means = scores.mean(axis=0)
    luck = resampled_sums(scores, seed=seed, resamples=resamples) / total - means  # (R, T)
    covariance = np.atleast_2d(np.cov(scores, rowvar=False, ddof=0)) / max(total - 1, 1)

    def in_errors(best: NDArray[np.int64], gaps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Gaps (R, T) of all trials to each of `best` (R,) in their standard errors."""
        variance = covariance.diagonal()
        squared = variance[best][:, None] + variance - 2 * covariance[best]
        error = np.sqrt(np.maximum(squared, 0))
        certain = np.where(gaps > _ROUNDING, np.inf, 0.0)  # the same gap on every image
        ratios: NDArray[np.float64] = np.divide(gaps, error, out=certain, where=error > _ROUNDING)
        return ratios

    ahead = in_errors(np.zeros(1, dtype=np.int64), means[:1, None] - means)[0]
    left = np.ones(trials, dtype=bool)
    while True:
        among = np.where(left, luck, -np.inf)
        best = among.argmax(axis=1)
        gaps = np.where(left, luck.take(best + trials * np.arange(resamples))[:, None] - luck, 0.0)
        largest = in_errors(best, gaps).max(axis=1)
        behind = left & (ahead > np.quantile(largest, CONFIDENCE))
        if not behind.any():
            return ~left
        left &= ~behind


def corrected_for_choice(
    scores: NDArray[np.floating],
    ranking: NDArray[np.floating],
    *,
    seed: int = 7,
    resamples: int = 500,
) -> float:
    """The mean score to expect, on other images, of the trial that `ranking` chooses.

    The chosen trial's own mean is too good, since luck had a say in the choice. So a trial is
    chosen on images that were drawn again, and scored on those that were not drawn; this is the
    mean over all draws. `intervals.share_interval` of the corrected hits has its interval.

    Args:
        scores: float, shape (N, T), what is told of each image: 1 for a right answer, or a loss.
        ranking: float, shape (N, T), by whose mean a trial is chosen, higher is better; of equals
            the first.

    Raises:
        ValueError: the shapes differ, or there are fewer than two images.

    Source: Tsamardinos et al. 2018 (BBC-CV), https://doi.org/10.1007/s10994-018-5714-4
    """
    scores, ranking = (np.asarray(a, dtype=np.float64) for a in (scores, ranking))
    if scores.ndim != 2 or scores.shape != ranking.shape or len(scores) < 2:
        raise ValueError(
            f"needs two images and the same trials, got {scores.shape} and {ranking.shape}"
        )
    # Of one column for each image the sums are how often it was drawn.
    drawn = resampled_sums(eye_array(len(scores)).tocsr(), seed=seed, resamples=resamples)  # (R, N)
    chosen = (drawn @ ranking).argmax(axis=1)
    left_out = drawn == 0
    known = left_out.any(axis=1)
    sums = (left_out * scores[:, chosen].T).sum(axis=1)
    return float((sums[known] / left_out[known].sum(axis=1)).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A trial or a baseline, and what it answered to the images that all are judged by.

    Args:
        name: of the trial or the baseline.
        value: the objective.
        correct: bool, shape (N,).
        losses: float, shape (N,), in nats, before any temperature.
        seconds: of training; None if unknown.
        can_be_kept: whether its weights are there or a matter of seconds.
        is_network: whether more than a head was trained.
    """

    name: str
    value: float
    correct: NDArray[np.bool_]
    losses: NDArray[np.floating]
    seconds: float | None = None
    can_be_kept: bool = True
    is_network: bool = False


# One-sided, 5 %: by how many standard errors a loss must be lower to count as lower.
_LOWER = 1.645


def choose(
    candidates: Sequence[Candidate],
    labels: NDArray[np.integer],
    *,
    objective: Objective,
    mode: Literal["min", "max"],
    simplest: Sequence[str] = (),
    prefer: Literal["best", "cheapest"] = "best",
) -> Choice:
    """Pick what to keep: of all that are tied by the objective the one with the lowest loss.

    A loss tells more of each image than whether the answer is right, and so is less a matter of
    luck. A head is kept only if its loss is lower than that of the simplest beyond noise (one-sided
    paired test at 5 %): on photographs that was better than the lowest loss in itself, most of all
    where there are few images (docs/evaluation.md).

    Args:
        candidates: trials and baselines; at least one, all of the same N images.
        labels: int, shape (N,).
        simplest: names, the first that is tied counts: a regression, then the defaults.
        prefer: `cheapest` takes the one with the fewest training seconds among the tied.

    Raises:
        ValueError: there is nothing to choose from.
    """
    if not candidates:
        raise ValueError("nothing to choose from")
    by_name = {candidate.name: candidate for candidate in candidates}
    sign = 1 if mode == "min" else -1
    best = min(candidates, key=lambda c: (sign * c.value, float(c.losses.mean()))).name
    scores = {c.name: scores_of_answers(c.correct, c.losses, labels, objective) for c in candidates}
    tied = tied_with_best(scores, best)
    possible = [by_name[name] for name in tied if by_name[name].can_be_kept] or [by_name[best]]
    if prefer == "cheapest":
        timed = [c for c in possible if c.seconds is not None]
        chosen = min(timed, key=lambda c: (c.seconds, tied.index(c.name)), default=by_name[best])
        reason = _cheapest_words(by_name[best], chosen, tied)
        return Choice(best=best, tied=tied, chosen=chosen.name, reason=reason)
    chosen = min(possible, key=lambda c: (float(c.losses.mean()), c.seconds or 0.0))
    simple = next((by_name[n] for n in simplest if by_name.get(n) in possible), None)
    if simple is not None and not chosen.is_network and not _is_lower(chosen, simple):
        chosen = simple
    defaults = any(name in tied for name in simplest if name not in (best, REGRESSION))
    reason = f"{best} has the best objective; {_tied_words(len(tied) - 1, defaults=defaults)}."
    if chosen.name != best:
        why = "the lowest loss of those" if chosen is not simple else "as good and the simplest"
        reason += f" {chosen.name} is kept: {why}."
    return Choice(best=best, tied=tied, chosen=chosen.name, reason=reason)


def _is_lower(one: Candidate, other: Candidate) -> bool:
    """Whether a loss is lower than another beyond noise, by the same images."""
    gaps = other.losses.astype(np.float64) - one.losses
    if one is other or len(gaps) < 2:
        return False
    return bool(gaps.mean() > _LOWER * gaps.std(ddof=1) / math.sqrt(len(gaps)))


def _cheapest_words(best: Candidate, chosen: Candidate, tied: Sequence[str]) -> str:
    if chosen is not best:
        than = "" if best.seconds is None else f" instead of {best.seconds:.1f} s"
        return (
            f"{chosen.name} is statistically tied with {best.name}, which has the best objective, "
            f"and took {chosen.seconds:.1f} s of training{than}."
        )
    if len(tied) > 1:
        return f"{best.name} has the best objective and is the cheapest of the {len(tied)} tied."
    return f"{best.name} has the best objective; {_tied_words(0)}."


# What an accuracy on the first page may need in memory: resamples x images x 8 bytes.
_RESAMPLED_NUMBERS = 3e7


def estimate_accuracy(correct: NDArray[np.bool_], losses: NDArray[np.floating]) -> Interval:
    """The kept model's accuracy on other images, corrected for having been chosen by its loss.

    Args:
        correct: bool, shape (N, T), of all that was chosen among.
        losses: float, shape (N, T).

    Returns:
        The estimate with its 95 % interval.
    """
    total = len(correct)
    resamples = int(np.clip(_RESAMPLED_NUMBERS / total, 20, 500))
    value = corrected_for_choice(correct.astype(np.float64), -losses, resamples=resamples)
    return share_interval(min(max(value, 0.0), 1.0) * total, total)


class Told(NamedTuple):
    """What `describe_gain` tells of: a name for people, the candidate's, its objective."""

    label: str
    name: str
    value: float


def describe_gain(
    search: Told, others: Sequence[Told], tied: Collection[str], *, objective: Objective
) -> str:
    """One line: what the search gave beside what there is without it.

    Args:
        search: its best trial.
        others: baselines and the defaults.
        tied: candidates that cannot be told apart from the best.
    """
    told = [f"{t.label} {_objective_words(t.value, objective)}" for t in (search, *others)]
    rivals = [t.label for t in others if t.name in tied]
    if search.name not in tied:
        end = f"the search is behind {' and '.join(rivals) or 'them'}"
    elif rivals:
        end = "tied; the search gained nothing here"
    else:
        end = "the search is ahead beyond noise"
    return f"{', '.join(told)}: {end}."


def describe_networks(record: SearchRecord) -> str | None:
    """One line: the best value of each network; None where one alone was tried."""
    told = [
        f"{name} {_objective_words(trial.best_value or math.nan, record.objective)}"
        + _stopped_words(record.stopped.get(name))
        for name, trial in record.best_by_network().items()
    ]
    told += [f"{name} left out" for name in record.left_out]
    return f"Networks: {', '.join(told)}." if len(told) > 1 else None


def _stopped_words(event: Event | None) -> str:
    return "" if event is None else f" (stopped after {event['trials']} trials)"


def _objective_words(value: float, objective: str) -> str:
    return f"{value:.4f}" if objective == "validation_loss" else f"{100 * value:.1f} %"


def training_seconds(record: SearchRecord) -> dict[str, float]:
    """Seconds by trial id, the sum of its epochs; trials without epochs are left out."""
    totals = {}
    for trial in record.trials.values():
        _, seconds = trial.curve("epoch_seconds")
        if seconds and np.isfinite(seconds).all():
            totals[trial.trial_id] = float(sum(seconds))
    return totals


def _columns(values: Mapping[str, NDArray[np.floating]], ids: Sequence[str]) -> NDArray[np.float64]:
    if ids[0] not in values:
        raise ValueError(f"the best trial {ids[0]} has no scores")
    shapes = {np.shape(values[trial_id]) for trial_id in ids}
    if len(shapes) > 1 or shapes == {(0,)}:
        raise ValueError(f"every trial needs the scores of the same images, got {sorted(shapes)}")
    scores = np.stack([values[trial_id] for trial_id in ids], axis=1).astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    return scores


def _tied_words(others: int, *, defaults: bool = False) -> str:
    if not others:
        return "no other trial is tied with it"
    among = ", the defaults among them," if defaults and others > 1 else ""
    are = "others" + among + " are" if others > 1 else "other is"
    return f"{others} {are} statistically tied with it"


# Where the best trial lies at the edge of the search space, and where to search next.


Side = Literal["lower", "upper"]

# Of the range's span, on its own scale.
_EDGE_SHARE = 0.05
_MIN_VALUES = 3
# Of the importance that each value would have if all were alike.
_UNIMPORTANT_SHARE = 0.5
_NEW_VALUES = 2
# Values that about double or more go on by factors, others by steps.
_DOUBLING = 1.9
_ABOVE_ZERO = 1e-12
# How far a suggestion may go: beyond it the value is not allowed, or no longer makes sense.
_LIMITS: dict[str, tuple[float, float]] = {
    "learning_rate": (_ABOVE_ZERO, math.inf),
    "weight_decay": (0.0, math.inf),
    "dropout": (0.0, 0.9),
    "label_smoothing": (0.0, 0.9),
    "batch_size": (1, math.inf),
    "epochs": (1, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class EdgeFinding:
    """A searched value whose optimum may lie outside what was searched.

    Args:
        value: the best trial's.
        searched: the domain, in words.
        next: what to search next, as `search.space` has it in the experiment file.
    """

    name: str
    value: float
    side: Side
    searched: str
    next: str

    @property
    def sentence(self) -> str:
        return (
            f"{self.name}: the best value {self.value:.3g} lies at the {self.side} edge of "
            f"{self.searched}; search {self.next} next."
        )


def edges(
    record: SearchRecord,
    space: Space,
    *,
    tied: Collection[str] = (),
    importance: Mapping[str, float] | None = None,
) -> list[EdgeFinding]:
    """Searched values of the best trial that lie at an edge of the search space.

    A range has its edges in the outer 5 % of its span, on its own scale; a list of three or more
    numbers in its lowest and highest one. A trial of a second stage counts as the one it began
    with. There is no finding where nothing can lie beyond (dropout 0, a batch of all training
    images), where a tied trial is away from that edge, or where the value hardly decides.

    Args:
        space: `experiment.search.space`.
        tied: trials that cannot be told apart from the best one.
        importance: by searched value, fractions that sum to 1, as far as they are known.
    """
    best = record.best and _searched(record, record.best)
    if best is None:
        return []
    rivals = [_searched(record, record.trials[name]) for name in tied if name in record.trials]
    found = []
    for name, domain in space.items():
        side = _side(domain, best, name)
        if side is None or _is_unimportant(name, importance or {}):
            continue
        if any(_side(domain, rival, name) != side for rival in rivals):
            continue
        following = _next(domain, side, _limits(name, record), whole=name in INTEGERS)
        if following is not None:
            found.append(
                EdgeFinding(
                    name=name,
                    value=float(best.configuration[name]),
                    side=side,
                    searched=str(domain),
                    next=_yaml(following),
                )
            )
    return found


def _searched(record: SearchRecord, trial: TrialRecord) -> TrialRecord:
    """The trial whose values were searched: of one of a second stage, the one it started from."""
    return record.trials.get(trial.starts_from or "", trial)


def _is_unimportant(name: str, importance: Mapping[str, float]) -> bool:
    return name in importance and importance[name] < _UNIMPORTANT_SHARE / len(importance)


def _side(domain: Domain, trial: TrialRecord, name: str) -> Side | None:
    """At which edge of the domain a trial's value lies."""
    value = trial.configuration.get(name)
    if isinstance(value, str) or value is None:
        return None
    if isinstance(domain, Range):
        share = _share_of_span(domain, float(value))
    else:
        numbers = _numbers(domain)
        if len(numbers) < _MIN_VALUES or value not in numbers:
            return None
        share = numbers.index(value) / (len(numbers) - 1)
        if 0 < share < 1:
            return None
    if share <= _EDGE_SHARE:
        return "lower"
    return "upper" if share >= 1 - _EDGE_SHARE else None


def _share_of_span(domain: Range, value: float) -> float:
    low, high = domain.low, domain.high
    if domain.scale == "log":
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _numbers(domain: Values) -> list[float]:
    """The values in order; empty if one of them is a word."""
    numbers = [value for value in domain.values if not isinstance(value, str)]
    return sorted(numbers) if len(numbers) == len(domain.values) else []


def _limits(name: str, record: SearchRecord) -> tuple[float, float]:
    low, high = _LIMITS.get(name, (-math.inf, math.inf))
    if name == "batch_size":
        counts = record.started.get("data", {}).get("counts", {})
        high = float(counts.get("train") or math.inf)
    return low, high


def _next(domain: Domain, side: Side, limits: tuple[float, float], *, whole: bool) -> Domain | None:
    """The domain to search next, with the edge in its middle; None if nothing lies beyond."""
    if isinstance(domain, Range):
        edge = domain.low if side == "lower" else domain.high
        candidate: Domain | None = _next_range(domain, edge, limits, whole=whole)
    else:
        numbers = _numbers(domain)
        edge = numbers[0] if side == "lower" else numbers[-1]
        candidate = _next_values(numbers, side, limits, whole=whole)
    reach = _extreme(candidate, side)
    beyond = reach is not None and (reach < edge if side == "lower" else reach > edge)
    return candidate if beyond else None


def _next_range(
    domain: Range, edge: float, limits: tuple[float, float], *, whole: bool
) -> Range | None:
    """A decade to both sides on a log scale, else half the span; never wider than before."""
    scale: Literal["linear", "log"] = domain.scale
    low, high = edge - (domain.high - domain.low) / 2, edge + (domain.high - domain.low) / 2
    if scale == "log" or (low <= 0 and limits[0] == _ABOVE_ZERO):
        factor = min(10.0, domain.high / domain.low)
        scale, low, high = "log", edge / factor, edge * factor
    low, high = max(low, limits[0]), min(high, limits[1])
    if whole:
        low, high = round(low), round(high)
    return Range(low=low, high=high, scale=scale) if low < high else None


def _next_values(
    numbers: list[float], side: Side, limits: tuple[float, float], *, whole: bool
) -> Values:
    """The last two values and two beyond, which go on as the last two do: times, or plus."""
    inner, edge = (numbers[1], numbers[0]) if side == "lower" else (numbers[-2], numbers[-1])
    times = min(inner, edge) > 0 and max(inner / edge, edge / inner) >= _DOUBLING
    beyond = [
        edge * (edge / inner) ** n if times else edge + (edge - inner) * n
        for n in range(1, _NEW_VALUES + 1)
    ]
    if whole:
        beyond = [round(value) for value in beyond if value >= 1]
    allowed = {float(f"{value:.4g}") for value in beyond if limits[0] <= value <= limits[1]}
    kept = sorted({inner, edge, *(int(v) if whole else v for v in allowed)})
    return Values(values=tuple(kept))


def _extreme(domain: Domain | None, side: Side) -> float | None:
    if domain is None:
        return None
    if isinstance(domain, Range):
        return domain.low if side == "lower" else domain.high
    numbers = _numbers(domain)
    return numbers[0] if side == "lower" else numbers[-1]


def _yaml(domain: Domain) -> str:
    if isinstance(domain, Values):
        return f"{{values: [{', '.join(_number(float(v)) for v in domain.values)}]}}"
    scale = ", scale: log" if domain.scale == "log" else ""
    return f"{{low: {_number(domain.low)}, high: {_number(domain.high)}{scale}}}"


def _number(value: float) -> str:
    """As YAML reads it as a number: an exponent needs a dot before it."""
    text = f"{value:.4g}"
    if "e" in text and "." not in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa}.0e{exponent}"
    return text
