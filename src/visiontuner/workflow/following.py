"""Show what a training job does until it has ended; an AWS that is away or busy is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

from visiontuner import interrupts
from visiontuner.commands import next_command
from visiontuner.errors import ServingError, UserMistake
from visiontuner.journal import SearchRecord
from visiontuner.workflow.observing import Observer

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.job import Job

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
    from visiontuner.sagemaker.job import describe

    return patiently(lambda: describe(aws, name), observer, poll_seconds)


def follow_job(aws: Aws, job: Job, *, logs: Logs, observer: Observer, poll_seconds: float) -> Job:
    """Show what a job does until it has ended, and the whole log if that is wanted.

    Raises:
        ServingError, UserMistake: AWS refuses, or stays out of reach; the job runs on, and that is
            said.
        LeftRunning: the user has seen enough.
    """
    from visiontuner.sagemaker.job import describe

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
        from visiontuner.aws import AwsRefused

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
        from visiontuner.sagemaker.follow import JournalTail, LogTail

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
        from visiontuner.sagemaker.follow import is_noise

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
    from visiontuner.sagemaker.cost import dollars

    if not job.seconds:
        return ""
    cost = f", {dollars(job.cost)} so far" if job.cost is not None else ""
    return f" ({job.seconds / 60:.0f} min{cost})"
