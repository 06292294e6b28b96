"""Successive halving over pretrained networks: which of them gets the next trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from visiontuner.evaluation.choice import scores_of_answers
from visiontuner.experiment.schema import Configuration, Experiment
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.search.plan import SCORES_FILE
from visiontuner.search.space import Suggester, WarmStart, clean, draw_beforehand, leading

FIRST_RUNG = 3
"""Trials of a network before it is judged the first time; then after 6, 12, 24, …"""

# One-sided, 5 %: by how many standard errors a network must be behind.
_BEHIND = 1.645


class NetworkRace:
    """Gives each network a trial in turn, and none any more to one that cannot catch up.

    A network is judged when 3, 6, 12, … of its trials have ended. It leaves if it is in the lower
    half of those that came so far, and if its best trial is behind the best trial of all beyond
    noise, by the objective on the same validation images (paired, one-sided test at 5 %): networks
    that the images cannot tell apart all go on. One whose trials all fail leaves too.

    Within a network the configurations are those of a search over it alone: the first ones of the
    experiment, then drawn from the seed, or suggested by Optuna from the network's own trials.

    Args:
        networks: their names, the cheapest first.
        folder: of the search, where trials leave the scores of their answers.
        labels: reads the labels of the images that trials are judged by.
        stop: called with a network's name, the reason and the number of its trials.

    Source: successive halving, Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943
    """

    def __init__(
        self,
        experiment: Experiment,
        record: SearchRecord,
        networks: Sequence[str],
        *,
        folder: Path,
        labels: Callable[[], NDArray[np.int64]],
        stop: Callable[[str, str, int], None],
    ) -> None:
        self._experiment = experiment
        self._record = record
        self._folder = folder
        self._labels = labels
        self._stop = stop
        self._networks = [name for name in networks if name not in record.left_out]
        start = WarmStart.of(record)
        self._queues = {
            name: _Configurations(
                experiment.for_backbone(name), self._trials(name), start.for_backbone(name)
            )
            for name in self._networks
        }
        self._judged = {name: _rung(len(self._ended(name))) for name in self._networks}
        # By trial id: the journal has them when a worker begins.
        self._waiting: dict[str, str] = {}

    def ask(self, trial_id: str) -> Configuration:
        """The configuration of the next trial, its network among its values."""
        self._judge()
        waiting = [n for i, n in self._waiting.items() if i not in self._record.trials]
        given = {name: len(self._trials(name)) + waiting.count(name) for name in self._left()}
        # One whose verdict is near waits for it, as long as others do not.
        name = min(given, key=lambda n: (self._is_near_a_rung(n, given[n]), given[n]))
        self._waiting[trial_id] = name
        configuration = self._queues[name].next(trial_id, given[name])
        return clean({"backbone": name, **configuration}, self._experiment.search.space)

    def tell(self, trial_id: str, configuration: Mapping[str, object], value: float | None) -> None:
        """How a trial ended; None for a failed one."""
        name = str(configuration["backbone"])
        if name in self._queues:
            own = {key: v for key, v in configuration.items() if key != "backbone"}
            self._queues[name].tell(trial_id, own, value)  # type: ignore[arg-type]  # plain values

    def _left(self) -> list[str]:
        return [name for name in self._networks if name not in self._record.stopped]

    def _trials(self, name: str) -> list[TrialRecord]:
        return [t for t in self._record.trials.values() if t.configuration.get("backbone") == name]

    def _ended(self, name: str) -> list[TrialRecord]:
        return [trial for trial in self._trials(name) if trial.finished]

    def _is_near_a_rung(self, name: str, given: int) -> bool:
        return given == _next_rung(self._judged[name])

    def _judge(self) -> None:
        """Stop the networks that reached a rung and cannot catch up."""
        best = {n: trial for n in self._networks if (trial := self._best(n)) is not None}
        if not best:
            return
        ranking = sorted(best, key=lambda name: self._place(best[name]))
        for name in self._left():
            rung = _rung(len(self._ended(name)))
            if rung <= self._judged[name]:
                continue
            self._judged[name] = rung
            if name not in best:
                self._stop(name, f"all its {rung} trials failed", rung)
                continue
            entered = [other for other in ranking if self._entered(other, rung)]
            if name in entered[math.ceil(len(entered) / 2) :]:
                self._stop_if_behind(name, best[name], best[ranking[0]])

    def _entered(self, name: str, rung: int) -> bool:
        """Whether a network was not stopped at an earlier rung."""
        stopped = self._record.stopped.get(name)
        return stopped is None or _rung(int(stopped["trials"])) >= rung

    def _stop_if_behind(self, name: str, own: TrialRecord, leader: TrialRecord) -> None:
        scores = [self._scores(trial.trial_id) for trial in (own, leader)]
        if scores[0] is None or scores[1] is None or not is_behind(scores[0], scores[1]):
            return
        trials = len(self._ended(name))
        reason = (
            f"its best of {trials} trials, {own.best_value:.4f} ({own.trial_id}), is behind "
            f"{leader.best_value:.4f} ({leader.trial_id}, "
            f"{leader.configuration['backbone']}) beyond noise"
        )
        self._stop(name, reason, trials)

    def _best(self, name: str) -> TrialRecord | None:
        usable = [
            trial
            for trial in self._ended(name)
            if trial.best_value is not None and math.isfinite(trial.best_value)
        ]
        return min(usable, key=self._place, default=None)

    def _place(self, trial: TrialRecord) -> tuple[float, float]:
        sign = 1 if self._record.mode == "min" else -1
        loss = trial.kept("validation_loss")
        return sign * (trial.best_value or 0.0), math.inf if loss is None else loss

    def _scores(self, trial_id: str) -> NDArray[np.float64] | None:
        """Of each validation image, higher is better; None where they cannot be read."""
        try:
            path = self._folder / "trials" / trial_id / SCORES_FILE
            with np.load(path, allow_pickle=False) as file:
                return scores_of_answers(
                    file["correct"], file["log_loss"], self._labels(), self._experiment.objective
                )
        except (OSError, ValueError, LookupError, EOFError, BadZipFile):
            return None


def is_behind(own: NDArray[np.float64], leader: NDArray[np.float64]) -> bool:
    """Whether one trial's scores are below another's beyond noise, by the same images.

    Args:
        own, leader: float64, shape (N,), of each image, higher is better.
    """
    gaps = leader - own
    if len(gaps) < 2:
        return False
    return bool(gaps.mean() > _BEHIND * gaps.std(ddof=1) / math.sqrt(len(gaps)))


def _rung(ended: int) -> int:
    """The last rung that so many ended trials have reached; 0 before the first."""
    rung = 0
    while _next_rung(rung) <= ended:
        rung = _next_rung(rung)
    return rung


def _next_rung(rung: int) -> int:
    return 2 * rung or FIRST_RUNG


class _Configurations:
    """Those of one network's trials, in the order of a search over that network alone."""

    def __init__(
        self, experiment: Experiment, trials: Sequence[TrialRecord], start: WarmStart
    ) -> None:
        space = experiment.search.space
        self._suggester: Suggester | None = None
        if experiment.search.algorithm == "random":
            self._listed = draw_beforehand(experiment, start)
            return
        self._listed = leading(experiment, start)
        ended = [trial for trial in trials if trial.finished]
        self._suggester = Suggester(experiment, trials_told=len(ended), start=start)
        for trial in ended:
            self._suggester.tell(
                trial.trial_id, clean(trial.configuration, space), trial.best_value
            )

    def next(self, trial_id: str, position: int) -> Configuration:
        """The configuration of the network's trial at a position, counted from 0."""
        if position < len(self._listed):
            return self._listed[position]
        assert self._suggester is not None  # of a random search all are listed
        return self._suggester.ask(trial_id)

    def tell(self, trial_id: str, configuration: Configuration, value: float | None) -> None:
        if self._suggester is not None:
            self._suggester.tell(trial_id, configuration, value)
