"""Single objects of a job in S3; folders go through `data.storage`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from visiontuner.aws import Aws
from visiontuner.data.archive import extract
from visiontuner.data.objects import split_uri
from visiontuner.data.s3 import connect, explained, head, is_passing, read
from visiontuner.data.storage import Note, Progress, download_file
from visiontuner.data.transfer import Transfers
from visiontuner.errors import DataError, JobFailed

Answer = TypeVar("Answer")


def put(aws: Aws, uri: str, content: bytes, *, kms_key: str | None = None) -> None:
    """Write one object.

    As for all here: an S3 that is away is asked again for a while.

    Raises:
        UserMistake: no such bucket, no permission, no credentials.
        ServingError: S3 stays away, or refuses for another reason.
    """
    bucket, key = split_uri(uri)
    encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}

    def write(client: Any) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=content, **encrypted)

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


def make_bucket(aws: Aws, bucket: str) -> None:
    """A private bucket in the caller's region."""
    where = {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
    aws.call("s3", "create_bucket", Bucket=bucket, **({} if aws.region == "us-east-1" else where))


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
    client = connect(aws.session, aws.region)
    return download_file(uri, folder, client=client, progress=progress, note=note)


def _patiently(
    aws: Aws,
    bucket: str,
    doing: str,
    ask: Callable[[Any], Answer],
    *,
    note: Note | None = None,
) -> Answer:
    client = connect(aws.session, aws.region)
    with explained(bucket, doing):
        return Transfers(0, is_passing=is_passing, note=note).patiently(lambda: ask(client))


def unpack_search(archive: Path, folder: Path, *, inside: str = "search") -> None:
    """Take one folder's content out of a model.tar.gz.

    Raises:
        JobFailed: the archive is damaged, or has links in it.
    """
    unpacked = folder / f".{archive.name}.unpacked"
    try:
        extract(archive, unpacked)
    except DataError as error:
        raise JobFailed(f"The job's model.tar.gz cannot be unpacked: {error}") from None
    if (unpacked / inside).is_dir():
        for path in (unpacked / inside).iterdir():
            path.rename(folder / path.name)
    shutil.rmtree(unpacked)
