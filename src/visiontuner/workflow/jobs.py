"""Training jobs on SageMaker: follow one, bring its search home, list and stop them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from visiontuner import interrupts
from visiontuner.aws.job import (
    Home,
    Job,
    JournalTail,
    LogTail,
    TunedJob,
    TuningJob,
    advice_on,
    bring_home,
    describe,
    find_jobs,
    find_tuning_job,
    going_on,
    is_noise,
    jobs_of,
    why_ended,
)
from visiontuner.aws.job import stop as end
from visiontuner.aws.request import dollars, shares
from visiontuner.errors import ServingError, TrackingError, UserMistake
from visiontuner.io.aws import Aws, AwsRefused
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.paths import SEARCHES, tracking_uri
from visiontuner.text import next_command, without_secrets
from visiontuner.tracking.run_plans import take_project_run
from visiontuner.tracking.store import Store
from visiontuner.tracking.writer import (
    Costs,
    ForeignSearch,
    ForeignTrial,
    log_costs,
    valid_names,
    write_foreign_search,
)
from visiontuner.workflow.inputs import Observer, Silent
from visiontuner.workflow.run import SearchResult
from visiontuner.workflow.sync import sync_search

# The training jobs that run our searches.


def jobs(region: str | None = None, assume_role: str | None = None) -> list[Job]:
    """Ours in a region, the newest first."""

    return find_jobs(Aws(region, assume_role))


def stop(name: str, region: str | None = None, assume_role: str | None = None) -> str:
    """End a job in order; its checkpoints stay.

    Returns:
        What the next commands need beside its name, to find it from anywhere.

    Raises:
        UserMistake: there is no such job, it is not ours, or it has ended.
    """

    aws = Aws(region, assume_role)
    end(aws, describe(aws, name))
    return aws.flags


# Show what a training job does until it has ended; an AWS that is away or busy is waited for.


Logs = Literal["start", "all", "none"]
Answer = TypeVar("Answer")
POLL_SECONDS = 5.0
PATIENCE_SECONDS = 600.0
"""How long AWS may be out of reach or busy while a job is followed."""
_COST_EVERY_SECONDS = 300.0


class LeftRunning(KeyboardInterrupt):
    """Ctrl-C while a job was followed: it runs on."""


def find_job(aws: Aws, name: str, *, observer: Observer, poll_seconds: float) -> Job:
    """Describe a job; who asks has reached AWS before.

    Raises:
        UserMistake: there is none of that name.
        ServingError: AWS refuses, or stays out of reach.
    """

    return patiently(lambda: describe(aws, name), observer, poll_seconds)


def follow_job(aws: Aws, job: Job, *, logs: Logs, observer: Observer, poll_seconds: float) -> Job:
    """Show what a job does until it has ended, and the whole log if that is wanted.

    Raises:
        ServingError, UserMistake: AWS refuses, or stays out of reach; the job runs on, and that is
            said.
        LeftRunning: the user has seen enough.
    """

    if job.ended and logs != "all":
        return job
    watch = _Watch(aws, job, logs, observer)

    def look() -> Job:
        now = describe(aws, job.name)
        watch.look(now)
        return now

    try:
        while not (job := patiently(look, observer, poll_seconds)).ended:
            interrupts.sleep(poll_seconds)
    except (ServingError, UserMistake) as error:
        _end(error, aws, job)
    except KeyboardInterrupt:
        if job.ended:
            raise
        raise LeftRunning from None
    finally:
        watch.close()
    return job


def _end(error: ServingError | UserMistake, aws: Aws, job: Job) -> NoReturn:
    kind = ServingError if isinstance(error, ServingError) else UserMistake
    state = "has ended" if job.ended else "runs on"
    raise kind(
        f"{error} {job.name} {state}, and nothing is lost: "
        f"`{next_command('attach', job.name, flags=aws.flags)}` goes on here."
    ) from None


class _Patience:
    """Counts from the first of several failures in a row."""

    def __init__(self) -> None:
        self.since: float | None = None

    def ends_with(self, error: ServingError) -> bool:
        """Whether a failure will not pass, or has come again for too long."""

        now = time.monotonic()
        self.since = now if self.since is None else self.since
        is_final = isinstance(error, AwsRefused) and not error.is_passing
        return is_final or now - self.since > PATIENCE_SECONDS


def patiently(
    ask: Callable[[], Answer], observer: Observer, poll_seconds: float = POLL_SECONDS
) -> Answer:
    """Ask an AWS that is away or busy again: a job does not care whether anybody looks.

    Raises:
        ServingError: AWS refuses, or stays away for `PATIENCE_SECONDS`.
    """
    patience = _Patience()
    while True:
        is_first = patience.since is None
        try:
            return ask()
        except ServingError as error:
            if patience.ends_with(error):
                raise
            if is_first:
                observer.note(f"{error} Asking again for {PATIENCE_SECONDS / 60:.0f} minutes.")
        interrupts.sleep(poll_seconds)


class _Watch:
    """What has been shown of a job so far."""

    def __init__(self, aws: Aws, job: Job, logs: Logs, observer: Observer) -> None:
        self._observer = observer
        self._logs = logs
        self._lines = LogTail(aws, job.name)
        self._lines_patience = _Patience()
        self._journal = JournalTail(aws, job.search_folder) if job.search_folder else None
        self._record = SearchRecord()
        self._showing = False
        self._stage = ""
        self._said_cost = time.monotonic()

    def look(self, job: Job) -> None:
        if job.stage != self._stage:
            self._stage = job.stage
            self._observer.note(f"{job.name}: {job.stage}{_so_far(job)}")
        elif time.monotonic() - self._said_cost > _COST_EVERY_SECONDS:
            self._said_cost = time.monotonic()
            self._observer.note(f"{job.name}: {job.stage}{_so_far(job)}")
        if self._logs == "all" or (self._logs == "start" and not self._showing):
            self._show_lines(job)
        self._show_trials()

    def close(self) -> None:
        if self._showing:
            self._observer.trials_end()

    def _show_lines(self, job: Job) -> None:
        """Not worth an end: who may not read logs, or cannot, follows without them."""

        try:
            for host, line in self._lines.new_lines():
                if self._logs == "all" or not is_noise(line):
                    self._observer.note(f"{host}  {line}")
            self._lines_patience = _Patience()
        except ServingError as error:
            if self._lines_patience.ends_with(error):
                self._logs = "none"
                self._observer.note(f"{error} Following goes on without log lines.")
            elif job.ended and self._logs == "all":
                raise  # the last lines are still to come

    def _show_trials(self) -> None:
        for event in self._journal.new_events() if self._journal else ():
            self._record.apply(event)
            if not self._showing and event["event"] == "trial_started":
                self._showing = True
                search = self._record.started.get("experiment", {}).get("search", {})
                self._observer.trials_begin(self._record, int(search.get("trials", 0)))
            self._observer.event(event)


def _so_far(job: Job) -> str:
    if not job.seconds:
        return ""
    cost = f", {dollars(job.cost)} so far" if job.cost is not None else ""
    return f" ({job.seconds / 60:.0f} min{cost})"


# A classic hyperparameter tuning job of SageMaker's as MLflow runs.


_SECONDS = "seconds"


def write_tuning_job(tuning: TuningJob, *, flags: str) -> tuple[str, ...]:
    """Write what MLflow does not hold of it yet; returns lines for a person.

    Args:
        flags: what `attach` needs beside the name to find it again.

    Raises:
        TrackingError: it has trained nothing yet, or MLflow is away or refuses.
    """

    uri, again = tracking_uri(), f"`{next_command('attach', tuning.name, flags=flags)}`"
    if not tuning.jobs:
        raise TrackingError(f"{tuning.name} has trained nothing yet: {again} later.")
    store = Store(uri, advice=f"{again} goes on where it stopped.")
    write_foreign_search(store, _as_search(tuning))
    lines = [f"{tuning.name}: {len(tuning.jobs)} training jobs are in {without_secrets(uri)}."]
    for objective in tuning.objectives:
        best = tuning.best(objective)
        if best is not None:
            lines.append(f"Best: {best.name} with {objective.name} {best.value:.4f}.")
    if tuning.status in ("InProgress", "Stopping"):
        lines.append(f"It is still running: {again} later writes the rest.")
    lines.append(f"Compare them: {next_command('compare', tuning.name)}")
    return tuple(lines)


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What metrics and parameters are called in MLflow, by their names in SageMaker."""

    metrics: Mapping[str, str]
    parameters: Mapping[str, str]

    @classmethod
    def of(cls, tuning: TuningJob) -> _Names:
        metrics = {name for job in tuning.jobs for name in (*job.metrics, job.objective.name)}
        parameters = {name for job in tuning.jobs for name in job.parameters}
        return cls(
            metrics=valid_names(sorted(metrics), taken=[_SECONDS]),
            parameters=valid_names(sorted(parameters)),
        )

    def tags(self, job: TunedJob) -> dict[str, str]:
        """The names in SageMaker that MLflow does not take."""
        metrics = {self.metrics[name]: name for name in (*job.metrics, job.objective.name)}
        parameters = {self.parameters[name]: name for name in job.parameters}
        return {
            f"visiontuner.{kind}_name.{name}": original
            for kind, names in (("metric", metrics), ("parameter", parameters))
            for name, original in names.items()
            if name != original
        }


def _as_search(tuning: TuningJob) -> ForeignSearch:
    states = {"Completed": "completed", "Failed": "failed", "Stopped": "interrupted"}
    names = _Names.of(tuning)
    best = {names.metrics[aim.name]: tuning.best(aim) for aim in tuning.objectives}
    tags = {"visiontuner.job": tuning.name}
    if len(best) == 1:
        ((name, job),) = best.items()
        tags |= {"visiontuner.objective": name}
        tags |= {"visiontuner.best_trial": job.name} if job else {}
    return ForeignSearch(
        search_id=f"sagemaker-{tuning.name}",
        name=tuning.name,
        state=states.get(tuning.status, "running"),
        started=_milliseconds(tuning.started),
        ended=_milliseconds(tuning.ended) if tuning.ended else None,
        params={"strategy": tuning.strategy},
        metrics={
            f"best_{name}": job.value for name, job in best.items() if job and job.value is not None
        },
        tags=tags,
        trials=[_as_trial(job, names) for job in tuning.jobs],
    )


def _as_trial(job: TunedJob, names: _Names) -> ForeignTrial:
    metrics = {names.metrics[name]: value for name, value in job.metrics.items()}
    metrics[_SECONDS] = job.seconds
    if job.value is not None:
        objective = names.metrics[job.objective.name]
        metrics |= {objective: job.value, f"best_{objective}": job.value}
    return ForeignTrial(
        name=job.name,
        state=job.state,
        started=_milliseconds(job.started),
        ended=_milliseconds(job.ended) if job.ended else None,
        params={names.parameters[name]: value for name, value in job.parameters.items()},
        metrics=metrics,
        tags={
            **names.tags(job),
            "visiontuner.instances": f"{job.instances} x {job.instance_type}",
            **({"visiontuner.model_archive": job.model} if job.model else {}),
            **({"visiontuner.error": job.error} if job.error else {}),
        },
    )


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


# Follow a training job, bring its search home, and write it into MLflow; nothing is trained.


@dataclass(frozen=True, kw_only=True)
class Attached:
    """What came home: `lines` for a person, and the search unless it was a classic tuning job."""

    lines: tuple[str, ...]
    result: SearchResult | None = None
    failed: bool = False


def attach(
    name: str,
    *,
    region: str | None = None,
    assume_role: str | None = None,
    output: Path | None = None,
    logs: Logs = "start",
    observer: Observer | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> Attached:
    """Follow a job until it ends, then bring its search home and into MLflow.

    Args:
        name: a training job of ours, or a classic hyperparameter tuning job.
        output: the search folder here; default: `searches/SEARCH`.
        logs: the hosts' lines until the first trial begins, all of them, or none.

    Raises:
        UserMistake: there is no such job, or the folder is taken.
        JobFailed: the job ended before its search began.
        ServingError: AWS refuses, or stays out of reach.
    """

    watching, aws = observer or Silent(), Aws(region, assume_role)
    try:
        job = find_job(aws, name, observer=watching, poll_seconds=poll_seconds)
    except UserMistake:
        tuning = patiently(lambda: find_tuning_job(aws, name), watching, poll_seconds)
        if tuning is None:
            raise
        with interrupts.in_order():
            return Attached(lines=write_tuning_job(tuning, flags=aws.flags))
    if not job.search:
        raise UserMistake(
            f"{name} was not submitted by visiontuner, and is no tuning job: there is no search to "
            "bring home."
        )
    job = follow_job(aws, job, logs=logs, observer=watching, poll_seconds=poll_seconds)
    with interrupts.in_order():
        return _bring_home(aws, job, output or SEARCHES / job.search, watching)


# Bringing home


def _bring_home(aws: Aws, job: Job, folder: Path, observer: Observer) -> Attached:
    folder.parent.mkdir(parents=True, exist_ok=True)
    home = bring_home(
        aws,
        job,
        folder,
        progress=lambda done, total: observer.progress("Bringing home", done, total, "B"),
        note=observer.note,
    )
    result = sync_search(folder, project_run=take_project_run(), observer=observer)
    jobs = patiently(lambda: jobs_of(aws, job), observer)
    _log_costs(folder, home, jobs)
    return Attached(
        lines=tuple(_told(aws, job, jobs, home, result)),
        result=result,
        failed=job.status == "Failed",
    )


def _told(aws: Aws, job: Job, jobs: list[Job], home: Home, result: SearchResult) -> Iterable[str]:
    yield _summary(job, jobs, home, result.folder)
    why = why_ended(aws, job)
    if why:
        yield f"Why: {why}{advice_on(why)}"
    if home.kept == "here":
        yield f"{result.folder} went on here after that, and is kept as it is."
        return
    if home.kept == "apart":
        apart = next_command(
            "attach", job.name, "--output", "OTHER", flags=aws.flags, store="sqlite:///other.db"
        )
        yield (
            f"{result.folder} went on here, and the job went on without that: the folder is kept "
            f"as it is. What the job did is in {job.search_folder}; {apart} brings it "
            "home, apart."
        )
    if result.state != "completed":
        yield f"Go on there: {going_on(aws, job)}"


def _summary(job: Job, jobs: list[Job], home: Home, folder: Path) -> str:
    seconds = sum(one.seconds for one in jobs)
    several = f" in {len(jobs)} jobs" if len(jobs) > 1 else ""
    where = f"are in {folder}" if home.kept is None else "were there"
    return (
        f"{job.name}: {job.status}. {len(home.record.trials)} trials {where}; "
        f"{job.instances} x {job.instance_type} ran {seconds / 60:.0f} min{several}, cost "
        f"{dollars(_whole_cost(jobs))}."
    )


def _log_costs(folder: Path, home: Home, jobs: list[Job]) -> None:
    whole = _whole_cost(jobs)
    # Runs of a folder that went on apart are of other trials, whatever they are called.
    trials = () if home.kept == "apart" else home.record.trials.values()
    seconds = {trial.trial_id: training_seconds(trial) for trial in trials}
    last = jobs[-1]
    log_costs(
        Store(tracking_uri()),
        folder,
        Costs(
            time=_milliseconds(last.created) + round(last.seconds * 1000),
            machine_seconds=sum(one.seconds * one.instances for one in jobs),
            dollars=whole,
            trial_seconds=seconds,
            trial_dollars={} if whole is None else shares(seconds, whole),
            tags={
                "visiontuner.job": ", ".join(one.name for one in jobs),
                "visiontuner.instances": f"{last.instances} x {last.instance_type}",
            },
        ),
    )


def _whole_cost(jobs: list[Job]) -> float | None:
    """US dollars of all jobs of a search; None if the price of one is not known."""
    costs = [one.cost for one in jobs]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def training_seconds(trial: TrialRecord) -> float:
    """How long a trial's epochs took; interruptions between its attempts do not count."""
    epochs = [epoch.metrics.get("epoch_seconds") for epoch in trial.epochs]
    if epochs and all(seconds is not None for seconds in epochs):
        return float(sum(seconds for seconds in epochs if seconds is not None))
    return max(0.0, (trial.ended or trial.started) - trial.started)
