"""Calls to AWS, as the caller or as a role that the caller takes on; their errors in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import boto3
import botocore
import botocore.session
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    DeferredRefreshableCredentials,
)
from botocore.exceptions import BotoCoreError, ClientError

from visiontuner import interrupts
from visiontuner.errors import ServingError, UserMistake
from visiontuner.text import one_line

# Of one request: botocore waits between them, seconds in all.
ATTEMPTS = 3
# What is in the middle of something else.
_IN_PROGRESS = "in-progress"
_NO_REGION = "No AWS region: name one with --region, or set AWS_REGION."
_NO_SUCH = ("Could not find", "NoSuchBucket", "NotFound", "NoSuchEntity")
_DENIED = ("AccessDenied", "UnauthorizedOperation")
_BAD_CREDENTIALS = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
_FILES = ("shared-credentials-file", "config-file")  # botocore's words for where keys are from
_ADVICE = {
    "ResourceLimitExceeded": "Ask for a higher quota (Service Quotas, Amazon SageMaker), or choose "
    "another --instance-type.",
    "ThrottlingException": "Try again in a minute.",
}
# Beside what comes with 429 or 5xx.
_BUSY = (
    "InternalError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
)


class AwsRefused(ServingError):
    """AWS answered no; `code` is its own word for why.

    `is_passing`: it is busy or ill, and may say yes in a while.
    """

    def __init__(self, message: str, code: str, *, is_passing: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_passing = is_passing

    @property
    def is_missing(self) -> bool:
        """Whether what was asked for is not there."""
        return any(word in f"{self.code} {self}" for word in _NO_SUCH)

    @property
    def is_denied(self) -> bool:
        """Whether the caller lacks a permission."""
        return self.code.startswith(_DENIED) or self.code == "403"

    @property
    def is_in_progress(self) -> bool:
        """Whether an endpoint is being created or updated: nothing else can be done with it."""
        return _IN_PROGRESS in str(self)


class Aws:
    """One account and region.

    `own_credentials`: botocore's, of the caller before any role is taken on. All sessions share
    them: a profile with a second factor (`mfa_serial`) asks for a code once.

    Args:
        region: the one that AWS's own settings name if None.
        assume_role: ARN of a role to take on, of another account say.

    Raises:
        UserMistake: no region, no credentials, or ones that AWS does not take.
        ServingError: AWS cannot be reached.
    """

    def __init__(self, region: str | None = None, assume_role: str | None = None) -> None:
        self.assume_role = assume_role
        self._clients: dict[tuple[str, str], Any] = {}
        with explained("read AWS's settings"):
            self.session = boto3.Session()
        self.region = region or default_region(self.session)
        self._check_region()
        identity = self.call("sts", "get_caller_identity")
        self.own_credentials = self.session.get_credentials()
        if assume_role:
            with explained("assume role"):
                self.session = _as_role(assume_role, self.session, self.region)
            self._clients.clear()
            identity = self.call("sts", "get_caller_identity")
        self.account: str = identity["Account"]
        self.caller: str = identity["Arn"]

    @property
    def flags(self) -> str:
        """What a command needs that goes on with this account's things, wherever it is run."""
        return _flags(self.region, self.assume_role)

    def session_in_region(self) -> Any:
        """A boto3 session for libraries that ask it for its region; as the same caller."""
        return _session(self.session.get_credentials(), self.region)

    def call(self, service: str, method: str, /, **kwargs: Any) -> dict[str, Any]:
        """One request.

        Raises:
            AwsRefused: AWS says no.
            UserMistake: the credentials are missing or not taken.
            ServingError: AWS cannot be reached.
        """
        with explained(method.replace("_", " ")):
            ask = partial(getattr(self.client(service), method), **kwargs)
            # What changes something is waited for: whoever undoes it has to know of it.
            is_question = method.startswith(("describe_", "get_", "head_", "list_"))
            answer: dict[str, Any] = interrupts.call(ask) if is_question else ask()
            return answer

    def ask(self, doing: str, question: Callable[..., Any], /, **kwargs: Any) -> dict[str, Any]:
        """One question to a client of another region; raises as `call`."""
        with explained(doing):
            answer: dict[str, Any] = interrupts.call(partial(question, **kwargs))
            return answer

    def pages(self, service: str, method: str, key: str, /, **kwargs: Any) -> Iterator[Any]:
        """The entries of a list, whatever number of requests it takes; raises as `call`."""
        with explained(method.replace("_", " ")):
            for page in self.client(service).get_paginator(method).paginate(**kwargs):
                yield from page.get(key, ())

    def tags(self, arn: str) -> dict[str, str]:
        """Of one of SageMaker's resources; raises as `call`."""
        pages = self.pages("sagemaker", "list_tags", "Tags", ResourceArn=arn)
        return {tag["Key"]: tag["Value"] for tag in pages}

    def client(self, service: str, region: str | None = None, *, patient: bool = True) -> Any:
        """boto3's, one for each service; who is not patient asks once and not for long."""

        where = (service, region or self.region)
        if where not in self._clients:
            attempts, seconds = (ATTEMPTS, 10) if patient else (1, 3)
            retries = {"mode": "standard", "total_max_attempts": attempts}
            config = Config(connect_timeout=seconds, retries=retries)
            self._clients[where] = self.session.client(service, region_name=where[1], config=config)
        return self._clients[where]

    def _check_region(self) -> None:
        if not self.region:
            raise UserMistake(_NO_REGION)
        known = [
            region
            for partition in self.session.get_available_partitions()
            for region in self.session.get_available_regions("sagemaker", partition)
        ]
        if self.region not in known:
            near = difflib.get_close_matches(self.region, known, 3) or ["us-east-1", "eu-west-1"]
            raise UserMistake(
                f"SageMaker has no region {self.region!r}. Nearest: {', '.join(near)}."
            )


def require_owner(client_or_events: Any, account: str, bucket: str | None = None) -> None:
    """Let S3 refuse requests about a bucket that another account holds.

    The names of buckets are everybody's: who makes one whose name can be foreseen, as
    `mlflow-sagemaker-REGION-ACCOUNT`, would get what is uploaded there.

    Args:
        client_or_events: what has botocore's `register`.
        account: the one that has to hold the bucket.
        bucket: requests about others stay as they are; None: all requests.
    """

    def name_owner(params: dict[str, Any], model: Any, **_: Any) -> None:
        if "ExpectedBucketOwner" in model.input_shape.members and (
            bucket is None or params.get("Bucket") == bucket
        ):
            params["ExpectedBucketOwner"] = account

    client_or_events.register("before-parameter-build.s3", name_owner)


def encryption(kms_key: str | None) -> dict[str, str]:
    """What a request to S3 says of a key that encrypts the object; None: the bucket's setting."""
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}


def encrypt_uploads(session: Any, bucket: str, kms_key: str | None) -> None:
    """Let a botocore session encrypt what it uploads to a bucket."""

    def encrypt(params: dict[str, Any], **_: Any) -> None:
        if params.get("Bucket") == bucket:
            params |= encryption(kms_key)

    for method in ("PutObject", "CreateMultipartUpload"):
        session.register(f"before-parameter-build.s3.{method}", encrypt)


@contextmanager
def lent_to_library(
    aws: Aws, bucket: str, *, also: Callable[[Any], None] = lambda _: None
) -> Iterator[None]:
    """For a library that makes boto3 sessions of its own within: they are the same caller's, their
    uploads end with the next part after a signal and go to no other account's bucket of this name.

    Args:
        also: told of each botocore session.

    Raises:
        KeyboardInterrupt: a signal came.
    """

    def ask_first(**_: Any) -> None:
        if interrupts.is_waiting():
            raise InterruptedError("a signal came")

    def register(session: Any) -> None:
        session.register("before-send.s3", ask_first)
        require_owner(session, aws.account, bucket)
        also(session)
        _use(session, aws.own_credentials)

    before, boto3.DEFAULT_SESSION = boto3.DEFAULT_SESSION, None
    botocore.register_initializer(register)
    try:
        yield
    finally:
        botocore.unregister_initializer(register)
        boto3.DEFAULT_SESSION = before
        interrupts.check()


def _as_role(role: str, own: Any, region: str) -> Any:
    """A boto3 session as a role; its keys last an hour, and are renewed with the caller's own."""

    fetcher = AssumeRoleCredentialFetcher(
        partial(own.client, region_name=region),
        own.get_credentials(),
        role,
        extra_args={"RoleSessionName": "visiontuner"},
    )
    credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
    credentials.get_frozen_credentials()  # now, so that a role that may not be taken is said
    return _session(credentials)


class _Known(CredentialProvider):  # type: ignore[misc]  # botocore has no types
    """Credentials that are renewed; boto3's own arguments are for those that never change."""

    METHOD = "visiontuner"

    def __init__(self, credentials: Any) -> None:
        super().__init__()
        self._credentials = credentials

    def load(self) -> Any:
        return self._credentials


def _session(credentials: Any, region: str | None = None) -> Any:
    session = botocore.session.get_session()
    _use(session, credentials)
    return boto3.Session(region_name=region, botocore_session=session)


def _use(session: Any, credentials: Any) -> None:
    """In a botocore session, instead of looking for others."""
    session.register_component("credential_provider", CredentialResolver([_Known(credentials)]))


def account_flags(region: str | None, assume_role: str | None) -> str:
    """As `Aws.flags`, of what a user has named; asks nobody.

    Raises:
        UserMistake: AWS's settings cannot be read.
    """

    with explained("read AWS's settings"):
        return _flags(region or default_region(boto3.Session()), assume_role)


def default_region(session: Any) -> str:
    """The region that AWS's own settings name, `AWS_REGION` first; empty if none does."""
    return os.environ.get("AWS_REGION") or session.region_name or ""


def _flags(region: str, assume_role: str | None) -> str:
    role = f" --assume-role {assume_role}" if assume_role else ""
    return f" --region {region}{role}" if region else role


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """boto3's errors in the block become ours, in one line without credentials."""

    try:
        yield
    except ClientError as error:
        _refused(error.response, doing)
    except BotoCoreError as error:
        _failed(error, doing)


def is_busy(response: Mapping[str, Any]) -> bool:
    """Whether an answer that refuses does so only now."""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or response["Error"].get("Code") in _BUSY


def _refused(response: Mapping[str, Any], doing: str) -> NoReturn:
    error = response["Error"]
    code, text = error.get("Code", ""), one_line(error.get("Message", ""), 400)
    if code in _BAD_CREDENTIALS:
        raise UserMistake(f"AWS does not take these credentials ({code}). {_renewal()}.") from None
    if "iam:PassRole" in text:
        raise AwsRefused(
            f"{text}. Allow the caller iam:PassRole on that role (docs/aws.md), or name another "
            "with --role.",
            code,
        ) from None
    if code.startswith(_DENIED) or code == "403":
        advice = "docs/aws.md lists the permissions that are needed."
    else:
        advice = _ADVICE.get(code, "")
    sentence = f"AWS refuses to {doing} ({code}): {text.rstrip('.')}. {advice}".strip()
    raise AwsRefused(sentence, code, is_passing=is_busy(response)) from None


def _renewal() -> str:
    """What to do about the caller's credentials that have expired, by where they are from."""

    own = boto3.Session()
    credentials = own.get_credentials()
    method = credentials.method if credentials is not None else ""
    if method == "env":
        return (
            "They are from the environment: set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_SESSION_TOKEN"
        )
    command = {"sso": "aws sso login", "login": "aws login"}.get(method)
    if command is None and method not in _FILES:
        return "Renew them: `aws sso login`, `aws configure` or a new AWS_SESSION_TOKEN"
    profile = "" if own.profile_name == "default" else f" --profile {own.profile_name}"
    return f"Renew them: `{command or 'aws configure'}{profile}`"


def _failed(error: Exception, doing: str) -> NoReturn:
    name, text = type(error).__name__, one_line(error, 400)
    if name == "NoRegionError":
        raise UserMistake(_NO_REGION) from None
    if "Credential" in name or "Token" in name or "Profile" in name or "SSO" in name:
        raise UserMistake(
            f"No usable AWS credentials: {text.rstrip('.')}. Set AWS_PROFILE, or run "
            "`aws configure` or `aws sso login`."
        ) from None
    raise ServingError(
        f"Cannot {doing}: {text.rstrip('.')}. Check the region and the connection."
    ) from None
