"""Run the trials that a plan names on Ray Tune, and write what happens to the journal."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.stopper import CombinedStopper

from visiontuner.experiment import Experiment
from visiontuner.journal import SearchRecord, best_epoch
from visiontuner.search.cluster import resources_for
from visiontuner.search.interrupt import EndInOrder, signals_end
from visiontuner.search.live_rules import LiveRules, RuleStopper
from visiontuner.search.plan import make_plan
from visiontuner.search.recorder import Recorder
from visiontuner.search.searcher import PlanSearcher
from visiontuner.search.trial import HEAD_FILE, TrialTask, run_trial
from visiontuner.training.epoch import EpochMetrics

METRICS = tuple(EpochMetrics.__dataclass_fields__)
HEADS_KEPT = 5

SearchState = Literal["completed", "interrupted", "time_budget"]


def run_trials(
    folder: Path, experiment: Experiment, features_folder: Path, recorder: Recorder
) -> SearchState:
    """Run what the journal does not hold yet; Ray must be initialised.

    Returns when every trial has ended, the time budget is spent, or a signal asked for the end:
    running trials are then `interrupted` in the journal, and a later call runs them again.
    """
    plan = make_plan(experiment, recorder.record)
    if plan.remaining == 0:
        return "completed"
    resources = resources_for(experiment.search)
    task = TrialTask(
        experiment=experiment,
        search_folder=folder.resolve(),
        features_folder=features_folder.resolve(),
        threads=resources.threads,
    )
    stopper = EndInOrder(experiment.search.time_budget)
    searcher = PlanSearcher(plan, experiment, recorder.record)
    rules = LiveRules(folder, experiment, features_folder, recorder)
    _skip_callback_statistics()
    with _scratch_folder() as scratch, _quiet_tune(), signals_end(stopper):
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, task=task), resources.to_ray()),
            tune_config=tune.TuneConfig(
                metric=experiment.objective,
                mode=experiment.mode,
                search_alg=searcher,
                scheduler=_scheduler(experiment),
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
                callbacks=[JournalCallback(recorder, folder, rules)],
            ),
        ).fit()
    _close_running(recorder, stopper)
    return stopper.reason or "completed"


class JournalCallback(Callback):
    """Ray Tune's news as journal events; runs in the driver."""

    def __init__(self, recorder: Recorder, folder: Path, rules: LiveRules) -> None:
        self._recorder = recorder
        self._folder = folder
        self._rules = rules

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray snapshots its callbacks; an open journal stays here

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.append(
            "trial_started", **_who(trial), configuration=trial.config["configuration"]
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
        metrics = {name: float(result[name]) for name in METRICS}
        self._recorder.append(
            "epoch", **_who(trial), step=result["epoch"], metrics=metrics, **steps
        )
        self._rules.write_waiting(trial.config["trial_id"])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        trial_id = trial.config["trial_id"]
        record = self._recorder.record.trials[trial_id]
        epochs = self._recorder.record.epochs_of(record)
        whole = bool(record.epochs) and record.epochs[-1].step >= epochs
        self._rules.end(trial_id)
        end_trial(
            self._recorder,
            trial_id,
            "completed" if whole else "stopped_early",
            reason=None if whole else self._rules.reasons.get(trial_id),
        )
        prune_heads(self._folder, self._recorder.record)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        error = failure_line(_traceback_of(trial)) or "the worker ended without a message"
        self._rules.end(trial.config["trial_id"], error=error)
        end_trial(self._recorder, trial.config["trial_id"], "failed", error=error)


def end_trial(
    recorder: Recorder, trial_id: str, state: str, *, error: str | None = None, **fields: Any
) -> None:
    """Close a trial in the journal with its best epoch."""
    record = recorder.record
    trial = record.trials[trial_id]
    best = best_epoch(trial.epochs, record.objective, record.mode)
    recorder.append(
        "trial_ended",
        trial_id=trial_id,
        attempt=trial.attempt,
        state=state,
        best_epoch=best.step if best else None,
        best_value=best.metrics[record.objective] if best else None,
        error=error,
        **fields,
    )


def prune_heads(folder: Path, record: SearchRecord, *, keep: int = HEADS_KEPT) -> None:
    """Head weights of ended trials that are not among the best take no disk."""
    for trial in record.ranking()[keep:]:
        (folder / "trials" / trial.trial_id / HEAD_FILE).unlink(missing_ok=True)


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


def _scheduler(experiment: Experiment) -> TrialScheduler | None:
    """ASHA halves to the third: with 20 epochs, trials are compared after 2, 6 and 18."""
    if experiment.search.scheduler == "none":
        return None
    domain = experiment.search.space.get("epochs")
    values = getattr(domain, "values", None) or (getattr(domain, "high", None),)
    epochs = int(max(values)) if domain is not None else experiment.training.epochs
    return ASHAScheduler(
        time_attr="epoch", max_t=epochs, grace_period=max(1, epochs // 9), reduction_factor=3
    )


def _skip_callback_statistics() -> None:
    """Ray counts its callbacks for statistics that are off here, importing three trackers: 2 s."""
    with suppress(ImportError):
        from ray.air._internal import usage

        usage.tag_callbacks = lambda callbacks: False  # noqa: ARG005


def _close_running(recorder: Recorder, stopper: EndInOrder) -> None:
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


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Ray wants a folder for its own records; nothing in it is ever read again."""
    path = Path(tempfile.mkdtemp(prefix="visiontuner-ray-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
