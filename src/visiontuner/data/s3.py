"""boto3's S3: the client for many threads, what lies where, and its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from visiontuner.data.objects import RemoteFile
from visiontuner.errors import DataError, ServingError

# One request to S3 waits some 20 to 50 ms: 32 at a time are what one interpreter can prepare.
THREADS = 32
# Of large files: 4 x 4 parts of 8 MiB are 128 MiB in memory.
LARGE_AT_ONCE, PARTS_AT_ONCE = 4, 4
# A lost part of a large file is sent again by boto3 itself; `Transfers` waits for longer.
ATTEMPTS = 3
_MISSING = ("404", "NoSuchKey")
_DAMAGED = "BadDigest"  # on its way
_ELSEWHERE = (
    "301",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraint",
)


def connect(session: Any = None, region: str | None = None) -> Any:
    """boto3's S3 client for many threads.

    Args:
        session: a boto3 session, of a role that was taken on say; the caller's own if None.
        region: as the settings say if None; buckets elsewhere are found all the same.

    Raises:
        UserMistake: AWS's settings cannot be read.
    """
    import boto3
    from botocore.config import Config

    from visiontuner.aws import explained

    with explained("read AWS's settings"):
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=THREADS + LARGE_AT_ONCE * PARTS_AT_ONCE,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        )
        client = (session or boto3.Session()).client("s3", region_name=region, config=config)
    client.meta.events.register_last("before-call.s3", _send_at_once)
    return client


def _send_at_once(model: Any, params: dict[str, Any], **_: Any) -> None:
    """Small files do not wait until S3 says that it wants them: a round trip less for each."""
    if model.name == "PutObject":
        params["headers"].pop("Expect", None)


def list_files(client: Any, bucket: str, prefix: str) -> list[RemoteFile]:
    """All objects under a prefix but the empty ones that stand for folders."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [
        RemoteFile(
            entry["Key"][len(prefix) :], entry["Key"], entry["Size"], entry["ETag"].strip('"')
        )
        for page in pages
        for entry in page.get("Contents", ())
        if not entry["Key"].endswith("/")
    ]


def head(client: Any, bucket: str, key: str) -> Mapping[str, Any]:
    """What S3 says of an object; nothing if it is not there."""
    from botocore.exceptions import ClientError

    try:
        answer: Mapping[str, Any] = client.head_object(Bucket=bucket, Key=key)
        return answer
    except ClientError as error:
        if error.response["Error"]["Code"] in _MISSING:
            return {}
        raise


def read(client: Any, bucket: str, key: str) -> bytes | None:
    """A small object's content; None if it is not there."""
    from botocore.exceptions import ClientError

    try:
        with client.get_object(Bucket=bucket, Key=key)["Body"] as body:
            content: bytes = body.read()
            return content
    except ClientError as error:
        if error.response["Error"]["Code"] in _MISSING:
            return None
        raise


def is_passing(error: Exception) -> bool:
    """Whether an error is one of the connection or of a busy S3: asking again may help."""
    from botocore.exceptions import (
        ClientError,
        HTTPClientError,
        IncompleteReadError,
        ResponseStreamingError,
        SSLError,
    )
    from botocore.exceptions import ConnectionError as NotConnected

    from visiontuner.aws import is_busy

    if isinstance(error, ClientError):
        return is_busy(error.response) or error.response["Error"]["Code"] == _DAMAGED
    if isinstance(error, SSLError):
        return False
    return isinstance(
        error, NotConnected | HTTPClientError | IncompleteReadError | ResponseStreamingError
    )


def is_out_of_reach(error: BaseException) -> bool:
    """Whether S3 could not be asked at all; what it refuses is another matter."""
    from visiontuner.aws import AwsRefused

    return isinstance(error, ServingError) and not isinstance(error, AwsRefused)


@contextmanager
def explained(bucket: str, doing: str) -> Iterator[None]:
    """S3's errors in the block become ours, in one line without credentials.

    Args:
        doing: "read" or "write to".

    Raises:
        UserMistake: no bucket, no permission, another region, no credentials.
        ServingError: S3 cannot be reached, or refuses for another reason.
    """
    from botocore.exceptions import ClientError

    from visiontuner.aws import explained as aws_explained

    with aws_explained(f"{doing} s3://{bucket}"):
        try:
            yield
        except ClientError as error:
            advice = _advice(error.response, bucket, doing)
            if advice is None:
                raise
            raise DataError(advice) from None


def _advice(response: Mapping[str, Any], bucket: str, doing: str) -> str | None:
    code = response["Error"].get("Code", "")
    if code in ("NoSuchBucket", "404"):
        return f"There is no bucket {bucket!r}. Correct the name, or make it: `aws s3 mb s3://{bucket}`."
    if code in ("403", "AccessDenied", "AllAccessDisabled"):
        needed = "s3:GetObject" if doing == "read" else "s3:PutObject, s3:GetObject"
        return (
            f"These credentials may not {doing} s3://{bucket}. They need s3:ListBucket on the "
            f"bucket and {needed} on its objects (docs/aws.md, Pictures on S3), or set AWS_PROFILE "
            "to others."
        )
    if code in _ELSEWHERE:
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = headers.get("x-amz-bucket-region") or response["Error"].get("Region")
        return (
            f"The bucket {bucket!r} is in another region. Set AWS_REGION={region}."
            if region
            else f"The bucket {bucket!r} is in another region. Set AWS_REGION to its own."
        )
    if code == "InvalidObjectState":
        return f"Objects in s3://{bucket} are archived (Glacier). Restore them first."
    if code == "NoSuchKey":
        return f"What lies in s3://{bucket} changed meanwhile. Run the same command again."
    return None
