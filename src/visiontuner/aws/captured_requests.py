"""What SageMaker's data capture has kept of an endpoint: requests with images, and answers."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from visiontuner import interrupts
from visiontuner.aws.endpoint import find_endpoint
from visiontuner.errors import UserMistake
from visiontuner.io.aws import Aws
from visiontuner.io.s3 import connect, explained, list_files, read
from visiontuner.paths import split_folder
from visiontuner.serving.answers import Answer
from visiontuner.serving.client import read_answer
from visiontuner.text import next_command

# DESTINATION/ENDPOINT/VARIANT/YYYY/MM/DD/HH/MM-SS-….jsonl
_HOUR = re.compile(r"/(\d{4}/\d{2}/\d{2}/\d{2})/[^/]+\.jsonl$")
_AT_ONCE = 16
_FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One image of a captured request with the endpoint's answer.

    Args:
        event: SageMaker's id of the request.
        row: of the image within the request, from 0.
        time: of the request, ISO 8601 in UTC; empty if it was not captured.
        content: the image file's; empty if there is none.
        answer: its error says why there is none.
    """

    event: str
    row: int
    time: str
    content: bytes
    answer: Answer


def capture_folder(aws: Aws, name: str) -> str:
    """Where an endpoint's requests are kept: `s3://…/`, with its name at the end.

    Args:
        name: of the endpoint, or that folder itself, after the endpoint is gone.

    Raises:
        UserMistake: there is no such endpoint, or it captures nothing.
    """
    if name.startswith("s3://"):
        return name.rstrip("/") + "/"
    described = find_endpoint(aws, name)
    if described is None:
        raise UserMistake(
            f"There is no endpoint {name!r} in {aws.region}. Of one that is gone name the folder: "
            "s3://BUCKET/FOLDER/ENDPOINT."
        )
    config = aws.call(
        "sagemaker", "describe_endpoint_config", EndpointConfigName=described["EndpointConfigName"]
    ).get("DataCaptureConfig")
    if not config or not config.get("EnableCapture"):
        again = next_command(
            "deploy", "MODEL", "--name", name, "--data-capture", "s3://BUCKET/FOLDER",
            flags=aws.flags,
        )  # fmt: skip
        raise UserMistake(f"Endpoint {name!r} captures nothing; it has to be made so: `{again}`.")
    return f"{config['DestinationS3Uri'].rstrip('/')}/{name}/"


def captured(
    aws: Aws, folder: str, *, since: timedelta | None = None
) -> Iterator[tuple[int, int, list[Captured]]]:
    """What lies in a folder, an object at a time, the oldest first.

    Args:
        since: no older requests, to the hour.

    Yields:
        How many objects have been read, how many there are, and the images of one.

    Raises:
        UserMistake: no such bucket, or no permission.
        ServingError: S3 cannot be reached.
    """
    bucket, prefix = split_folder(folder)
    first = "" if since is None else (datetime.now(UTC) - since).strftime("%Y/%m/%d/%H")
    with explained(bucket, "read"):
        client = connect(aws.session, aws.region)
        keys = [
            (match[1], remote.key)
            for remote in list_files(client, bucket, prefix)
            if (match := _HOUR.search("/" + remote.key)) and match[1] >= first
        ]
        keys.sort()
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="capture")
        try:
            fetch = partial(read, client, bucket)
            contents = interrupts.map_ahead(pool, fetch, [k for _, k in keys], ahead=_AT_ONCE)
            for done, content in enumerate(contents, start=1):
                yield done, len(keys), list(read_events(content or b""))
        finally:
            pool.shutdown(cancel_futures=True)


def read_events(content: bytes) -> Iterator[Captured]:
    """The images of one captured object: JSON lines, one request each.

    What is no request of a visiontuner client has one row, whose answer is an error.
    """
    for number, line in enumerate(content.splitlines()):
        if line.strip():
            yield from _read_event(line, number)


def _read_event(line: bytes, number: int) -> Iterator[Captured]:
    event, when = f"line-{number}", ""
    try:
        told = json.loads(line)
        event = str(told["eventMetadata"]["eventId"])
        when = str(told["eventMetadata"].get("inferenceTime") or "")
        data = told["captureData"]
        images = images_of(_json(data.get("endpointInput")))
        answers = _answers(data.get("endpointOutput"), len(images))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = Answer(error=f"This is no request that can be read ({type(error).__name__}).")
        yield Captured(event=event, row=0, time=when, content=b"", answer=reason)
        return
    for row, (image, answer) in enumerate(zip(images, answers, strict=True)):
        yield Captured(event=event, row=row, time=when, content=image, answer=answer)


def _json(part: Mapping[str, Any] | None) -> Any:
    """A captured body: as text, or in base64 where its type was not named as JSON."""
    if part is None:
        raise ValueError("not captured")
    data = part["data"]
    return json.loads(base64.b64decode(data) if part.get("encoding") == "BASE64" else data)


def images_of(request: Any) -> list[bytes]:
    """The image files in a request of MLflow's scoring server, in whatever format it takes.

    Raises:
        ValueError: it holds none.
    """
    kind = next((kind for kind in _FORMATS if kind in request), None)
    if kind is None:
        raise ValueError("no table")
    table = request[kind]
    if kind == "dataframe_split":
        column = table["columns"].index("image") if "columns" in table else 0
        values: Sequence[Any] = [row[column] for row in table["data"]]
    elif isinstance(table, Mapping):
        values = table["image"]
    else:
        values = [row["image"] if isinstance(row, Mapping) else row for row in table]
    flat = [value[0] if isinstance(value, list) else value for value in values]
    return [_decoded(value) for value in flat]


def _decoded(value: object) -> bytes:
    """Empty for what is no base64."""
    try:
        return base64.b64decode(str(value), validate=True)
    except binascii.Error:
        return b""


def _answers(part: Mapping[str, Any] | None, count: int) -> list[Answer]:
    """One for each image; where there is no answer, the reason in its place."""
    try:
        rows = _json(part)["predictions"]
        if len(rows) == count:
            return [read_answer(row) for row in rows]
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return [Answer(error="Its answer was not captured.")] * count
