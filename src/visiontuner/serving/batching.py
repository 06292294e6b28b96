"""Ask about many pictures: in batches, several under way, answered in the order of the pictures."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from visiontuner import interrupts
from visiontuner.errors import BadImageError, ServingError
from visiontuner.serving.answers import Answer, Options
from visiontuner.serving.client import Busy, Refused, TooLarge, Transport
from visiontuner.serving.pictures import Picture, shrink

PICTURES_PER_REQUEST = 16

_REQUEST_OVERHEAD = 300  # bytes of a request besides its pictures
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class PictureAnswer:
    """The answer for one picture.

    Args:
        picture: its path or URL, or `-`.
        reduced: it was sent smaller than it is, to fit into a request.
    """

    picture: str
    answer: Answer
    reduced: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"picture": self.picture, **self.answer.to_dict(), "reduced": self.reduced}


def ask_all(
    transport: Transport,
    pictures: Iterable[Picture],
    options: Options,
    *,
    workers: int = 4,
    batch_size: int = PICTURES_PER_REQUEST,
    sleep: Callable[[float], None] = interrupts.sleep,
) -> Iterator[PictureAnswer]:
    """Answer every picture, in their order; one that cannot be read has an error for an answer.

    Args:
        options: `on_error` is always "report" here.
        workers: requests under way at a time.
        batch_size: most pictures a request.

    Raises:
        ServingError: nothing answers, or it stays busy; what was answered before has been given.
    """
    options = Options(top_k=options.top_k, threshold=options.threshold, on_error="report")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="query")
    pending: deque[Future[list[PictureAnswer]]] = deque()
    try:
        for batch in _batches(pictures, transport, batch_size):
            pending.append(pool.submit(_ask_batch, transport, batch, options, sleep))
            if len(pending) > 2 * workers:
                yield from interrupts.result(pending.popleft())
        while pending:
            yield from interrupts.result(pending.popleft())
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
class _Read:
    """A picture as it will be sent, or the reason why it cannot be."""

    name: str
    content: bytes = b""
    error: str | None = None
    reduced: bool = False


def _batches(
    pictures: Iterable[Picture], transport: Transport, batch_size: int
) -> Iterator[list[_Read]]:
    batch: list[_Read] = []
    length = 0
    for picture in pictures:
        limit = _room(transport)  # may be less than it was
        one = _fitting(_read(picture), limit)
        if batch and (len(batch) == batch_size or length + _sent(one) > limit):
            yield batch
            batch, length = [], 0
        batch.append(one)
        length += _sent(one)
    if batch:
        yield batch


def _room(transport: Transport) -> int:
    return transport.body_limit - _REQUEST_OVERHEAD


def _read(picture: Picture) -> _Read:
    try:
        content = picture.read()
        if not content:
            raise BadImageError("It is empty.")
        return _Read(picture.name, content)
    except BadImageError as error:
        return _Read(picture.name, error=str(error))


def _fitting(one: _Read, limit: int) -> _Read:
    """The picture itself, or a smaller one that needs at most `limit` bytes of a request."""
    if one.error is not None or _sent(one) <= limit:
        return one
    try:
        return replace(one, content=shrink(one.content, (limit - 8) // 4 * 3 - 3), reduced=True)
    except BadImageError as error:
        return _Read(one.name, error=str(error))


def _sent(one: _Read) -> int:
    """Bytes in the request: base64, and a row's brackets, quotes and comma."""
    return (len(one.content) + 2) // 3 * 4 + 6


def _ask_batch(
    transport: Transport, batch: Sequence[_Read], options: Options, sleep: Callable[[float], None]
) -> list[PictureAnswer]:
    asked = [one for one in batch if one.error is None]
    answers = iter(_ask_in_parts(transport, asked, options, sleep))
    return [next(answers) if one.error is None else _failed(one, one.error) for one in batch]


def _ask_in_parts(
    transport: Transport, asked: Sequence[_Read], options: Options, sleep: Callable[[float], None]
) -> list[PictureAnswer]:
    """A batch that is refused is asked in halves: one bad picture must not take others with it."""
    if not asked:
        return []
    try:
        contents = [one.content for one in asked]
        answers = patiently(lambda: transport.ask(contents, options), sleep)
        return [
            PictureAnswer(picture=one.name, answer=answer, reduced=one.reduced)
            for one, answer in zip(asked, answers, strict=True)
        ]
    except Refused as error:
        if len(asked) == 1:
            smaller = _fitting(asked[0], _room(transport))
            if not isinstance(error, TooLarge) or smaller is asked[0]:
                return [_failed(asked[0], str(error))]
            return _ask_batch(transport, [smaller], options, sleep)
    half = len(asked) // 2
    return [
        answer
        for part in (asked[:half], asked[half:])
        for answer in _ask_in_parts(transport, part, options, sleep)
    ]


def _failed(one: _Read, reason: str) -> PictureAnswer:
    return PictureAnswer(picture=one.name, answer=Answer(error=reason), reduced=one.reduced)
