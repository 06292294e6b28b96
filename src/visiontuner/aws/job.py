"""Training jobs that run searches: submit, describe, follow, list, stop, bring home."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from visiontuner.aws.account import make_bucket
from visiontuner.aws.request import (
    PREFIX,
    PRICE_TAG,
    SEARCH_TAG,
    JobFile,
    JobPlan,
    Price,
    write_source,
)
from visiontuner.errors import DataError, JobFailed, JournalError, ServingError, UserMistake
from visiontuner.io.aws import Aws, AwsRefused, encryption
from visiontuner.io.download import extract
from visiontuner.io.files import temporary_folder
from visiontuner.io.s3 import (
    Note,
    Progress,
    Transfers,
    connect,
    download_file,
    download_folder,
    explained,
    head,
    is_passing,
    read,
)
from visiontuner.journal import Event, SearchRecord, read_events
from visiontuner.paths import EXPERIMENT_FILE, JOURNAL_FILE, split_uri
from visiontuner.text import has_secrets, next_command

# Single objects of a job in S3, in a bucket that the caller's account holds.


Answer = TypeVar("Answer")


def put(aws: Aws, uri: str, content: bytes, *, kms_key: str | None = None) -> None:
    """Write one object.

    As for all here: an S3 that is away is asked again for a while.

    Raises:
        UserMistake: no such bucket, no permission, no credentials.
        ServingError: S3 stays away, or refuses for another reason.
    """
    bucket, key = split_uri(uri)

    def write(client: Any) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=content, **encryption(kms_key))

    _patiently(aws, bucket, "write to", write)


def get(aws: Aws, uri: str) -> bytes | None:
    """One object's content; None if there is none; raises as `put`."""
    bucket, key = split_uri(uri)
    return _patiently(aws, bucket, "read", lambda client: read(client, bucket, key))


def etag(aws: Aws, uri: str) -> str | None:
    """What changes with an object's content; None if there is none; raises as `put`."""
    bucket, key = split_uri(uri)
    found = _patiently(aws, bucket, "read", lambda client: head(client, bucket, key))
    return found.get("ETag")


def fetch(
    aws: Aws,
    uri: str,
    folder: Path,
    *,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Path | None:
    """One object into a folder, under its own name; None if there is none; raises as `put`."""
    bucket, key = split_uri(uri)
    if not _patiently(aws, bucket, "read", lambda client: head(client, bucket, key), note=note):
        return None
    client = connect(aws.session, aws.region, owner=aws.account)
    return download_file(uri, folder, client=client, progress=progress, note=note)


def _patiently(
    aws: Aws,
    bucket: str,
    doing: str,
    ask: Callable[[Any], Answer],
    *,
    note: Note | None = None,
) -> Answer:
    client = connect(aws.session, aws.region, owner=aws.account)
    with explained(bucket, doing):
        return Transfers(0, is_passing=is_passing, note=note).patiently(lambda: ask(client))


def unpack_search(archive: Path, folder: Path) -> None:
    """Take the search's files out of a model.tar.gz.

    Raises:
        JobFailed: the archive is damaged, or has links in it.
    """
    unpacked = folder / f".{archive.name}.unpacked"
    try:
        extract(archive, unpacked)
    except DataError as error:
        raise JobFailed(f"The job's model.tar.gz cannot be unpacked: {error}") from None
    if (unpacked / "search").is_dir():
        for path in (unpacked / "search").iterdir():
            path.rename(folder / path.name)
    shutil.rmtree(unpacked)


# Training jobs that run our searches: submit, describe, list, stop.


EXPERIMENT = "experiment.yaml"
_ENDED = ("Completed", "Failed", "Stopped")
_ADVICE = {
    "CapacityError": "AWS has no such machines now: choose another --instance-type or --region, or "
    "try later.",
    "Insufficient capacity": "AWS has no such machines now: choose another --instance-type or "
    "--region, or try later.",
    "MaxRuntimeExceeded": "Allow more with --max-run.",
    "MaxWaitTimeExceeded": "Leave spot machines out (--spot off), choose another --instance-type, "
    "or try later.",
    "No space left": "A disk was full: ask for a larger one with --volume or, where a machine has "
    "its own (ml.g5 say), for a larger --instance-type.",
    "No matching distribution": "The container's Python has no such version: name another --image.",
    "could not be installed": "The container's Python has no such version: name another --image.",
}
_TIME = len("20261122224611")
_SHOWN = 50  # jobs of a list: describing one is a request


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job as SageMaker describes it now.

    Attributes:
        status: InProgress, Stopping, Stopped, Completed or Failed; `stage` says it finer.
        reason: why it failed, in SageMaker's words.
        seconds: how long its machines have been running, which is what is paid for.
        cost: US dollars so far; None where the price is not known.
        container_image: the URL of what its machines run.
        disk_gb: of each machine.
        max_run_seconds: when SageMaker ends it; `max_wait_seconds` the same of a spot job with all
            its waiting for machines.
        checkpoints: the S3 folder that later jobs of this search go on with.
        archive: where its model.tar.gz is, if SageMaker uploaded one: of a job that was stopped
            as of a completed one.
    """

    name: str
    status: str
    stage: str
    reason: str
    search: str
    created: datetime
    instance_type: str
    instances: int
    spot: bool
    container_image: str
    disk_gb: int
    seconds: float
    price: Price
    max_run_seconds: int
    max_wait_seconds: int
    checkpoints: str | None
    archive: str | None

    @property
    def ended(self) -> bool:
        return self.status in _ENDED

    @property
    def cost(self) -> float | None:
        return self.price.of(self.seconds)

    @property
    def search_folder(self) -> str | None:
        """The search folder in S3."""
        return f"{self.checkpoints.rstrip('/')}/search" if self.checkpoints else None

    @property
    def age_hours(self) -> float:
        return (datetime.now(UTC) - self.created).total_seconds() / 3600


def dry_run(aws: Aws, plan: JobPlan) -> dict[str, Any]:
    """The request that `submit` would send; makes and uploads nothing."""
    from visiontuner.aws.model_trainer import dry_request  # seconds to import

    with temporary_folder() as folder:
        source = _write(plan, folder)
    return dry_request(aws, plan, f"{plan.root}/{source.name}")


def submit(aws: Aws, plan: JobPlan, *, note: Callable[[str], None]) -> str:
    """Upload what the job needs and create it; returns its name.

    Raises:
        AwsRefused: AWS says no.
        JobFailed: SageMaker would not take the request.
    """
    from visiontuner.aws.model_trainer import send_request  # seconds to import

    if not plan.bucket_exists:
        make_bucket(aws, plan.bucket)
        note(f"Made the bucket {plan.bucket}.")
    with temporary_folder() as folder:
        source = _write(plan, folder)
        uri = f"{plan.root}/{source.name}"
        put(aws, uri, source.read_bytes(), kms_key=plan.kms_key)
    experiment = plan.experiment.to_yaml().encode()
    put(aws, f"{plan.root}/{EXPERIMENT}", experiment, kms_key=plan.kms_key)
    note(f"Uploaded the source to {uri}.")
    return send_request(aws, plan, uri)


def _write(plan: JobPlan, folder: Path) -> Path:
    orders = JobFile(tracking_uri=plan.tracking_uri, token=secrets.token_hex(32))
    return write_source(folder, experiment=plan.experiment.to_yaml(), job=orders)


def describe(aws: Aws, name: str) -> Job:
    """One job.

    Raises:
        UserMistake: there is none of that name.
    """
    return _job(aws, _described(aws, name))


def find_jobs(aws: Aws) -> list[Job]:
    """Ours in this region, the newest first."""
    return list(_ours(aws))


def jobs_of(aws: Aws, job: Job) -> list[Job]:
    """All jobs of one search, oldest first: resumed ones share their checkpoints."""
    if job.checkpoints is None:
        return [job]
    # All but the time that the SDK appends.
    same = [one for one in _ours(aws, job.name[: -1 - _TIME]) if one.checkpoints == job.checkpoints]
    known = {one.name: one for one in (job, *same)}
    return sorted(known.values(), key=lambda one: (one.created, one.name))


def stop(aws: Aws, job: Job) -> None:
    """Ask SageMaker to end a job; its hosts get two minutes to end their search in order.

    Raises:
        UserMistake: it is not ours, or has ended already.
    """
    if not job.search:
        raise UserMistake(
            f"{job.name} was not submitted by visiontuner, and is left alone: `aws sagemaker "
            f"stop-training-job --region {aws.region} --training-job-name {job.name}` ends it."
        )
    if job.ended:
        raise UserMistake(
            f"{job.name} is {job.status.lower()} already; "
            f"`{next_command('attach', job.name, flags=aws.flags)}` brings home what it did."
        )
    aws.call("sagemaker", "stop_training_job", TrainingJobName=job.name)


def advice_on(reason: str) -> str:
    """A sentence for the reasons of SageMaker's that name no next step."""
    for word, advice in _ADVICE.items():
        if word.lower() in reason.lower():
            return f" {advice}"
    return ""


def _ours(aws: Aws, contains: str = f"{PREFIX}-") -> Iterator[Job]:
    found = aws.pages(
        "sagemaker",
        "list_training_jobs",
        "TrainingJobSummaries",
        NameContains=contains,
        SortBy="CreationTime",
        SortOrder="Descending",
    )
    newest = sorted(found, key=lambda entry: entry["CreationTime"], reverse=True)
    for entry in newest[:_SHOWN]:
        job = _job(aws, _described(aws, entry["TrainingJobName"]))
        if job.search:
            yield job


def _described(aws: Aws, name: str) -> dict[str, Any]:
    try:
        return aws.call("sagemaker", "describe_training_job", TrainingJobName=name)
    except AwsRefused as error:
        if error.is_missing or "not found" in str(error) or error.code == "ValidationException":
            raise UserMistake(
                f"There is no training job {name!r} in {aws.region}. "
                f"`{next_command('jobs', flags=aws.flags)}` lists ours."
            ) from None
        raise


def _job(aws: Aws, told: dict[str, Any]) -> Job:
    tags = aws.tags(told["TrainingJobArn"])
    resources = told.get("ResourceConfig") or {}
    limits = told.get("StoppingCondition") or {}
    instances = int(resources.get("InstanceCount") or 1)
    price = tags.get(PRICE_TAG)
    return Job(
        name=told["TrainingJobName"],
        status=told["TrainingJobStatus"],
        stage=told.get("SecondaryStatus") or told["TrainingJobStatus"],
        reason=" ".join(str(told.get("FailureReason") or "").split()),
        search=tags.get(SEARCH_TAG, ""),
        created=told["CreationTime"],
        instance_type=str(resources.get("InstanceType") or ""),
        instances=instances,
        spot=bool(told.get("EnableManagedSpotTraining")),
        container_image=str((told.get("AlgorithmSpecification") or {}).get("TrainingImage") or ""),
        disk_gb=int(resources.get("VolumeSizeInGB") or 0),
        seconds=paid_seconds(told, now=datetime.now(UTC)),
        price=Price(per_hour=float(price) if price else None, instances=instances),
        max_run_seconds=int(limits.get("MaxRuntimeInSeconds") or 0),
        max_wait_seconds=int(limits.get("MaxWaitTimeInSeconds") or 0),
        checkpoints=(told.get("CheckpointConfig") or {}).get("S3Uri"),
        archive=(told.get("ModelArtifacts") or {}).get("S3ModelArtifacts"),
    )


def paid_seconds(told: dict[str, Any], *, now: datetime) -> float:
    """Of each machine: what SageMaker bills once a job has ended, and its running time before.

    Args:
        told: SageMaker's description of the job.
    """
    ended = told["TrainingJobStatus"] in _ENDED
    if ended and told.get("BillableTimeInSeconds") is not None:
        return float(told["BillableTimeInSeconds"])
    began = told.get("TrainingStartTime")
    if began is None:
        return 0.0
    end = told.get("TrainingEndTime") if ended else now
    return max(0.0, float(((end or now) - began).total_seconds()))


# What a running job shows from outside: its hosts' log lines and its search's journal.


LOG_GROUP = "/aws/sagemaker/TrainingJobs"
# The SDK's start script traces itself, and pip says what it has already.
_NOISE = ("+ ", "++ ", "Requirement already satisfied", "Collecting ", "Downloading ", "  ")

_ERRORS = ("ERROR: ", "Error: ")


class LogTail:
    """New lines of a job's hosts, from CloudWatch."""

    def __init__(self, aws: Aws, job: str) -> None:
        self._aws = aws
        self._job = job
        self._tokens: dict[str, str] = {}

    def new_lines(self) -> Iterator[tuple[str, str]]:
        """Host and line, of each host in order; nothing while there are no logs yet.

        Raises:
            ServingError: CloudWatch refuses or is away; the next call goes on from there.
        """
        for stream in self._streams():
            host = stream.removeprefix(f"{self._job}/").rsplit("-", 1)[0]
            for line in self._lines(stream):
                yield host, line

    def _streams(self) -> list[str]:
        try:
            found = list(
                self._aws.pages(
                    "logs",
                    "describe_log_streams",
                    "logStreams",
                    logGroupName=LOG_GROUP,
                    logStreamNamePrefix=f"{self._job}/",
                )
            )
        except AwsRefused as error:
            if error.is_missing:  # the first job of this account has not written yet
                return []
            raise
        return sorted(entry["logStreamName"] for entry in found)

    def _lines(self, stream: str) -> Iterator[str]:
        while True:
            token = self._tokens.get(stream)
            after = {"nextToken": token} if token else {"startFromHead": True}
            page = self._aws.call(
                "logs", "get_log_events", logGroupName=LOG_GROUP, logStreamName=stream, **after
            )
            for event in page["events"]:
                yield from event["message"].splitlines()
            self._tokens[stream] = page["nextForwardToken"]
            if not page["events"] or page["nextForwardToken"] == token:
                return


def last_error(aws: Aws, job: str) -> str | None:
    """What a job's hosts said last that pip or visiontuner calls an error.

    None: nothing such, or their log cannot be read.
    """
    found = None
    try:
        for _, line in LogTail(aws, job).new_lines():
            for mark in _ERRORS:
                if line.startswith(mark):
                    found = " ".join(line.removeprefix(mark).split())
    except ServingError:
        return None
    return found


def is_noise(line: str) -> bool:
    """Whether a log line says nothing about the search."""
    return not line.strip() or line.startswith(_NOISE)


class JournalTail:
    """New events of a search, from the copy of its journal that SageMaker keeps in S3."""

    def __init__(self, aws: Aws, search_folder: str) -> None:
        self._aws = aws
        self._uri = f"{search_folder}/{JOURNAL_FILE}"
        self._seen = ""
        self._offset = 0

    def new_events(self) -> list[Event]:
        """What has come since the last call, whole lines only."""
        now = etag(self._aws, self._uri)
        if now is None or now == self._seen:
            return []
        content = get(self._aws, self._uri) or b""
        self._seen = now
        with temporary_folder() as folder:
            (folder / JOURNAL_FILE).write_bytes(content)
            read = read_events(folder, self._offset)
        self._offset = read.offset
        return read.events


# What a job was submitted with, for another one that goes on with its search.


_AWSS_OWN = "aws:"  # such tags are read only


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What SageMaker says of a job's request, beside what `Job` holds.

    Attributes:
        variables: all of the container's, ours too.
        tags: the user's; neither ours nor AWS's own.
    """

    role: str
    max_run_seconds: int
    warm_pool_seconds: int
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]
    kms_key: str | None
    encrypt_traffic: bool
    variables: Mapping[str, str]
    tags: Mapping[str, str]


def submitted_with(aws: Aws, job: Job) -> Submitted:
    """A job's request, as far as a user can choose it."""
    told = aws.call("sagemaker", "describe_training_job", TrainingJobName=job.name)
    network = told.get("VpcConfig") or {}
    return Submitted(
        role=told["RoleArn"],
        max_run_seconds=told["StoppingCondition"]["MaxRuntimeInSeconds"],
        warm_pool_seconds=told["ResourceConfig"].get("KeepAlivePeriodInSeconds") or 0,
        subnets=tuple(network.get("Subnets") or ()),
        security_groups=tuple(network.get("SecurityGroupIds") or ()),
        kms_key=(told.get("OutputDataConfig") or {}).get("KmsKeyId") or None,
        encrypt_traffic=bool(told.get("EnableInterContainerTrafficEncryption")),
        variables=told.get("Environment") or {},
        tags={
            key: value
            for key, value in aws.tags(told["TrainingJobArn"]).items()
            if key not in (SEARCH_TAG, PRICE_TAG) and not key.startswith(_AWSS_OWN)
        },
    )


def running_job(aws: Aws, search: str) -> Job | None:
    """The job that is running a search, or about to end it."""
    for status in ("InProgress", "Stopping"):
        entries = aws.pages(
            "sagemaker",
            "list_training_jobs",
            "TrainingJobSummaries",
            NameContains=f"{PREFIX}-",
            StatusEquals=status,
        )
        for entry in entries:
            job = describe(aws, entry["TrainingJobName"])
            if job.search == search and not job.ended:
                return job
    return None


def record_of(aws: Aws, job: Job) -> SearchRecord:
    """What a job's search has done, from its journal on S3; empty if there is none."""
    if job.search_folder is None:
        return SearchRecord()
    return SearchRecord.of(JournalTail(aws, job.search_folder).new_events())


# A classic hyperparameter tuning job of SageMaker's, read as plain values.


_STATES = {
    "Completed": "completed",
    "Stopped": "interrupted",
    "Stopping": "running",
    "Failed": "failed",
    "InProgress": "running",
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a training was tuned for: a metric's name, and whether less or more of it is better."""

    name: str = "objective"
    mode: Literal["min", "max"] = "max"


@dataclass(frozen=True, kw_only=True)
class TunedJob:
    """One training job of a tuning job.

    Attributes:
        state: as a trial's: completed, interrupted, failed or running.
        parameters: those that were tuned and those that were fixed, as text.
        metrics: the last value of each.
        value: of the objective, as the tuning job saw it; None: there is none.
        seconds: what one of its machines is paid for.
    """

    name: str
    state: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    objective: Objective
    value: float | None
    started: datetime
    ended: datetime | None
    seconds: float
    instances: int
    instance_type: str
    error: str
    model: str | None


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """A whole tuning job; each of its training job definitions may have its own objective."""

    name: str
    status: str
    strategy: str
    started: datetime
    ended: datetime | None
    jobs: tuple[TunedJob, ...]

    @property
    def objectives(self) -> list[Objective]:
        """All that are there, each once."""
        return list(dict.fromkeys(job.objective for job in self.jobs))

    def best(self, objective: Objective) -> TunedJob | None:
        """Of the jobs that were tuned for it; None: none has a value."""
        tried = [j for j in self.jobs if j.objective == objective and j.value is not None]
        choose = min if objective.mode == "min" else max
        return choose(tried, key=lambda job: job.value or 0.0, default=None)


def find_tuning_job(aws: Aws, name: str) -> TuningJob | None:
    """A tuning job and all that it trained; None if there is none of that name."""
    try:
        told = aws.call(
            "sagemaker", "describe_hyper_parameter_tuning_job", HyperParameterTuningJobName=name
        )
    except AwsRefused as error:
        if error.is_missing or error.code in ("ResourceNotFound", "ValidationException"):
            return None
        raise
    summaries = aws.pages(
        "sagemaker",
        "list_training_jobs_for_hyper_parameter_tuning_job",
        "TrainingJobSummaries",
        HyperParameterTuningJobName=name,
        SortBy="CreationTime",
        SortOrder="Ascending",
    )
    aims = _objectives(told)
    return TuningJob(
        name=name,
        status=told["HyperParameterTuningJobStatus"],
        strategy=told["HyperParameterTuningJobConfig"].get("Strategy", ""),
        started=told["CreationTime"],
        ended=told.get("HyperParameterTuningEndTime"),
        jobs=tuple(_tuned(aws, summary, aims) for summary in summaries),
    )


def _objectives(told: dict[str, Any]) -> dict[str, Objective]:
    """By the name of a training job definition; "" is of the whole tuning job."""
    whole = told["HyperParameterTuningJobConfig"].get("HyperParameterTuningJobObjective")
    definitions = told.get("TrainingJobDefinitions") or [told.get("TrainingJobDefinition") or {}]
    aims = [("", whole)]
    aims += [(one.get("DefinitionName") or "", one.get("TuningObjective")) for one in definitions]
    return {name: _objective(aim) for name, aim in aims if aim}


def _objective(aim: Mapping[str, Any]) -> Objective:
    return Objective(
        name=aim.get("MetricName") or Objective.name,
        mode="min" if aim.get("Type") == "Minimize" else "max",
    )


def _objective_of(summary: dict[str, Any], aims: Mapping[str, Objective]) -> Objective:
    """What the tuning job says of this very job comes first."""
    planned = aims.get(summary.get("TrainingJobDefinitionName") or "") or aims.get("")
    seen = summary.get("FinalHyperParameterTuningJobObjectiveMetric") or {}
    if seen.get("Type") or planned is None:
        return _objective(seen)
    return planned


def _tuned(aws: Aws, summary: dict[str, Any], aims: Mapping[str, Objective]) -> TunedJob:
    name = summary["TrainingJobName"]
    told = aws.call("sagemaker", "describe_training_job", TrainingJobName=name)
    final = summary.get("FinalHyperParameterTuningJobObjectiveMetric") or {}
    resources = told.get("ResourceConfig") or {}
    fixed = {key: _plain(value) for key, value in (told.get("HyperParameters") or {}).items()}
    tuned = {key: _plain(value) for key, value in summary["TunedHyperParameters"].items()}
    metrics = {one["MetricName"]: one["Value"] for one in told.get("FinalMetricDataList") or ()}
    return TunedJob(
        name=name,
        state=_STATES.get(told["TrainingJobStatus"], "running"),
        # The SDK's own, such as sagemaker_submit_directory, say nothing about the training.
        parameters={k: v for k, v in (fixed | tuned).items() if not k.startswith("sagemaker_")},
        metrics=metrics,
        objective=_objective_of(summary, aims),
        value=final.get("Value"),
        started=told.get("TrainingStartTime") or told["CreationTime"],
        ended=told.get("TrainingEndTime"),
        seconds=paid_seconds(told, now=datetime.now(UTC)),
        instances=int(resources.get("InstanceCount") or 1),
        instance_type=str(resources.get("InstanceType") or ""),
        error=" ".join(str(told.get("FailureReason") or "").split()),
        model=(told.get("ModelArtifacts") or {}).get("S3ModelArtifacts"),
    )


def _plain(value: str) -> str:
    """The SDK writes parameters as JSON: `"adam"` with its quotes is adam."""
    try:
        read = json.loads(value)
    except ValueError:
        return value
    return read if isinstance(read, str) else value


# Bring a job's search folder home.


# What the SDK's start script leaves as the reason, for requirements that do not install say; and
# what SageMaker makes of an exit code alone, after a disk too full for a reason.
_UNSPECIFIC_REASON = re.compile(r"Training Execution failed|^AlgorithmError:\s*,")


@dataclass(frozen=True, kw_only=True)
class Home:
    """What an ended job did of its search.

    Attributes:
        record: the job's, whatever the folder here holds.
        kept: `here` if the folder went on after the job, `apart` if both went on since they were
            one: the folder is as it was then. None: it holds what the job did.
    """

    record: SearchRecord
    kept: Literal["here", "apart"] | None = None


def bring_home(
    aws: Aws,
    job: Job,
    folder: Path,
    *,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Home:
    """Copy the search folder of an ended job.

    It comes from the job's model.tar.gz, or from its checkpoints where there is none or where the
    search has gone on. What lies in the folder of the same search is brought up to date, unless it
    went on here.

    Raises:
        JobFailed: the job ended before a search began.
        UserMistake: the folder is another search's.
    """
    private = folder.with_name(f".{folder.name}.coming")
    shutil.rmtree(private, ignore_errors=True)
    private.parent.mkdir(parents=True, exist_ok=True)
    private.mkdir(mode=0o700)
    coming = private / folder.name
    try:
        coming.mkdir()
        _fetch(aws, job, coming, progress, note)
        _keep_secrets(coming)
        return _put_in_place(coming, folder, _record_of(aws, job, coming))
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _fetch(aws: Aws, job: Job, coming: Path, progress: Progress | None, note: Note | None) -> None:
    archive = fetch(aws, job.archive, coming, progress=progress, note=note) if job.archive else None
    if archive is not None:
        unpack_search(archive, coming)
        archive.unlink()
    if job.search_folder and not _holds_all(aws, job.search_folder, coming / JOURNAL_FILE):
        client = connect(aws.session, aws.region, owner=aws.account)
        download_folder(job.search_folder, coming, client=client, progress=progress, note=note)


def _holds_all(aws: Aws, search_folder: str, journal: Path) -> bool:
    """Whether what came is no older than the checkpoints, which a later job may have gone on with.

    SageMaker uploads checkpoints now and then, and promises no upload when a job is stopped.
    """
    if not journal.exists():
        return False
    there = get(aws, f"{search_folder}/{JOURNAL_FILE}") or b""
    return not (len(there) > journal.stat().st_size and there.startswith(journal.read_bytes()))


def _keep_secrets(coming: Path) -> None:
    """An experiment file with a password in it is its owner's alone before others may look."""
    path = coming / EXPERIMENT_FILE
    if path.is_file() and has_secrets(path.read_text(encoding="utf-8", errors="replace")):
        path.chmod(0o600)


def _record_of(aws: Aws, job: Job, coming: Path) -> SearchRecord:
    try:
        return SearchRecord.load(coming)
    except JournalError:
        raise JobFailed(_no_search(aws, job)) from None


def _put_in_place(coming: Path, folder: Path, record: SearchRecord) -> Home:
    if not folder.exists():
        coming.rename(folder)
        return Home(record=record)
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / JOURNAL_FILE).exists()):
        raise UserMistake(f"{folder} already exists. Choose another --output.")
    if (folder / JOURNAL_FILE).exists():
        if SearchRecord.load(folder).search_id != record.search_id:
            raise UserMistake(f"{folder} holds another search. Choose another --output.")
        here, there = _whole_lines(folder / JOURNAL_FILE), _whole_lines(coming / JOURNAL_FILE)
        if not there.startswith(here):
            return Home(record=record, kept="here" if here.startswith(there) else "apart")
    experiment = coming / EXPERIMENT_FILE
    if experiment.is_file():  # a file that is there keeps its mode, from its first byte on
        (folder / EXPERIMENT_FILE).touch(experiment.stat().st_mode & 0o777)
    shutil.copytree(coming, folder, dirs_exist_ok=True)
    return Home(record=record)


def _whole_lines(journal: Path) -> bytes:
    """What nobody takes back: a torn last line is cut off by who goes on."""
    content = journal.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def why_ended(aws: Aws, job: Job) -> str:
    """Why a job ended before its search was done; empty if nobody says.

    SageMaker's reason, or what the job's log says where that is none.
    """
    if job.stage == "MaxRuntimeExceeded":
        return f"MaxRuntimeExceeded: its {_hours(job.max_run_seconds)} were over."
    if job.stage == "MaxWaitTimeExceeded":
        return (
            "MaxWaitTimeExceeded: AWS did not have enough spot machines for it within "
            f"{_hours(job.max_wait_seconds)}."
        )
    if _UNSPECIFIC_REASON.search(job.reason):
        return last_error(aws, job.name) or job.reason
    return job.reason


def going_on(aws: Aws, job: Job) -> str:
    """The command that goes on with a job's search, without what ended the job."""
    changed = {
        "MaxRuntimeExceeded": ("--max-run", f"{2 * job.max_run_seconds // 60}m"),
        "MaxWaitTimeExceeded": ("--spot", "off"),
    }.get(job.stage, ())
    resumed = ("--on", "sagemaker", "--resume", job.name)
    return next_command("tune", *resumed, *changed, flags=aws.flags)


def _hours(seconds: int) -> str:
    return f"{seconds / 3600:.3g} h"


def _no_search(aws: Aws, job: Job) -> str:
    why = why_ended(aws, job)
    reason = f": {why.rstrip('.')}" if why else ""
    return (
        f"{job.name} {job.status.lower()} before its search began{reason}.{advice_on(why)} "
        f"`{next_command('attach', job.name, '--logs', 'all', flags=aws.flags)}` shows its log; "
        f"`{going_on(aws, job)}` tries again."
    )
