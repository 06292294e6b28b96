"""Follow a training job, bring its search home, and write it into MLflow; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner import interrupts
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake
from visiontuner.journal import TrialRecord
from visiontuner.locations import SEARCHES, take_project_run, tracking_uri
from visiontuner.workflow.following import POLL_SECONDS, Logs, find_job, follow_job, patiently
from visiontuner.workflow.layout import SearchResult
from visiontuner.workflow.observing import Observer, Silent
from visiontuner.workflow.sync import sync_search
from visiontuner.workflow.tuning_job import write_tuning_job

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.home import Home
    from visiontuner.sagemaker.job import Job


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
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.classic import find_tuning_job

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
    from visiontuner.sagemaker.home import bring_home
    from visiontuner.sagemaker.job import jobs_of

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
    from visiontuner.sagemaker.home import going_on, why_ended
    from visiontuner.sagemaker.job import advice_on

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
    from visiontuner.sagemaker.cost import dollars

    seconds = sum(one.seconds for one in jobs)
    several = f" in {len(jobs)} jobs" if len(jobs) > 1 else ""
    where = f"are in {folder}" if home.kept is None else "were there"
    return (
        f"{job.name}: {job.status}. {len(home.record.trials)} trials {where}; "
        f"{job.instances} x {job.instance_type} ran {seconds / 60:.0f} min{several}, cost "
        f"{dollars(_whole_cost(jobs))}."
    )


def _log_costs(folder: Path, home: Home, jobs: list[Job]) -> None:
    from visiontuner.sagemaker.cost import shares
    from visiontuner.tracking.client import Store
    from visiontuner.tracking.costs import Costs, log_costs

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


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
