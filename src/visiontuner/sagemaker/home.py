"""Bring a job's search folder home."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visiontuner.aws import Aws
from visiontuner.commands import next_command
from visiontuner.data.s3 import connect
from visiontuner.data.storage import Note, Progress, download_folder
from visiontuner.errors import JobFailed, JournalError, UserMistake
from visiontuner.journal import FILE_NAME, SearchRecord
from visiontuner.layout import EXPERIMENT_FILE
from visiontuner.sagemaker import s3
from visiontuner.sagemaker.follow import last_error
from visiontuner.sagemaker.job import Job, advice_on
from visiontuner.text import has_secrets

# What the SDK's start script leaves as the reason, for requirements that do not install say; and
# what SageMaker makes of an exit code alone, after a disk too full for a reason.
_SAYS_NOTHING = re.compile(r"Training Execution failed|^AlgorithmError:\s*,")


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

    A completed job's comes from its model.tar.gz, any other's from its checkpoints. What lies in
    the folder of the same search is brought up to date, unless it went on here.

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
    if job.status == "Completed" and job.archive:
        archive = s3.fetch(aws, job.archive, coming, progress=progress, note=note)
        if archive is not None:
            s3.unpack_search(archive, coming)
            archive.unlink()
    if not (coming / FILE_NAME).exists() and job.search_folder:
        client = connect(aws.session, aws.region)
        download_folder(job.search_folder, coming, client=client, progress=progress, note=note)


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
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / FILE_NAME).exists()):
        raise UserMistake(f"{folder} is taken. Choose another --output.")
    if (folder / FILE_NAME).exists():
        if SearchRecord.load(folder).search_id != record.search_id:
            raise UserMistake(f"{folder} holds another search. Choose another --output.")
        here, there = _whole_lines(folder / FILE_NAME), _whole_lines(coming / FILE_NAME)
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
    if _SAYS_NOTHING.search(job.reason):
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
