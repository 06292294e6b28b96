"""Run the trials that a plan names on Ray Tune, and write what happens to the journal.

Of several pretrained networks successive halving says which gets the next trial.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import CombinedStopper

from visiontuner import interrupts
from visiontuner.errors import DiskError
from visiontuner.evaluation.choice import scores_of_answers
from visiontuner.experiment.schema import Configuration, Experiment
from visiontuner.io.files import disk_problem, temporary_folder
from visiontuner.journal import EpochMetrics, Finding, SearchRecord, TrialRecord
from visiontuner.search.live import LiveRules, Recorder, end_trial, findings_of
from visiontuner.search.plan import (
    SCORES_FILE,
    Plan,
    PlannedTrial,
    Rungs,
    Stage,
    Stores,
    ValidationLabels,
    WeightsOnDisk,
    make_task,
    plan_stage,
    races_networks,
    trial_name,
)
from visiontuner.search.ray_cluster import resources_for
from visiontuner.search.remote import driver_node
from visiontuner.search.space import Suggester, WarmStart, clean, draw_beforehand, leading
from visiontuner.search.worker import run_trial
from visiontuner.workarounds.ray import skip_callback_statistics

# Trials that end through no fault of their own: their worker died, or a disk is full or broken.


# So Ray writes of an actor whose process or machine has gone. What a trial itself raised begins
# with `ray::`, and an actor that could not even be made would fail anywhere.
_LOST = re.compile(r"(?:Failure # \d+ .*\n)?The actor (?!died because of an error)")
MOST_WORKER_FAILURES = 3


class WorkerFailures:
    """Counts the workers that each trial has lost in this run of the search.

    Args:
        end_search: called when a disk fails a trial: it would fail the next ones as well.

    Attributes:
        disk_error: the first error that said so.
    """

    def __init__(self, end_search: Callable[[], None] = lambda: None) -> None:
        self._end_search = end_search
        self.disk_error: str | None = None
        self._lost: Counter[str] = Counter()
        self._waiting = False

    def begins_again(self, trial_id: str, told: str) -> bool:
        """Whether a trial of which Ray told this lost its worker and is to run again.

        A trial that has lost as many as `MOST_WORKER_FAILURES` is taken to be what ends them.
        """
        if not _LOST.match(told):
            return False
        self._lost[trial_id] += 1
        again = self._lost[trial_id] < MOST_WORKER_FAILURES
        self._waiting = self._waiting or again
        return again

    def is_of_disk(self, traceback: str, error: str) -> bool:
        """Whether a disk is why a trial failed; the search then ends, to be resumed."""
        if disk_problem(traceback) is None:
            return False
        self.disk_error = self.disk_error or error
        self._end_search()
        return True

    def take(self) -> bool:
        """Whether a trial waits to run again since this was asked last."""
        waiting, self._waiting = self._waiting, False
        return waiting


# Signals and the time budget: reasons to end a search in order.


Reason = Literal["interrupted", "time_budget"]


class EndInOrder(Stopper):
    """Asked by Ray Tune ten times a second whether the whole search ends now.

    The first signal ends it in order; another one does so at once, with a KeyboardInterrupt.
    """

    def __init__(self, time_budget_seconds: float | None) -> None:
        self._deadline = time.monotonic() + time_budget_seconds if time_budget_seconds else None
        self.reason: Reason | None = None

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        return False  # never one trial alone

    def interrupt(self) -> None:
        """End the whole search in order, as a signal does."""
        self.reason = "interrupted"

    def stop_all(self) -> bool:
        if interrupts.take():
            if self.reason == "interrupted":
                raise KeyboardInterrupt
            self.reason = "interrupted"
        if self.reason is None and self._deadline and time.monotonic() > self._deadline:
            self.reason = "time_budget"
        return self.reason is not None


# Lets Ray Tune end a trial when a diagnostic rule says so.


class RuleStopper(Stopper):
    """Asked by Ray Tune after every result whether a rule ends that trial."""

    def __init__(self, rules: LiveRules, metrics: tuple[str, ...]) -> None:
        self._rules: LiveRules | None = rules
        self._metrics = metrics

    def __getstate__(self) -> dict[str, Any]:
        return {"_rules": None, "_metrics": self._metrics}  # an open journal stays here

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self._rules is None or "epoch" not in result:
            return False
        metrics = {name: float(result[name]) for name in self._metrics if name in result}
        found = [Finding(**finding) for finding in result.get("findings", ())]
        trial_id = result["config"]["trial_id"]
        return self._rules.stops(trial_id, int(result["epoch"]), metrics, found)

    def stop_all(self) -> bool:
        return False  # never the whole search


# A plan as Ray Tune's search algorithm.


class PlanSearcher(Searcher):
    """Hands a plan to Ray Tune, one trial at a time, and tells Optuna how trials ended.

    Ray's own trial ids are forgotten here: `trial_id` in the config is the journal's.
    """

    def __init__(
        self,
        plan: Plan,
        experiment: Experiment,
        record: SearchRecord,
        race: NetworkRace | None = None,
    ) -> None:
        super().__init__(metric=experiment.objective, mode=experiment.mode)
        self._known = deque(plan.known)
        self._suggestions_left = plan.suggestions
        self._next_number = plan.next_number
        self._stage = plan.stage
        self._record = record
        self._running: dict[str, PlannedTrial] = {}
        self._race = race
        self._suggester: Suggester | None = None
        if race is None and experiment.search.algorithm == "optuna" and plan.suggestions:
            ended = [t for t in record.trials.values() if t.finished]
            start = WarmStart.of(record)
            self._suggester = Suggester(experiment, trials_told=len(ended), start=start)
            for trial in ended:
                self._suggester.tell(trial.trial_id, trial.configuration, trial.best_value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_race": None}  # Ray snapshots it; an open journal stays here

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
        chooser = self._race or self._suggester
        if planned is None or chooser is None:
            return
        chooser.tell(
            planned.trial_id, planned.configuration, None if error else self._value(planned)
        )

    def _value(self, planned: PlannedTrial) -> float | None:
        """The trial's value so far: Ray tells the searcher before the journal closes the trial."""
        trial = self._record.trials.get(planned.trial_id)
        kept = trial and self._record.kept_epoch(trial)
        return kept.metrics[self._record.objective] if kept else None

    def _next(self) -> PlannedTrial | None:
        if self._known:
            return self._known.popleft()
        chooser = self._race or self._suggester
        if chooser is None or self._suggestions_left == 0:
            return None
        self._suggestions_left -= 1
        name = trial_name(self._next_number)
        self._next_number += 1
        configuration = chooser.ask(name)
        return PlannedTrial(
            trial_id=name, attempt=1, configuration=configuration, stage=self._stage
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its journal, never from Ray's snapshot."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


METRICS = tuple(EpochMetrics.__dataclass_fields__)

SearchState = Literal["completed", "interrupted", "time_budget"]


def run_trials(
    folder: Path,
    stage: Stage,
    recorder: Recorder,
    *,
    stores: Stores,
    cache: Path,
    time_budget: float | None = None,
    features_of: Mapping[str, Path] | None = None,
) -> SearchState:
    """Run what the journal does not hold yet of a stage; Ray must be initialised.

    Returns when every trial has ended, the time budget is spent, or a signal asked for the end:
    running trials are then `interrupted` in the journal, and a later call runs them again. So are
    those whose worker or machine died; they run again on what is left, when the others have ended.

    Args:
        stores: what the trials train on: features, or images where the network is trained.
        cache: where the network's weights are kept.
        time_budget: seconds from now on.
        features_of: by network, the cheapest first, where several are searched.

    Raises:
        DiskError: a disk is full or broken; the trials that it failed are `interrupted` too.
    """
    stopper = EndInOrder(time_budget)
    failures = WorkerFailures(end_search=stopper.interrupt)
    with interrupts.handled():
        while True:
            _run_plan(
                folder,
                stage,
                recorder,
                stopper,
                failures,
                stores=stores,
                cache=cache,
                features_of=features_of or {},
            )
            if failures.disk_error is not None:
                raise DiskError(failures.disk_error)
            if stopper.reason or not failures.take():
                return stopper.reason or "completed"


def _run_plan(
    folder: Path,
    stage: Stage,
    recorder: Recorder,
    stopper: EndInOrder,
    failures: WorkerFailures,
    *,
    stores: Stores,
    cache: Path,
    features_of: Mapping[str, Path],
) -> None:
    """Run every trial that is left once, less those whose workers die."""
    experiment, plan = stage.experiment, plan_stage(stage, recorder.record)
    if plan.remaining == 0:
        return
    resources = resources_for(experiment.search)
    task = make_task(
        folder,
        stage,
        stores=stores,
        cache=cache,
        threads=resources.threads,
        starts={p.trial_id: p.starts_from for p in plan.known if p.starts_from is not None},
        checkpoints=stage.on_images,
        features_of=features_of,
    )
    labels = functools.partial(stores.read_labels, folds=task.folds is not None)
    race = _race(folder, experiment, recorder, labels, list(features_of))
    searcher = PlanSearcher(plan, experiment, recorder.record, race)
    rules = LiveRules(folder, experiment, labels, recorder)
    weights = WeightsOnDisk(folder, stage.search, recorder.record)
    weights.prune()  # a kill may have come between a trial's end and this
    skip_callback_statistics()
    with (
        _closing_running(recorder, stopper),
        temporary_folder() as scratch,  # for Ray's own records, which are never read again
        _quiet_tune(),
        driver_node(
            folder, [f for f in {*stores, *features_of.values()} if f is not None]
        ) as driver,
    ):
        task = replace(task, driver=driver)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, task=task), resources.to_ray()),
            tune_config=tune.TuneConfig(
                metric=experiment.objective,
                mode=experiment.mode,
                search_alg=searcher,
                scheduler=_scheduler(stage, recorder.record),
                num_samples=plan.remaining,
                # Without it Tune asks for one trial at a time, and one worker does all the work.
                max_concurrent_trials=resources.concurrent_trials,
                reuse_actors=True,
                trial_dirname_creator=_ray_trial_id,
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(scratch),
                verbose=0,
                stop=CombinedStopper(stopper, RuleStopper(rules, METRICS)),
                callbacks=[JournalCallback(recorder, rules, weights, failures)],
            ),
        ).fit()


def _race(
    folder: Path,
    experiment: Experiment,
    recorder: Recorder,
    labels: Callable[[], ValidationLabels],
    networks: Sequence[str],
) -> NetworkRace | None:
    """What gives the networks their trials; None where no choice is left between them."""
    if not races_networks(experiment):
        return None

    def stop(name: str, reason: str, trials: int) -> None:
        recorder.append("network_stopped", backbone=name, reason=reason, trials=trials)

    return NetworkRace(
        experiment,
        recorder.record,
        networks,
        folder=folder,
        labels=functools.cache(lambda: labels().labels),
        stop=stop,
    )


class JournalCallback(Callback):
    """Ray Tune's news as journal events; runs in the driver."""

    def __init__(
        self, recorder: Recorder, rules: LiveRules, weights: WeightsOnDisk, failures: WorkerFailures
    ) -> None:
        self._recorder = recorder
        self._rules = rules
        self._weights = weights
        self._failures = failures

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray snapshots its callbacks; an open journal stays here

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        staged = {n: trial.config[n] for n in ("stage", "starts_from") if n in trial.config}
        self._recorder.append(
            "trial_started", **_who(trial), configuration=trial.config["configuration"], **staged
        )

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        steps = {"step_losses": result["step_losses"]} if result["step_losses"] else {}
        metrics = {name: float(result[name]) for name in METRICS if name in result}
        self._recorder.append(
            "epoch", **_who(trial), step=result["epoch"], metrics=metrics, **steps
        )
        for finding in findings_of(result.get("notes", ()), result["epoch"]):
            self._recorder.append("finding", **_who(trial), **asdict(finding))
        self._rules.write_waiting(trial.config["trial_id"])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        trial_id = trial.config["trial_id"]
        record = self._recorder.record.trials[trial_id]
        epochs = self._recorder.record.epochs_of(record)
        whole = bool(record.epochs) and record.epochs[-1].step >= epochs
        host = (trial.last_result or {}).get("hostname")
        self._rules.end(trial_id, host=host)
        end_trial(
            self._recorder,
            trial_id,
            "completed" if whole else "stopped_early",
            reason=None if whole else self._rules.reasons.get(trial_id),
            host=host,
        )
        self._weights.prune()

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        trial_id, traceback = trial.config["trial_id"], _traceback_of(trial)
        begun = self._recorder.record.trials.get(trial_id)
        if begun is None or begun.attempt != trial.config["attempt"]:  # no worker ever had it
            self.on_trial_start(iteration, trials, trial)
        if self._failures.begins_again(trial_id, traceback):
            end_trial(self._recorder, trial_id, "interrupted", reason="its worker died")
            return
        error = failure_line(traceback) or "the worker ended without a message"
        if self._failures.is_of_disk(traceback, error):
            end_trial(self._recorder, trial_id, "interrupted", reason=error)
            return
        self._rules.end(trial_id, error=error)
        end_trial(self._recorder, trial_id, "failed", error=error)
        self._weights.prune()


_EXCEPTION_LINE = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Failed|Exception|Exit|Interrupt)): (.*)$")


def failure_line(traceback: str) -> str:
    """The last exception of a traceback as one line, `TrialFailed: …` without its class name."""
    for line in reversed(traceback.strip().splitlines()):
        match = _EXCEPTION_LINE.match(line.strip())
        if match:
            kind, message = match.groups()
            return message if kind == "TrialFailed" else f"{kind}: {message}"
    return " ".join(traceback.split())[-300:]


def _who(trial: Trial) -> dict[str, Any]:
    return {"trial_id": trial.config["trial_id"], "attempt": trial.config["attempt"]}


def _traceback_of(trial: Trial) -> str:
    """From the driver's own file: `Trial.get_error` reads a storage that gets it later."""
    path = trial.error_file
    return Path(path).read_text(encoding="utf-8") if path and Path(path).is_file() else ""


def _ray_trial_id(trial: Trial) -> str:
    return str(trial.trial_id)


class ResumedAsha(ASHAScheduler):
    """ASHA over a whole search, however often it was resumed.

    Its trials go by the journal's ids, and the scores of earlier runs count at its rungs: without
    them the first trials after a resume would all be among the best.

    Args:
        scores: trial id, epoch and objective, in the order of their epochs.
    """

    def __init__(self, rungs: Rungs, scores: Sequence[tuple[str, int, float]]) -> None:
        super().__init__(
            time_attr="epoch",
            max_t=rungs.last,
            grace_period=rungs.first,
            reduction_factor=rungs.factor,
        )
        self._scores = scores

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Ray's call before the first trial: from now on scores can be compared."""
        if not super().set_search_properties(metric, mode, **spec):
            return False
        nobody: Any = None  # no controller yet, and ASHA asks it nothing
        for trial_id, epoch, score in self._scores:
            known = _named(trial_id)
            super().on_trial_add(nobody, known)
            super().on_trial_result(nobody, known, {"epoch": epoch, str(metric): score})
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _by_journal(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, _by_journal(trial), result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _by_journal(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _by_journal(trial))


def _named(trial_id: str) -> Any:
    """All that ASHA asks of a trial: a name, here the journal's."""
    return SimpleNamespace(trial_id=trial_id)


def _by_journal(trial: Trial) -> Any:
    return _named(trial.config["trial_id"])


def _scheduler(stage: Stage, record: SearchRecord) -> TrialScheduler | None:
    rungs = Rungs.of(stage.experiment)
    return None if rungs is None else ResumedAsha(rungs, _scores(stage, record))


def _scores(stage: Stage, record: SearchRecord) -> list[tuple[str, int, float]]:
    """What the trials of a stage reported in earlier runs.

    The last epoch of a trial that has not ended is left out: a kill may have come before ASHA's
    decision on it, so it is judged when it is reported again.
    """
    scores = []
    for trial in record.trials.values():
        if trial.stage == stage.name:
            epochs = [*trial.earlier_epochs, *trial.epochs]
            last = None if trial.finished else max((e.step for e in epochs), default=None)
            scores += [
                (epoch.time, trial.trial_id, epoch.step, epoch.metrics[record.objective])
                for epoch in epochs
                if epoch.step != last
            ]
    return [(trial_id, step, value) for _, trial_id, step, value in sorted(scores)]


@contextmanager
def _closing_running(recorder: Recorder, stopper: EndInOrder) -> Iterator[None]:
    """Trials that still run when Tune ends, in whatever way, are interrupted."""
    try:
        yield
    finally:
        for trial_id, trial in list(recorder.record.trials.items()):
            if trial.state == "running":
                end_trial(recorder, trial_id, "interrupted", reason=stopper.reason)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune logs a traceback for every failed trial; the journal has its last line."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


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
