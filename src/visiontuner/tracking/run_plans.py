"""Journal events -> what MLflow should hold: a pure function, and therefore replayable.

Two rules make a replay at any moment, in any order of kills, end in the same runs:

- An epoch belongs to the first attempt that reported it. MLflow cannot take back a point, so a
  trial that runs again after a kill continues its curve where the curve ended.
- Nothing depends on when it is read: times, steps and states are the journal's own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import FINISHED, Event, SearchRecord, TrialState


def take_project_run() -> ProjectRun | None:
    """`MLFLOW_RUN_ID`, out of the environment: Ray's workers must not inherit it.

    It may be left over from anything: `MlflowWriter` looks at the run before it adopts it.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if not run_id:
        return None
    return ProjectRun(run_id=run_id, experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID"))


Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

KIND = "visiontuner.kind"
SEARCH_ID = "visiontuner.search_id"
TRIAL_ID = "visiontuner.trial_id"
STATE = "visiontuner.state"
STAGE = "visiontuner.stage"

STATUS_OF: dict[str, Status] = {
    "running": "RUNNING",
    "completed": "FINISHED",
    "stopped_early": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}

# MLflow's own limit for a parameter is 6,000 characters, for a tag 8,000.
_PARAM_LENGTH = 6000
_TAG_LENGTH = 2000

MOST_CURVES_OF_SHORT = 100
"""A figure takes as long as hundreds of points; MLflow draws its own of every trial anyway."""
_SHORT_MILLISECONDS = 10_000


@dataclass(frozen=True, kw_only=True)
class ProjectRun:
    """The run that `mlflow run` says it opened for this process, and its experiment."""

    run_id: str
    experiment_id: str | None


class Point(NamedTuple):
    """One metric value: `time` in whole milliseconds since the epoch."""

    key: str
    value: float
    time: int
    step: int


@dataclass(kw_only=True)
class TrialPlan:
    """What the run of one trial should hold.

    `stands_out`: it is one of the first, or was the best when it ended.
    """

    search_id: str
    trial_id: str
    configuration: Mapping[str, Any]
    started: int
    attempt: int = 1
    state: TrialState = "running"
    ended: int | None = None
    last_seen: int = 0
    points: list[Point] = field(default_factory=list)
    steps: set[int] = field(default_factory=set)
    rules: set[str] = field(default_factory=set)
    details: dict[str, str] = field(default_factory=dict)
    stage: str | None = None
    starts_from: str | None = None
    stands_out: bool = True
    kind: Literal["trial", "baseline"] = "trial"

    @property
    def status(self) -> Status:
        return STATUS_OF[self.state]

    @property
    def has_curves(self) -> bool:
        """Whether its loss and accuracy curves are to be a figure too."""
        lasted = (self.ended or self.last_seen) - self.started
        return self.stands_out or lasted >= _SHORT_MILLISECONDS

    def params(self) -> dict[str, str]:
        """Every searched value, as text."""
        return {name: _cut(value, _PARAM_LENGTH) for name, value in self.configuration.items()}

    def tags(self) -> dict[str, str]:
        """Who the run is and how far it came."""
        return {
            KIND: self.kind,
            SEARCH_ID: self.search_id,
            TRIAL_ID: self.trial_id,
            STATE: self.state,
            "visiontuner.attempt": str(self.attempt),
            "visiontuner.epochs": str(len(self.steps)),
            **({"visiontuner.findings": ", ".join(sorted(self.rules))} if self.rules else {}),
            **({STAGE: self.stage} if self.stage else {}),
            **({"visiontuner.starts_from": self.starts_from} if self.starts_from else {}),
            **self.details,
        }

    def start_again(self, event: Event) -> None:
        self.attempt, self.state, self.ended = event["attempt"], "running", None
        self.last_seen = _milliseconds(event)

    def take_epoch(self, event: Event) -> None:
        self.last_seen = _milliseconds(event)
        if self.state == "interrupted" and event.get("attempt") == self.attempt:
            self.state, self.ended = "running", None  # declared dead, and alive after all
        step = int(event["step"])
        if step in self.steps:
            return
        self.steps.add(step)
        for key, value in event["metrics"].items():
            if isinstance(value, int | float):
                self.points.append(Point(key, _storable(value), self.last_seen, step))
        for optimizer_step, loss in event.get("step_losses", ()):
            point = Point("train_loss_step", _storable(loss), self.last_seen, int(optimizer_step))
            self.points.append(point)

    def take_finding(self, event: Event) -> None:
        self.rules.add(str(event.get("rule")))

    def end(self, event: Event, objective: str) -> None:
        self.state, self.ended = event["state"], _milliseconds(event)
        for name in ("best_epoch", "error", "reason"):
            if event.get(name) is not None:
                self.details[f"visiontuner.{name}"] = _cut(event[name], _TAG_LENGTH)
        value = event.get("best_value")
        if value is not None and self.state in ("completed", "stopped_early"):
            step = int(event.get("best_epoch") or 0)
            self.points.append(Point(f"best_{objective}", _storable(value), self.ended, step))

    def interrupt(self) -> None:
        """The driver is gone: what was running is not running any more."""
        if self.state == "running":
            self.state, self.ended = "interrupted", self.last_seen


@dataclass(kw_only=True)
class SearchPlan:
    """What the parent run and the runs of all trials should hold."""

    record: SearchRecord = field(default_factory=SearchRecord)
    trials: dict[str, TrialPlan] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    state: str = "running"
    last_seen: int = 0
    rules: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, events: Iterable[Event]) -> SearchPlan:
        plan = cls()
        for event in events:
            plan.apply(event)
        return plan

    @property
    def search_id(self) -> str:
        return self.record.search_id

    @property
    def started(self) -> Event:
        """The search's first event."""
        return self.record.started

    @property
    def name(self) -> str:
        """The search folder's name, which is the parent run's name."""
        return str(self.started.get("name") or self.search_id)

    @property
    def status(self) -> Status:
        return STATUS_OF.get(self.state, "FINISHED")

    @property
    def over(self) -> bool:
        return self.state != "running"

    def apply(self, event: Event) -> None:
        """Take in one more event; events that this version does not know change nothing."""
        self.record.apply(event)
        self.last_seen = _milliseconds(event)
        kind = event["event"]
        if kind == "search_ended":
            self.interrupt_running()
            self.state = str(event.get("state", "completed"))
            return
        if kind in ("search_resumed", "trial_started", "epoch"):
            self.state = "running"
        if kind == "search_resumed":
            self._interrupt_trials()
        elif kind == "trial_started":
            self._start(event)
        elif kind == "baseline_ended":
            self._take_baseline(event)
        elif kind == "choice_made":
            self._take_choice(event)
        elif kind == "finding" and not event.get("trial_id"):
            self.rules.add(str(event.get("rule")))
        elif event.get("trial_id") in self.trials:
            self._apply_to_trial(self.trials[event["trial_id"]], event)

    def interrupt_running(self) -> None:
        """The search is known to be over, whether or not it could still say so."""
        self._interrupt_trials()
        if not self.over:
            self.state = "interrupted"

    def experiment(self) -> Experiment:
        return Experiment.parse(self.started["experiment"])

    def params(self) -> dict[str, str]:
        """What the experiment sets, under names with a dot, which no entry point's parameter has.

        The space and what is not set are columns that nobody compares: they are in its file.
        """
        experiment = self.experiment()
        flat = experiment.flatten()
        params = {
            key if "." in key else f"experiment.{key}": _cut(value, _PARAM_LENGTH)
            for key, value in flat.items()
            if value != "null" and not key.startswith("search.space.")
        }
        if names := experiment.search.backbones:  # then no one network is the search's own
            params["model.backbone"] = _cut(", ".join(names), _PARAM_LENGTH)
        return params

    def tags(self) -> dict[str, str]:
        """Who the run is, what it ran on, and what came out."""
        best, kept = self.record.best, self.record.kept
        facts = {
            "objective": self.record.objective,
            "findings": ", ".join(sorted(self.rules)) or None,
            "from": self._fact("from", "description"),
            "best_trial": best.trial_id if best else None,
            "kept": kept.trial_id if kept else None,
            "choice": (self.record.choice or {}).get("gain"),
            **{f"data_{k}": self._fact("data", k) for k in ("source", "digest")},
            **{f"code_{k}": self._fact("code", k) for k in ("commit", "dirty")},
            "version": self._fact("code", "version"),
            **self.record.network_of(self.record.kept),
            **{k: self._fact("machine", k) for k in ("host", "platform")},
            "packages": self._packages(),
        }
        return {
            KIND: "search",
            SEARCH_ID: self.search_id,
            STATE: self.state,
            **{f"visiontuner.{k}": _cut(v, _TAG_LENGTH) for k, v in facts.items() if v is not None},
        }

    def _fact(self, section: str, key: str) -> object:
        values = self.started.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def _packages(self) -> str | None:
        """Versions of Python and of the packages that results depend on, as JSON."""
        packages = self._fact("machine", "packages")
        if not isinstance(packages, Mapping):
            return None
        return json.dumps({"python": self._fact("machine", "python"), **packages})

    def _interrupt_trials(self) -> None:
        for trial in self.trials.values():
            trial.interrupt()

    def _start(self, event: Event) -> None:
        trial_id = event["trial_id"]
        if trial_id in self.trials:
            self.trials[trial_id].start_again(event)
            return
        self.trials[trial_id] = TrialPlan(
            search_id=self.search_id,
            trial_id=trial_id,
            configuration=event["configuration"],
            started=_milliseconds(event),
            attempt=event["attempt"],
            last_seen=_milliseconds(event),
            stage=event.get("stage"),
            starts_from=event.get("starts_from"),
            stands_out=len(self.trials) < MOST_CURVES_OF_SHORT,
            details=self._network_tags(trial_id),
        )

    def _take_baseline(self, event: Event) -> None:
        """A run of its own, with the values at the first step."""
        ended, name = _milliseconds(event), event["name"]
        baseline = TrialPlan(
            search_id=self.search_id,
            trial_id=name,
            configuration=event["configuration"],
            started=ended - round(1000 * event["seconds"]),
            state="completed",
            ended=ended,
            last_seen=ended,
            stands_out=False,
            kind="baseline",
            details=self._network_tags(name),
        )
        values = {**event["metrics"]}
        if self.record.objective in values:
            values[f"best_{self.record.objective}"] = values[self.record.objective]
        baseline.points = [Point(k, _storable(v), ended, 1) for k, v in values.items()]
        self.trials[name] = baseline

    def _network_tags(self, name: str) -> dict[str, str]:
        """Of a trial or a baseline: which network it is about, where several are searched."""
        trial = self.record.named(name)
        if trial is None or "backbone" not in trial.configuration:
            return {}
        facts = self.record.network_of(trial)
        return {f"visiontuner.{key}": _cut(value, _TAG_LENGTH) for key, value in facts.items()}

    def _take_choice(self, event: Event) -> None:
        """The accuracy to expect of what is kept, on the search's own run."""
        step = len(self.finished)
        for name, value in (event.get("estimate") or {}).items():
            key = "estimated_accuracy" if name == "value" else f"estimated_accuracy_{name}"
            self.points.append(Point(key, _storable(value), self.last_seen, step))

    def _apply_to_trial(self, trial: TrialPlan, event: Event) -> None:
        if event["event"] == "epoch":
            trial.take_epoch(event)
        elif event["event"] == "finding":
            trial.take_finding(event)
        elif event["event"] == "trial_ended":
            trial.end(event, self.record.objective)
            self._count(trial)

    def _count(self, trial: TrialPlan) -> None:
        """One more step of the search's own curve."""
        if trial.state not in FINISHED or trial.trial_id in self.finished:
            return
        self.finished.add(trial.trial_id)
        step, time = len(self.finished), trial.ended or self.last_seen
        self.points.append(Point("trials_finished", float(step), time, step))
        best = self.record.best
        if best is not None and best.best_value is not None:
            trial.stands_out = trial.stands_out or best.trial_id == trial.trial_id
            key = f"best_{self.record.objective}"
            self.points.append(Point(key, _storable(best.best_value), time, step))


def _milliseconds(event: Event) -> int:
    return round(float(event["time"]) * 1000)


def _storable(value: float) -> float:
    """MLflow stores an infinity as 1.8e308, which flattens every chart: NaN says it better."""
    return float(value) if math.isfinite(value) else math.nan


def _cut(value: object, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
