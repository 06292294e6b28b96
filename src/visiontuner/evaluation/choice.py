"""Which trial of a search is kept: the best one, or one that cannot be told apart from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visiontuner.evaluation.bootstrap import CONFIDENCE, resampled_sums, sign_flipped_sums
from visiontuner.evaluation.calibration import picture_losses
from visiontuner.evaluation.significance import SIGNIFICANCE_LEVEL
from visiontuner.experiment import Objective
from visiontuner.journal import SearchRecord

Preference = Literal["best", "cheapest"]

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


def picture_scores(
    logits: NDArray[np.floating], labels: NDArray[np.integer], objective: Objective
) -> NDArray[np.float64]:
    """What the objective is made of, for each validation picture; higher is better.

    For `validation_loss` the picture's loss with its sign changed, for `validation_accuracy` 1 for
    a right answer and 0 for a wrong one. Macro F1 is no mean over pictures; its nearest relative,
    macro recall, is: right answers, weighted so that every class has the same say.

    Args:
        logits: float, shape (N, C).
        labels: int, shape (N,), values in [0, C).

    Returns:
        float64, shape (N,).
    """
    correct = np.argmax(logits, axis=1) == labels
    return scores_of_answers(correct, picture_losses(logits, labels), labels, objective)


def scores_of_answers(
    correct: NDArray[np.generic],
    losses: NDArray[np.floating],
    labels: NDArray[np.integer],
    objective: Objective,
) -> NDArray[np.float64]:
    """The same from what is kept of every trial.

    Args:
        correct: bool or uint8, shape (N,): whether each answer is right.
        losses: float, shape (N,): of each picture in nats.
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
    """Trials that the validation pictures cannot tell apart from the best.

    As in `paired_test`, a trial is behind if both say so: the gap's paired bootstrap interval
    (95 %) excludes 0, and fewer than 5 % of the gaps that chance makes by flipping the pictures'
    signs are as large. Each trial is compared by itself, so of many equal trials a few fall behind
    the luckiest.

    Args:
        values: by trial id: float, shape (N,), a score of each picture, higher is better, the same
            pictures in the same order; see `picture_scores`.

    Returns:
        Trial ids, `best` first, then by mean score; of equals by id.

    Raises:
        ValueError: `best` is not among them, the pictures differ, or a score is not finite.

    Source: Efron and Tibshirani 1993, chapters 13 and 15
    """
    ids = [best, *sorted(trial_id for trial_id in values if trial_id != best)]
    scores = _columns(values, ids)
    gaps = scores[:, :1] - scores  # (N, T): by how much the best is ahead on each picture
    gap, total = gaps.mean(axis=0), len(gaps)
    low = np.quantile(
        resampled_sums(gaps, seed=seed, resamples=resamples), (1 - CONFIDENCE) / 2, axis=0
    )
    by_chance = np.abs(sign_flipped_sums(gaps, seed=seed, resamples=resamples)) / total
    p_value = (by_chance >= np.abs(gap) - _ROUNDING).mean(axis=0)
    behind = (low > 0) & (p_value < SIGNIFICANCE_LEVEL)
    tied = [i for i in range(1, len(ids)) if not behind[i]]
    tied.sort(key=lambda i: (gap[i], ids[i]))
    return (best, *(ids[i] for i in tied))


def choose(
    best: str,
    tied: Sequence[str],
    *,
    prefer: Preference = "best",
    seconds: Mapping[str, float] | None = None,
) -> Choice:
    """Pick the trial to keep.

    Args:
        tied: from `tied_with_best`.
        prefer: `cheapest` takes the one with the fewest training seconds among the tied.
        seconds: training seconds by trial id (`training_seconds`); a trial without is not picked
            as the cheapest.
    """
    tied = (best, *(trial_id for trial_id in tied if trial_id != best))
    reason = f"{best} has the best objective; {_tied_words(len(tied) - 1)}."
    if prefer == "best":
        return Choice(best=best, tied=tied, chosen=best, reason=reason)
    known = seconds or {}
    timed = [trial_id for trial_id in tied if trial_id in known]
    cheapest = min(timed, key=lambda t: (known[t], tied.index(t)), default=best)
    if cheapest != best:
        than = f" instead of {known[best]:.1f} s" if best in known else ""
        reason = (
            f"{cheapest} cannot be told apart from {best}, which has the best objective, and took "
            f"{known[cheapest]:.1f} s of training{than}."
        )
    elif len(tied) > 1:
        reason = (
            f"{best} has the best objective and is the cheapest of the {len(tied)} tied trials."
        )
    return Choice(best=best, tied=tied, chosen=cheapest, reason=reason)


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
        raise ValueError(f"every trial needs the scores of the same pictures, got {sorted(shapes)}")
    scores = np.stack([values[trial_id] for trial_id in ids], axis=1).astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    return scores


def _tied_words(others: int) -> str:
    if not others:
        return "no other trial is tied with it"
    return f"{others} other{'s' if others > 1 else ''} cannot be told apart from it"
