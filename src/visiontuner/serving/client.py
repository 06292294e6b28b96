"""Ways to ask a model what is on images: an endpoint, a server, a model in this process."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self
from urllib.parse import urlsplit

import boto3
import numpy as np
import requests
from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from visiontuner import interrupts
from visiontuner.data.images import decode_image, image_extensions
from visiontuner.errors import BadImageError, ClassifierError, ServingError, UserMistake
from visiontuner.io.aws import default_region, explained, is_busy
from visiontuner.io.files import walk_files
from visiontuner.model.classifier import (
    DESCRIPTION,
    INT8_TOLERANCE,
    Classifier,
    reference_entries,
)
from visiontuner.paths import CLASSIFIER_FOLDER
from visiontuner.serving.answers import MAX_BYTES, MEMORY, Answer, Options, answer
from visiontuner.text import one_line, without_secrets

# Which images a query is about: files, folders, URLs and standard input, read one at a time.


_TIMEOUT_SECONDS = (10, 60)  # to connect, between two blocks
_BLOCK = 1 << 16
# The shorter side, pixels, and JPEG quality; every network here sees less than 600 pixels.
_SMALLER = ((1024, 92), (768, 85), (512, 80), (256, 70))


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One image of a query; `read` gives its content or raises BadImageError."""

    name: str
    read: Callable[[], bytes]


def find_images(sources: Sequence[str]) -> list[ImageSource]:
    """Files, folders (with all below them), http(s) URLs, and `-` for standard input.

    A file that is not there is found out by reading it, so that it does not hold up the others.

    Raises:
        UserMistake: a folder holds no image, or `-` is given twice.
    """
    if list(sources).count("-") > 1:
        raise UserMistake("`-`, standard input, holds one image; give it once.")
    return [image for source in sources for image in _images(source)]


def shrink(content: bytes, max_bytes: int) -> bytes:
    """The same image as a JPEG of at most so many bytes, still more than a network sees.

    Raises:
        BadImageError: it cannot be read, or not be made so small.
    """
    for side, quality in _SMALLER:
        image = decode_image(content, target=side)
        scale = min(1.0, side / min(image.size))
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= max_bytes:
            return buffer.getvalue()
    raise BadImageError(f"{len(content):,} bytes cannot be reduced to the {max_bytes:,} allowed.")


def _images(source: str) -> Iterator[ImageSource]:
    if source == "-":
        yield ImageSource(name="-", read=_read_stdin)
    elif source.startswith(("http://", "https://")):
        yield ImageSource(name=without_secrets(source), read=partial(_read_url, source))
    elif (folder := Path(source)).is_dir():
        yield from _below(folder)
    else:
        yield ImageSource(name=source, read=partial(_read_file, Path(source)))


def _below(folder: Path) -> list[ImageSource]:
    endings = image_extensions()
    paths = [
        Path(entry.path)
        for entry, _ in walk_files(folder)
        if Path(entry.name).suffix.lower() in endings and entry.is_file()
    ]
    if not paths:
        raise UserMistake(f"{folder} holds no image files.")
    return [ImageSource(name=str(path), read=partial(_read_file, path)) for path in paths]


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadImageError(_too_large(path.stat().st_size))
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"Cannot read it: {error.strerror}.") from None


def _read_stdin() -> bytes:
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadImageError(_too_large(len(content)))
    return content


def _read_url(url: str) -> bytes:
    try:
        with requests.get(url, stream=True, timeout=_TIMEOUT_SECONDS) as response:
            response.raise_for_status()
            content = b""
            for block in response.iter_content(_BLOCK):
                content += block
                if len(content) > MAX_BYTES:
                    raise BadImageError(_too_large(len(content)))
            return content
    except requests.HTTPError as error:
        status = error.response.status_code
        raise BadImageError(f"Cannot fetch it: the server answers {status}.") from None
    except requests.RequestException as error:
        raise BadImageError(f"Cannot fetch it: {type(error).__name__}.") from None


def _too_large(length: int) -> str:
    return f"It has {length / 1e6:,.1f} MB or more; at most {MAX_BYTES / 1e6:,.0f} MB are read."


# What every way to a model has in common, and the way to a SageMaker endpoint.
#
# A transport answers one batch of images, or says why it cannot; patience, batches and the order
# of answers are `batching.ask_all`'s. `http_client.py` has the way to a scoring server's URL.


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
    """One row of what the model answers; models from before `confident` and `known` too."""
    if row.get("error") is not None:
        return Answer(error=str(row["error"]))
    probability = float(row["probability"])
    known, novelty = row.get("known"), row.get("novelty")
    return Answer(
        label=str(row["label"]),
        probability=probability,
        confident=bool(row.get("confident", True)),
        known=None if known is None else bool(known),
        novelty=None if novelty is None else float(novelty),
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


# The way to a scoring server's URL.


_NO_URL = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
)
_BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


class HttpTransport:
    """MLflow's scoring server behind a URL, such as `http://127.0.0.1:5000`."""

    def __init__(self, url: str, *, body_limit: int = REQUEST_BYTES) -> None:
        self.url = url.rstrip("/").removesuffix("/invocations")
        self.body_limit = body_limit
        self._shown = without_secrets(self.url)
        try:
            host = urlsplit(url).hostname
        except ValueError:
            raise self._no_url() from None
        # A proxy cannot reach this machine's own loopback.
        self._direct = host in ("127.0.0.1", "localhost", "::1")
        self._local = threading.local()
        self._has_answered = False

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        return decode_answers(self._send(encode_request(contents, options)), len(contents))

    def _send(self, body: bytes) -> bytes:
        try:
            response = self._session().post(
                f"{self.url}/invocations",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=TIMEOUT_SECONDS,
            )
        except _NO_URL:
            raise self._no_url() from None
        except requests.ReadTimeout:
            raise Refused("no answer in time") from None
        except requests.RequestException as error:
            self._broken(error)
        self._has_answered = True
        if response.status_code == 200:
            return response.content
        reason = reason_in(response.content)
        if response.status_code in BUSY:
            raise Busy(reason, _seconds(response.headers.get("Retry-After")))
        if response.status_code == TOO_LARGE:
            self.body_limit = lowered(self.body_limit, body)
            raise TooLarge(reason)
        if response.status_code in REFUSED:
            raise Refused(reason)
        raise ServingError(f"{self._shown} answers {response.status_code}: {reason}")

    def _no_url(self) -> ServingError:
        return ServingError(f"{self._shown!r} is no URL; try http://127.0.0.1:5000.")

    def _broken(self, error: requests.RequestException) -> NoReturn:
        """What breaks is worth another try, but not an address where nothing ever answered."""
        if is_untrusted(error) or not isinstance(error, _BROKEN):
            raise ServingError(f"Cannot ask {self._shown}: {type(error).__name__}.") from None
        if isinstance(error, requests.exceptions.ProxyError):
            raise Busy("the proxy does not let it through") from None
        nobody = "NewConnectionError" in str(error) or "NameResolutionError" in str(error)
        if nobody and not self._has_answered:
            raise ServingError(
                f"Nothing answers at {self._shown}. Start it: mlflow models serve -m "
                "models:/NAME@champion --env-manager local --port 5000"
            ) from None
        raise Busy("the connection broke") from None

    def _session(self) -> requests.Session:
        # A session is one thread's; each keeps its connection.
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = not self._direct
        session: requests.Session = self._local.session
        return session


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


# Ask a model in this process, without a server.


# As many as may decode or wait to decode a large image: here none is told to come again.
_AT_A_TIME = threading.BoundedSemaphore(MEMORY.waiting + 1)


def open_model(folder: Path) -> Transport:
    """A classifier folder, or the one in an MLflow model. No code that the model brings is run.

    Raises:
        ClassifierError: the folder is neither, or damaged.
    """
    return ClassifierFolder(find_classifier(folder))


def find_classifier(folder: Path) -> Path:
    """The classifier folder that a folder is, or that lies in an MLflow model.

    Raises:
        ClassifierError: it is neither.
    """
    if (folder / DESCRIPTION).is_file():
        return folder
    if not (folder / "MLmodel").is_file():
        raise ClassifierError(
            f"{folder} is no model: it has neither {DESCRIPTION} nor MLmodel. "
            "A search leaves one in its folder, classifier/."
        )
    inside = folder / "artifacts" / CLASSIFIER_FOLDER
    if (inside / DESCRIPTION).is_file():
        return inside
    raise ClassifierError(
        f"{folder} is an MLflow model without a classifier of visiontuner. Its own code is not run "
        "here; serve it with `mlflow models serve` if you trust it, and ask it with --url."
    )


class ClassifierFolder:
    """The artifact itself; neither MLflow nor torch is imported."""

    body_limit = sys.maxsize

    def __init__(self, folder: Path) -> None:
        self.classifier = Classifier.load(folder)

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        with _AT_A_TIME:
            return answer(self.classifier, contents, options)


# Ask about many images: in batches, several under way, answered in the order of the images.


IMAGES_PER_REQUEST = 16

_REQUEST_OVERHEAD = 300  # bytes of a request besides its images
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class ImageAnswer:
    """The answer for one image.

    Args:
        image: its path or URL, or `-`.
        reduced: it was sent smaller than it is, to fit into a request.
    """

    image: str
    answer: Answer
    reduced: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"image": self.image, **self.answer.to_dict(), "reduced": self.reduced}


def ask_all(
    transport: Transport,
    images: Iterable[ImageSource],
    options: Options,
    *,
    workers: int = 4,
    batch_size: int = IMAGES_PER_REQUEST,
    sleep: Callable[[float], None] = interrupts.sleep,
) -> Iterator[ImageAnswer]:
    """Answer every image, in their order; one that cannot be read has an error for an answer.

    Args:
        options: `on_error` is always "report" here.
        workers: requests under way at a time.
        batch_size: most images a request.

    Raises:
        ServingError: nothing answers, or it stays busy; what was answered before has been given.
    """
    options = Options(top_k=options.top_k, threshold=options.threshold, on_error="report")
    cut = batches(images, lambda: transport.body_limit, batch_size)
    ask = partial(_ask_batch, transport, options=options, sleep=sleep)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="query")
    try:
        for answers in interrupts.map_ahead(pool, ask, cut, ahead=2 * workers):
            yield from answers
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def patiently(
    ask: Callable[[], list[Answer]], sleep: Callable[[float], None] = interrupts.sleep
) -> list[Answer]:
    """Ask again, up to five times, while the other side is busy or the connection breaks.

    Raises:
        ServingError: it stays so.
        Refused: the other side does not take this batch.
    """
    for delay in _BACKOFF_SECONDS:
        try:
            return ask()
        except Busy as error:
            # Spread out, or all workers would come back at the same moment.
            wait = error.after_seconds or random.uniform(delay / 2, delay)
            sleep(min(wait, _LONGEST_WAIT_SECONDS))
    try:
        return ask()
    except Busy as error:
        tries = len(_BACKOFF_SECONDS) + 1
        raise ServingError(f"Given up after {tries} tries: {error}. Try again later.") from None


@dataclass(frozen=True)
class ReadImage:
    """An image as it will be sent, or the reason why it cannot be."""

    name: str
    content: bytes = b""
    error: str | None = None
    reduced: bool = False


def batches(
    images: Iterable[ImageSource], limit: Callable[[], int], batch_size: int = IMAGES_PER_REQUEST
) -> Iterator[list[ReadImage]]:
    """Read images, one after the other, and part them into requests.

    Args:
        limit: bytes of a request; asked for each image, as it may become less.
        batch_size: most images a request.
    """
    batch: list[ReadImage] = []
    length = 0
    for image in images:
        room = _room(limit())
        one = _fitting(_read(image), room)
        if batch and (len(batch) == batch_size or length + _sent(one) > room):
            yield batch
            batch, length = [], 0
        batch.append(one)
        length += _sent(one)
    if batch:
        yield batch


def _room(limit: int) -> int:
    return limit - _REQUEST_OVERHEAD


def _read(image: ImageSource) -> ReadImage:
    try:
        content = image.read()
        if not content:
            raise BadImageError("It is empty.")
        return ReadImage(image.name, content)
    except BadImageError as error:
        return ReadImage(image.name, error=str(error))


def _fitting(one: ReadImage, limit: int) -> ReadImage:
    """The image itself, or a smaller one that needs at most `limit` bytes of a request."""
    if one.error is not None or _sent(one) <= limit:
        return one
    try:
        return replace(one, content=shrink(one.content, (limit - 8) // 4 * 3 - 3), reduced=True)
    except BadImageError as error:
        return ReadImage(one.name, error=str(error))


def _sent(one: ReadImage) -> int:
    """Bytes in the request: base64, and a row's brackets, quotes and comma."""
    return (len(one.content) + 2) // 3 * 4 + 6


def _ask_batch(
    transport: Transport,
    batch: Sequence[ReadImage],
    options: Options,
    sleep: Callable[[float], None],
) -> list[ImageAnswer]:
    asked = [one for one in batch if one.error is None]
    answers = iter(_ask_in_parts(transport, asked, options, sleep))
    return [next(answers) if one.error is None else _failed(one, one.error) for one in batch]


def _ask_in_parts(
    transport: Transport,
    asked: Sequence[ReadImage],
    options: Options,
    sleep: Callable[[float], None],
) -> list[ImageAnswer]:
    """A batch that is refused is asked in halves: one bad image must not take others with it."""
    if not asked:
        return []
    try:
        contents = [one.content for one in asked]
        answers = patiently(lambda: transport.ask(contents, options), sleep)
        return [
            ImageAnswer(image=one.name, answer=answer, reduced=one.reduced)
            for one, answer in zip(asked, answers, strict=True)
        ]
    except Refused as error:
        if len(asked) == 1:
            smaller = _fitting(asked[0], _room(transport.body_limit))
            if not isinstance(error, TooLarge) or smaller is asked[0]:
                return [_failed(asked[0], str(error))]
            return _ask_batch(transport, [smaller], options, sleep)
    half = len(asked) // 2
    return [
        answer
        for part in (asked[:half], asked[half:])
        for answer in _ask_in_parts(transport, part, options, sleep)
    ]


def _failed(one: ReadImage, reason: str) -> ImageAnswer:
    return ImageAnswer(image=one.name, answer=Answer(error=reason), reduced=one.reduced)


# The images that a model was packaged with, and its own answers to them.


TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reference:
    """What the artifact itself answered when it was packaged.

    Args:
        images: the contents of N image files.
        probabilities: float64, shape (N, C), in the order of `class_names`.
        novelty: of the N images; empty where the artifact cannot tell.
        tolerance: by how much an endpoint's processor may make them differ.
    """

    class_names: list[str]
    images: list[bytes]
    probabilities: np.ndarray[Any, np.dtype[np.float64]]
    novelty: tuple[float, ...] = ()
    tolerance: float = TOLERANCE

    @classmethod
    def read(cls, model: Path) -> Self:
        """From an MLflow model folder.

        Raises:
            ClassifierError: it holds no readable reference images.
        """
        folder = model / "artifacts" / CLASSIFIER_FOLDER
        try:
            described = json.loads((folder / "classifier.json").read_text("utf-8"))
            names = described["class_names"]
            int8 = "quantization" in (described.get("metadata") or {})
            raw = reference_entries(json.loads((folder / "reference.json").read_text("utf-8")))
            images = [base64.b64decode(image["image"]) for image in raw]
            recorded = np.array([image["probabilities"] for image in raw], dtype=np.float64)
            if recorded.shape != (len(images), len(names)) or not images:
                raise ValueError("no images, or other classes")
            novelty = [float(one["novelty"]) for one in raw if one.get("novelty") is not None]
        except OSError as error:
            raise ClassifierError(
                f"{model} is no MLflow model of visiontuner ({error.strerror}: {error.filename})."
            ) from None
        except (ValueError, LookupError, TypeError) as error:
            raise ClassifierError(
                f"{folder}/reference.json cannot be used ({type(error).__name__}: {error}). "
                "Package the classifier again."
            ) from None
        return cls(
            names,
            images,
            recorded,
            tolerance=INT8_TOLERANCE if int8 else TOLERANCE,
            novelty=tuple(novelty) if len(novelty) == len(raw) else (),
        )

    def options(self) -> Options:
        """Ask with these to compare: every class is listed."""
        return Options(top_k=len(self.class_names))

    def bodies(self) -> Iterator[bytes]:
        """Requests with one image each, without end."""
        return cycle([encode_request([image], Options()) for image in self.images])

    def difference(self, answers: Sequence[Mapping[str, Any]]) -> float:
        """The largest difference of a probability or of a novelty; NaN if some are missing.

        Args:
            answers: for each image its `top_k` and, where the artifact can tell, its `novelty`.
        """
        answered = [{c["label"]: c["probability"] for c in one["top_k"] or ()} for one in answers]
        got = np.array([[row.get(name, np.nan) for name in self.class_names] for row in answered])
        if got.shape != self.probabilities.shape:
            return float("nan")
        differences = np.abs(got - self.probabilities).ravel()
        if self.novelty:
            novelty = np.array([one.get("novelty") for one in answers], dtype=np.float64)
            differences = np.append(differences, np.abs(novelty - self.novelty))
        return float(differences.max())
