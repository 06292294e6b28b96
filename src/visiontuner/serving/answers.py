"""Images in, one answer each: what the MLflow model and its client have in common. No torch."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal, Self

from visiontuner.data.images import DecodingMemory
from visiontuner.errors import BadImageError, UserMistake
from visiontuner.model.classifier import Classifier

DEFAULT_TOP_K = 5
# More than any endpoint takes in a request; a table that is scored in a batch job may hold more.
MAX_BYTES = 25_000_000
# A phone's largest photographs.
MAX_PIXELS = 50_000_000
# Of a PNG or BMP 50 million pixels, of a WebP 20, of a JPEG 2000 14. A process answers five or more
# requests at a time: one decodes a large image, two wait, and the others stay for small images.
MEMORY = DecodingMemory(small=20_000_000, most=400_000_000, waiting=2)

# Of base64, its alphabet for URLs included, and what may stand between its lines.
_LETTERS = re.compile(rb"[A-Za-z0-9+/_-]+={0,2}")
_BLANKS = b" \t\r\n"
_LEAST = 32  # bytes; the base64 of the smallest image is longer
_ON_ERROR = ("fail", "report")


class BadRequest(ValueError):
    """A request that the one who sent it can put right; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request may choose.

    Args:
        top_k: how many of the most probable classes to list, at least 1.
        threshold: an answer below this probability is not confident; None for what the classifier
            itself says, which may be that no answer is.
        on_error: an image that cannot be read fails the request, or is reported in its row.
    """

    top_k: int = DEFAULT_TOP_K
    threshold: float | None = None
    on_error: Literal["fail", "report"] = "fail"

    @classmethod
    def read(cls, params: Mapping[str, Any] | None) -> Self:
        """Check what a client sent; what it left out, or sent as null, is the default.

        Raises:
            BadRequest: a value breaks a rule.
        """
        given = {key: value for key, value in (params or {}).items() if value is not None}
        top_k = given.get("top_k", DEFAULT_TOP_K)
        if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1:
            raise BadRequest(f"top_k must be a whole number >= 1, got {_shown(top_k)}.")
        threshold = given.get("threshold")
        if threshold is not None and not _is_fraction(threshold):
            raise BadRequest(f"threshold must be a number in [0, 1], got {_shown(threshold)}.")
        on_error = given.get("on_error", "fail")
        if not isinstance(on_error, str) or on_error not in _ON_ERROR:
            raise BadRequest(f'on_error must be "fail" or "report", got {_shown(on_error)}.')
        return cls(
            top_k=int(top_k),
            threshold=None if threshold is None else float(threshold),
            on_error=on_error,  # type: ignore[arg-type]  # one of the two
        )

    @classmethod
    def chosen(cls, top_k: int, threshold: float | None) -> Self:
        """What a user asks of many images: each that cannot be read is reported.

        Raises:
            UserMistake: a value breaks a rule.
        """
        try:
            return cls.read({"top_k": top_k, "threshold": threshold, "on_error": "report"})
        except BadRequest as error:
            raise UserMistake(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is on one image, or why nobody knows.

    Args:
        label: the most probable class; None with an error.
        probability: its calibrated probability, in [0, 1].
        confident: whether the probability reaches the threshold; always without a threshold, and
            never where every answer abstains.
        known: whether the image is like the training images; None where the model cannot tell.
        novelty: how unlike them it is, in [0, 2]; None where `known` is.
        top_k: `{"label", "probability"}` of the most probable classes, best first.
        error: why the image was not answered; None if it was.
    """

    label: str | None = None
    probability: float | None = None
    confident: bool | None = None
    known: bool | None = None
    novelty: float | None = None
    top_k: Sequence[Mapping[str, Any]] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "top_k": [dict(choice) for choice in self.top_k]}


def answer(classifier: Classifier, images: Sequence[object], options: Options) -> list[Answer]:
    """Name the image in each row, all of them in one run through the network.

    Args:
        images: files' contents, as bytes or as base64 text. A path is never read.

    Raises:
        BadRequest: an image cannot be read and `on_error` is "fail"; names the first such row.
        BusyError: too many other requests hold large images.
    """
    contents = [_content(image) for image in images]
    scores = classifier.score(
        [one if isinstance(one, bytes) else b"" for one in contents],
        max_pixels=MAX_PIXELS,
        memory=MEMORY,
    )
    answers = []
    for number, (content, row, novelty, error) in enumerate(zip(contents, *scores, strict=True)):
        reason = content if isinstance(content, BadImageError) else error
        if reason is not None and options.on_error == "fail":
            raise BadRequest(f"Row {number}: {reason}")
        if reason is not None:
            answers.append(Answer(error=str(reason)))
            continue
        best = classifier.prediction(
            row, options.top_k, threshold=options.threshold, novelty=novelty
        )
        answers.append(
            Answer(
                label=best.label,
                probability=best.probability,
                confident=best.confident,
                known=best.known,
                novelty=best.novelty,
                top_k=[{"label": label, "probability": value} for label, value in best.top_k],
            )
        )
    return answers


def _content(image: object) -> bytes | BadImageError:
    is_text = isinstance(image, str)
    if isinstance(image, str):
        # Four letters hold three bytes: refused before anything is decoded.
        if len(image) * 3 // 4 > MAX_BYTES:
            return _too_large(len(image) * 3 // 4)
        image = image.encode("ascii", errors="replace")
    if not isinstance(image, bytes | bytearray | memoryview):
        return BadImageError(f"image must be bytes or base64 text, got {type(image).__name__}.")
    content = bytes(image)
    if content.startswith(b"data:"):
        return BadImageError("image is a data URL; send what follows its comma.")
    # MLflow hands on the base64 of `inputs` and `instances` as it came. No image's content is
    # base64: every format has bytes outside its alphabet.
    decoded = _decoded(content)
    if decoded is None and (is_text or _is_meant_as_base64(content)):
        return BadImageError(_why_no_base64(content))
    content = content if decoded is None else decoded
    return content if len(content) <= MAX_BYTES else _too_large(len(content))


def _is_meant_as_base64(content: bytes) -> bool:
    return len(content) >= _LEAST and bool(_LETTERS.fullmatch(content.translate(None, _BLANKS)))


def _decoded(content: bytes) -> bytes | None:
    """Base64 as RFC 4648 says it, broken into lines or not: what MLflow decodes in tables.

    It drops `-` and `_` of the other alphabet there, and refuses what is not padded.
    """
    try:
        return base64.b64decode(content.translate(None, _BLANKS), validate=True)
    except binascii.Error:
        return None


def _why_no_base64(content: bytes) -> str:
    content = content.translate(None, _BLANKS)
    if b"-" in content or b"_" in content:
        return "image is not base64; send the file's content with + and /, not - and _."
    if len(content) % 4 and _LETTERS.fullmatch(content):
        return "image is not base64; send the file's content, padded with = to fours."
    return "image is not base64; send the file's content."


def _too_large(length: int) -> BadImageError:
    return BadImageError(
        f"image has {length / 1e6:,.1f} MB, more than the {MAX_BYTES / 1e6:,.0f} MB allowed; "
        "send a smaller one."
    )


def _is_fraction(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 <= value <= 1
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
