"""What a running job shows from outside: its hosts' log lines and its search's journal."""

from __future__ import annotations

from collections.abc import Iterator

from visiontuner.aws import Aws, AwsRefused
from visiontuner.data.files import temporary_folder
from visiontuner.errors import ServingError
from visiontuner.journal import FILE_NAME, Event, read_events
from visiontuner.sagemaker import s3

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
        self._uri = f"{search_folder}/{FILE_NAME}"
        self._seen = ""
        self._offset = 0

    def new_events(self) -> list[Event]:
        """What has come since the last call, whole lines only."""
        now = s3.etag(self._aws, self._uri)
        if now is None or now == self._seen:
            return []
        content = s3.get(self._aws, self._uri) or b""
        self._seen = now
        with temporary_folder() as folder:
            (folder / FILE_NAME).write_bytes(content)
            read = read_events(folder, self._offset)
        self._offset = read.offset
        return read.events
