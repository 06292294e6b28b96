"""The way to an asynchronous SageMaker endpoint: requests and answers lie on S3."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from visiontuner import interrupts
from visiontuner.errors import ServingError
from visiontuner.io.aws import default_region, encryption, explained, is_busy, require_owner
from visiontuner.paths import split_uri
from visiontuner.serving.answers import Answer, Options
from visiontuner.serving.client import (
    REQUEST_BYTES,
    TIMEOUT_SECONDS,
    Busy,
    Refused,
    SageMakerTransport,
    Transport,
    decode_answers,
    encode_request,
    reason_in,
)

# SageMaker itself takes 1 GB; MLflow's container takes 100 MB (client_max_body_size of its nginx),
# and the largest image that is read, 25 MB, has 33.4 MB in base64.
ASYNC_BYTES = 40_000_000
REQUESTS = "visiontuner-requests"
"""The folder below an endpoint's output path where requests lie until they are answered."""

# An endpoint's model has so long for a request; SageMaker allows an hour at most.
_INVOCATION_SECONDS = 900
# In the queue and in the model together.
_WAIT_SECONDS = 1800.0
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.2, 5.0


def open_endpoint(
    name: str, *, region: str | None = None, session: Any = None, body_limit: int | None = None
) -> Transport:
    """The way to an endpoint, as it is asked: at once, or over S3.

    Who may not describe endpoints asks at once.

    Args:
        session: boto3's own if None.
        body_limit: the largest request, bytes; None: what such an endpoint takes.

    Raises:
        UserMistake: no region or no credentials.
    """
    described: dict[str, Any] = {}
    with explained(f"ask endpoint {name!r}"):
        session = session or boto3.Session()
        region = region or default_region(session) or None
        connect, read = TIMEOUT_SECONDS
        patience = Config(
            retries={"total_max_attempts": 1}, connect_timeout=connect, read_timeout=read
        )
        control = session.client("sagemaker", region_name=region, config=patience)
    with suppress(BotoCoreError, ClientError):  # asking says why
        described = interrupts.call(partial(control.describe_endpoint, EndpointName=name))
    if described.get("AsyncInferenceConfig"):
        return AsyncTransport(
            described, region=region, session=session, body_limit=body_limit or ASYNC_BYTES
        )
    return SageMakerTransport(
        name, region=region, session=session, body_limit=body_limit or REQUEST_BYTES
    )


class AsyncTransport:
    """An asynchronous endpoint: each request is put on S3, answered there, and taken away again.

    Args:
        described: SageMaker's answer about the endpoint.
        session: boto3's, of who asks.
        body_limit: the largest request, bytes.
    """

    def __init__(
        self,
        described: Mapping[str, Any],
        *,
        region: str | None,
        session: Any,
        body_limit: int = ASYNC_BYTES,
    ) -> None:
        self.endpoint = str(described["EndpointName"])
        self.body_limit = body_limit
        output = described["AsyncInferenceConfig"]["OutputConfig"]
        self._output = str(output["S3OutputPath"]).rstrip("/")
        self._kms_key = output.get("KmsKeyId")
        with explained(f"ask endpoint {self.endpoint!r}"):
            self._runtime = session.client("sagemaker-runtime", region_name=region)
            self._s3 = session.client("s3", region_name=region)
        # arn:aws:sagemaker:REGION:ACCOUNT:endpoint/NAME
        require_owner(self._s3.meta.events, described["EndpointArn"].split(":")[4])

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        """Answer a batch of image files; called from several threads.

        Raises:
            Refused: the model does not take this batch, or SageMaker gave it up.
            Busy: SageMaker asks to come again.
            ServingError: no answer came in time.
        """
        request = f"{self._output}/{REQUESTS}/{uuid.uuid4().hex}.json"
        answers: list[str] = []
        with explained(f"ask endpoint {self.endpoint!r}"):
            try:
                self._put(request, encode_request(contents, options))
                asked = self._invoke(request)
                answers += [asked["OutputLocation"], asked.get("FailureLocation") or ""]
                return decode_answers(self._wait(*answers), len(contents))
            finally:
                for uri in filter(None, [request, *answers]):
                    self._delete(uri)

    def _put(self, uri: str, body: bytes) -> None:
        bucket, key = split_uri(uri)
        self._s3.put_object(
            Bucket=bucket, Key=key, Body=body, ContentType="application/json",
            **encryption(self._kms_key),
        )  # fmt: skip

    def _invoke(self, request: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._runtime.invoke_endpoint_async(
                EndpointName=self.endpoint,
                ContentType="application/json",
                InputLocation=request,
                InvocationTimeoutSeconds=_INVOCATION_SECONDS,
            )
            return answer
        except ClientError as error:
            if is_busy(error.response):
                raise Busy(error.response["Error"]["Message"]) from None
            if error.response["Error"]["Code"] == "ValidationError":
                message = error.response["Error"]["Message"].rstrip(".")
                raise ServingError(
                    f"Endpoint {self.endpoint!r} does not answer: {message}. "
                    "`visiontuner endpoints` lists those that run."
                ) from None
            raise

    def _wait(self, answer: str, failure: str) -> bytes:
        """The answer's bytes, once SageMaker has written them."""
        began, pause = time.monotonic(), _FIRST_POLL_SECONDS
        while time.monotonic() - began < _WAIT_SECONDS:
            found = self._read(answer)
            if found is not None:
                return found
            failed = self._read(failure) if failure else None
            if failed is not None:
                raise Refused(_reason(failed))
            if interrupts.is_waiting():  # for the main thread, which raises it
                raise ServingError("Stopped.")
            interrupts.sleep(pause)
            pause = min(pause * 1.3, _LONGEST_POLL_SECONDS)
        raise ServingError(
            f"Endpoint {self.endpoint!r} has not answered within {_WAIT_SECONDS / 60:g} "
            "minutes: it may have too few instances for what is asked, or none that run."
        )

    def _read(self, uri: str) -> bytes | None:
        bucket, key = split_uri(uri)
        try:
            content: bytes = self._s3.get_object(Bucket=bucket, Key=key)["Body"].read()
            return content
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise

    def _delete(self, uri: str) -> None:
        bucket, key = split_uri(uri)
        with suppress(BotoCoreError, ClientError):  # what is left costs next to nothing
            self._s3.delete_object(Bucket=bucket, Key=key)


def _reason(content: bytes) -> str:
    """What SageMaker wrote about a failure: the model server's own words are within."""
    text = content.decode(errors="replace")
    start = text.find('{"')
    if start >= 0:
        with suppress(ValueError):
            told, _ = json.JSONDecoder().raw_decode(text[start:])
            return reason_in(json.dumps(told).encode())
    return reason_in(content)
