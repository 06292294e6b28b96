"""What every way to a model has in common, and the way to a SageMaker endpoint.

A transport answers one batch of pictures, or says why it cannot; patience, batches and the order of
answers are `batching.ask_all`'s. `http_client.py` has the way to a scoring server's URL.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Protocol

from visiontuner.aws import default_region, explained, is_busy
from visiontuner.errors import ServingError
from visiontuner.serving.answers import Answer, Options
from visiontuner.text import one_line, without_secrets

# InvokeEndpoint takes 6,291,456 bytes, and 4,194,304 for a serverless endpoint.
REQUEST_BYTES = 6_000_000
SERVERLESS_BYTES = 4_000_000
# Whoever finds so little too large means something else.
_LEAST_BYTES = 250_000

# An endpoint gives a model 60 s.
TIMEOUT_SECONDS = (10, 70)
BUSY = (429, 502, 503)
# The batch may be too large, too slow, or hold a row that the model refuses.
REFUSED = (400, 422, 504)
TOO_LARGE = 413
_TIMED_OUT = "invocation timed out"  # SageMaker about a model, with status 0


class Transport(Protocol):
    """A way to a model; `body_limit` is the largest request, which may turn out to be less."""

    body_limit: int

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        """Answer a batch; called from several threads."""
        ...


class Busy(Exception):
    """The other side asks to come again."""

    def __init__(self, message: str, after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


class Refused(Exception):
    """The other side does not take this batch."""


class TooLarge(Refused):
    """The other side takes requests, but none of this size; `body_limit` is lower now."""


class SageMakerTransport:
    """A SageMaker endpoint, by name; `session` is boto3's own if None."""

    def __init__(
        self,
        endpoint: str,
        *,
        region: str | None = None,
        body_limit: int = REQUEST_BYTES,
        session: Any = None,
    ) -> None:
        import boto3
        from botocore.config import Config

        # Retries are ours: the same for every transport.
        connect, read = TIMEOUT_SECONDS
        config = Config(
            retries={"total_max_attempts": 1}, connect_timeout=connect, read_timeout=read
        )
        self.endpoint = endpoint
        self.body_limit = body_limit
        self._asking_about_it = threading.Lock()
        with explained(f"ask endpoint {endpoint!r}"):
            session = session or boto3.Session()
            region = region or default_region(session) or None
            self._client = session.client("sagemaker-runtime", region_name=region, config=config)
        self._control = partial(session.client, "sagemaker", region_name=region, config=config)

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        return decode_answers(self._send(encode_request(contents, options)), len(contents))

    def _send(self, body: bytes) -> bytes:
        from botocore import exceptions

        if len(body) > SERVERLESS_BYTES and self._is_serverless:
            self.body_limit = min(self.body_limit, SERVERLESS_BYTES)
            raise TooLarge(f"a serverless endpoint takes {SERVERLESS_BYTES / 1e6:.0f} MB")
        broken = (
            exceptions.ConnectionError,
            exceptions.ConnectionClosedError,
            exceptions.ResponseStreamingError,
            exceptions.IncompleteReadError,
        )
        with explained(f"ask endpoint {self.endpoint!r}"):
            try:
                answer = self._client.invoke_endpoint(
                    EndpointName=self.endpoint, ContentType="application/json", Body=body
                )
                content: bytes = answer["Body"].read()
                return content
            except exceptions.ReadTimeoutError:
                raise Refused("no answer in time") from None
            except broken as error:
                if is_untrusted(error):
                    raise
                text = without_secrets(str(error)).rstrip(".")
                raise Busy(f"{text}. Check the region and the connection") from None
            except exceptions.ClientError as error:
                if _is_too_large(error.response):
                    self.body_limit = lowered(self.body_limit, body)
                    raise TooLarge(error.response["Error"]["Message"]) from None
                reason = self._of_the_endpoint(error.response)
                if reason is None:
                    raise
                raise reason from None

    @property
    def _is_serverless(self) -> bool:
        """Looked up before the first large request; False for who may not look it up."""
        with self._asking_about_it:
            return self._has_serverless_variant

    @cached_property
    def _has_serverless_variant(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            described = self._control().describe_endpoint(EndpointName=self.endpoint)
        except (BotoCoreError, ClientError):
            return False
        variants = described.get("ProductionVariants", ())
        return any("CurrentServerlessConfig" in variant for variant in variants)

    def _of_the_endpoint(self, response: Any) -> Exception | None:
        """None for what any service of AWS may answer: credentials, permissions."""
        code, message = response["Error"]["Code"], response["Error"]["Message"]
        status = int(response.get("OriginalStatusCode") or 0)  # the model server's own
        reason = reason_in(str(response.get("OriginalMessage") or message).encode())
        if is_busy(response) or status in BUSY:
            return Busy(message)
        if status in REFUSED or _TIMED_OUT in message:
            return Refused(reason)
        if code == "ModelError":
            return ServingError(
                f"The model behind endpoint {self.endpoint!r} fails ({status}): "
                f"{reason.rstrip('.')}. Its log in CloudWatch says more: "
                f"/aws/sagemaker/Endpoints/{self.endpoint}."
            )
        if code == "ValidationError":
            return ServingError(
                f"Endpoint {self.endpoint!r} does not answer: {message.rstrip('.')}. "
                "`visiontuner endpoints` lists those that run."
            )
        return None


def encode_request(contents: Sequence[bytes], options: Options) -> bytes:
    """The JSON that MLflow's scoring server takes."""
    rows = [[base64.b64encode(content).decode()] for content in contents]
    params: dict[str, Any] = {"top_k": options.top_k, "on_error": options.on_error}
    if options.threshold is not None:
        params["threshold"] = options.threshold
    table = {"columns": ["image"], "data": rows}
    return json.dumps({"dataframe_split": table, "params": params}).encode()


def decode_answers(body: bytes, count: int) -> list[Answer]:
    """Read what the server sent.

    Raises:
        ServingError: it is not `count` answers of a visiontuner model.
    """
    try:
        rows = json.loads(body)["predictions"]
        if len(rows) != count:
            raise ValueError(f"{len(rows)} answers")
        return [read_answer(row) for row in rows]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ServingError(
            f"What answers is no visiontuner model: {body[:100].decode(errors='replace')!r}."
        ) from None


def read_answer(row: Any) -> Answer:
    """One row of what the model answers; models from before `confident` too."""
    if row.get("error") is not None:
        return Answer(error=str(row["error"]))
    probability = float(row["probability"])
    return Answer(
        label=str(row["label"]),
        probability=probability,
        confident=bool(row.get("confident", True)),
        top_k=[
            {"label": str(c["label"]), "probability": float(c["probability"])} for c in row["top_k"]
        ],
    )


def _is_too_large(response: Any) -> bool:
    """By SageMaker's own status, the model server's, or the words for a serverless endpoint."""
    statuses = (
        response.get("ResponseMetadata", {}).get("HTTPStatusCode"),
        response.get("OriginalStatusCode"),
    )
    return TOO_LARGE in statuses or "oversize body" in response["Error"]["Message"]


def lowered(limit: int, refused: bytes) -> int:
    length = len(refused)
    likely = SERVERLESS_BYTES if length > SERVERLESS_BYTES else max(length // 2, _LEAST_BYTES)
    return min(limit, likely)


def is_untrusted(error: Exception) -> bool:
    """A certificate that is not trusted stays so."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def reason_in(content: bytes) -> str:
    """What the server says, without what MLflow puts before it."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["message"])
    return one_line(text.rpartition("\nError: ")[2], 300) or "no reason given"
