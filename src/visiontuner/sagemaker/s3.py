"""Single objects of a job in S3; folders go through `data.storage`."""

from __future__ import annotations

import shutil
from pathlib import Path

from visiontuner.aws import Aws, AwsRefused, explained
from visiontuner.data.archive import extract
from visiontuner.data.objects import split_uri
from visiontuner.data.s3 import connect
from visiontuner.data.storage import Progress, download_file
from visiontuner.errors import DataError, JobFailed


def put(aws: Aws, uri: str, content: bytes, *, kms_key: str | None = None) -> None:
    """Write one object."""
    bucket, key = split_uri(uri)
    encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    aws.call("s3", "put_object", Bucket=bucket, Key=key, Body=content, **encrypted)


def get(aws: Aws, uri: str) -> bytes | None:
    """One object's content; None if there is none."""
    bucket, key = split_uri(uri)
    try:
        body = aws.call("s3", "get_object", Bucket=bucket, Key=key)["Body"]
    except AwsRefused as error:
        if error.code in ("NoSuchKey", "404"):
            return None
        raise
    with explained("read from S3"), body:
        content: bytes = body.read()
        return content


def make_bucket(aws: Aws, bucket: str) -> None:
    """A private bucket in the caller's region."""
    where = {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
    aws.call("s3", "create_bucket", Bucket=bucket, **({} if aws.region == "us-east-1" else where))


def fetch(aws: Aws, uri: str, folder: Path, *, progress: Progress | None = None) -> Path | None:
    """One object into a folder, under its own name; None if there is none."""
    bucket, key = split_uri(uri)
    try:
        aws.call("s3", "head_object", Bucket=bucket, Key=key)
    except AwsRefused as error:
        if error.code in ("404", "NoSuchKey"):
            return None
        raise
    client = connect(aws.session, aws.region)
    return download_file(uri, folder, client=client, progress=progress)


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
