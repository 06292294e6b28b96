"""A job's folder in S3: small files up, the search down."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from visiontuner.aws import Aws, AwsRefused, explained
from visiontuner.errors import JobFailed
from visiontuner.sagemaker.surroundings import split_uri

_THREADS = 16
Progress = Callable[[int, int], None]
"""Called with (files so far, files in all)."""


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


def upload_folder(
    aws: Aws,
    folder: Path,
    uri: str,
    *,
    kms_key: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Bring a folder's files to S3, side by side; returns how many were sent.

    What is there with the same size is left alone: a picture is not edited in place.
    """
    bucket, prefix = split_uri(uri.rstrip("/") + "/")
    pages = aws.pages("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix)
    there = {entry["Key"]: entry["Size"] for entry in pages}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    keys = {path: prefix + path.relative_to(folder).as_posix() for path in files}
    wanted = [path for path in files if there.get(keys[path]) != path.stat().st_size]
    encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    client = aws.client("s3")
    with explained("upload the pictures"), ThreadPoolExecutor(_THREADS) as pool:
        waiting = [
            pool.submit(client.upload_file, str(path), bucket, keys[path], ExtraArgs=encrypted)
            for path in wanted
        ]
        for done, future in enumerate(waiting, start=1):
            future.result()
            if progress is not None:
                progress(done, len(waiting))
    return len(wanted)


def download_folder(aws: Aws, uri: str, folder: Path, *, progress: Progress | None = None) -> int:
    """Bring everything under a URI into a folder, side by side; returns how many files.

    What is here with the same size and not older is left alone: repeating it brings what is new.
    """
    bucket, prefix = split_uri(uri.rstrip("/") + "/")
    entries = list(aws.pages("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix))
    wanted = [
        (_inside(folder, entry["Key"][len(prefix) :]), entry)
        for entry in entries
        if not entry["Key"].endswith("/")  # a folder that the console made
    ]
    client = aws.client("s3")

    def fetch(target: Path, entry: dict[str, Any]) -> None:
        if _is_here(target, entry):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.part")
        client.download_file(bucket, entry["Key"], str(fresh))
        fresh.replace(target)

    with explained("bring the search home"), ThreadPoolExecutor(_THREADS) as pool:
        waiting = [pool.submit(fetch, target, entry) for target, entry in wanted]
        for done, future in enumerate(waiting, start=1):
            future.result()
            if progress is not None:
                progress(done, len(waiting))
    return len(wanted)


def fetch(aws: Aws, uri: str, target: Path) -> bool:
    """One object into a file; False if there is none."""
    bucket, key = split_uri(uri)
    try:
        aws.call("s3", "head_object", Bucket=bucket, Key=key)
    except AwsRefused as error:
        if error.code in ("404", "NoSuchKey"):
            return False
        raise
    with explained("read from S3"):
        aws.client("s3").download_file(bucket, key, str(target))
    return True


def unpack_search(archive: Path, folder: Path, *, inside: str = "search") -> int:
    """Take one folder out of a model.tar.gz; returns how many files.

    Raises:
        JobFailed: the archive is damaged.
    """
    try:
        with tarfile.open(archive) as tar:
            members = list(_members(tar, inside))
            tar.extractall(folder, members=members, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise JobFailed(f"The job's model.tar.gz cannot be unpacked: {error}.") from None
    return sum(member.isfile() for member in members)


def _members(tar: tarfile.TarFile, inside: str) -> Iterator[tarfile.TarInfo]:
    for member in tar.getmembers():
        parts = PurePosixPath(member.name).parts
        if len(parts) > 1 and parts[0] == inside:
            yield member.replace(name="/".join(parts[1:]))


def _inside(folder: Path, name: str) -> Path:
    """Where a key goes; never outside the folder.

    Raises:
        JobFailed: the key wants to.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/"):
        raise JobFailed(f"The object {name!r} would leave the search folder; remove it from S3.")
    return folder.joinpath(*parts)


def _is_here(target: Path, entry: dict[str, Any]) -> bool:
    if not target.is_file():
        return False
    status = target.stat()
    same_size = status.st_size == entry["Size"]
    return bool(same_size and status.st_mtime >= entry["LastModified"].timestamp())
