"""Ctrl-C, SIGTERM and SIGHUP: handlers that count, and waits that notice.

An exception from within a handler is raised wherever the program happens to be: in a lock's
release it ends a library half-way, in a finaliser it is printed and lost. So handlers count here,
and the main thread raises `KeyboardInterrupt` where it can be interrupted: in `check`, and in every
wait of this module, within a tenth of a second. Each signal is raised once, so that what ends in
order may wait as well; another signal is raised again.

Other threads are never interrupted: the main thread, which started them, ends them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.1
# A main thread that is in a call of someone else's for longer does not notice a signal in time.
_NOTICED_WITHIN_SECONDS = 1.0
_ENDS_WITHIN_SECONDS = 4.0


class _Received:
    """Signals that came, those that were answered, and how many parts end in order only."""

    def __init__(self) -> None:
        self.handled: tuple[signal.Signals, ...] = ()
        self.count = 0
        self.answered = 0
        self.in_order = 0
        self.came_in_order = False  # the last one, to a part that ends in order

    def add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.came_in_order = self.in_order > 0


_received = _Received()


@contextmanager
def handled(leave: Callable[[], None] | None = None) -> Iterator[None]:
    """Count signals instead of ending, for the length of a context; raise one that came last.

    What is ignored stays so (SIGHUP under `nohup`). Within another such context, and outside the
    main thread, where Python allows no handlers, nothing is changed.

    Args:
        leave: ends the process without the main thread, called from another thread: for a call of
            someone else's that no signal wakes. It is called when a signal was not noticed within
            a second, or the context has not ended 4 s later; in a part that is `in_order` only
            after another signal.
    """
    if _received.handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _received.count = _received.answered = 0
    _received.handled = tuple(n for n in SIGNALS if before[n] not in (signal.SIG_IGN, None))
    rearm()
    try:
        with _watching(leave):
            yield
            check()
    finally:
        for number in _received.handled:
            signal.signal(number, before[number])
        _received.handled = ()


def rearm() -> None:
    """Take the handlers back from a library that has set its own, such as Ray in C++."""
    for number in _received.handled:
        signal.signal(number, _received.add)


@contextmanager
def in_order() -> Iterator[None]:
    """A part that has something to end in order: one signal alone does not end the process."""
    _received.in_order += 1
    try:
        yield
    finally:
        _received.in_order -= 1


def take() -> bool:
    """Whether a signal came since the last time; False outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return False
    count = _received.count  # read once: another signal may come between any two lines
    is_new = count > _received.answered
    _received.answered = count
    return is_new


def is_waiting() -> bool:
    """Whether there is a signal that `take` has not seen; for other threads."""
    return _received.count > _received.answered


def check() -> None:
    """Raise KeyboardInterrupt if a signal came, in the main thread."""
    if take():
        raise KeyboardInterrupt


def sleep(seconds: float) -> None:
    """As `time.sleep`, until a signal comes."""
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_SECONDS))
        check()


def beside(call: Callable[[], T]) -> Future[T]:
    """Start a call in a thread that ends with the process, whatever it is doing then.

    A `ThreadPoolExecutor` would not do: Python waits at its end until the work is done.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="beside", daemon=True).start()
    return future


def result(future: Future[T], *, in_any_case: bool = False) -> T:
    """As `future.result()`, until a signal comes; the work goes on in its thread then.

    Args:
        in_any_case: a signal is left for whoever waits next.
    """
    if threading.current_thread() is threading.main_thread():
        while not wait([future], timeout=_POLL_SECONDS).done:
            rearm()
            if not in_any_case:
                check()
        rearm()
        if not in_any_case:
            check()  # before an error of the work: a call that held Python's lock hid the signal
    return future.result()


def as_completed(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """As that of `concurrent.futures`, until a signal comes."""
    waiting = set(futures)
    while waiting:
        check()
        done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        yield from done


def map_ahead(
    executor: Executor, function: Callable[[Item], T], items: Iterable[Item], *, ahead: int
) -> Generator[T]:
    """As `executor.map`, until a signal comes; results come in order, so many are worked on ahead.

    Args:
        ahead: items beyond the one that is waited for.
    """
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(executor.submit(function, item))
        if len(waiting) > ahead:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


def call(ask: Callable[[], T]) -> T:
    """Do in another thread what no signal wakes, and wait for it until a signal comes."""
    if threading.current_thread() is not threading.main_thread():
        return ask()
    return result(beside(ask))


def get(queue: SimpleQueue[T], timeout: float | None) -> T:
    """As `queue.get(timeout=timeout)`, until a signal comes.

    Raises:
        queue.Empty: nothing came in time.
    """
    end = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        check()
        left = end - time.monotonic()
        try:
            return queue.get(timeout=max(0.0, min(left, _POLL_SECONDS)))
        except Empty:
            if left <= 0:
                raise


@contextmanager
def _watching(leave: Callable[[], None] | None) -> Iterator[None]:
    """A thread that learns of signals at once, even while the main thread runs no Python."""
    if leave is None:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ended = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(reader, leave, ended), name="signals", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(writer)
        watcher.join()


def _watch(reader: int, leave: Callable[[], None], ended: threading.Event) -> None:
    """Leave where a signal is not noticed; ends with the pipe that brings their numbers."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    known = times = 0
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            if not set(numbers) & set(SIGNALS):
                continue
            if signal.SIGHUP in numbers:
                _print_to_nowhere(terminals)
            times += 1
            if ended.wait(_NOTICED_WITHIN_SECONDS):
                continue
            count, answered = _received.count, _received.answered
            is_noticed, known = known < count == answered, count
            # Either thread may have waited long for Python's lock: the signal may not be counted
            # yet, or the part that it came to may have ended meanwhile.
            if times == 1 and (_received.in_order or _received.came_in_order):
                if not is_noticed:
                    os.write(2, b"Stopping in order. Once more ends it at once.\n")
            elif not is_noticed or not ended.wait(_ENDS_WITHIN_SECONDS):
                leave()


def _print_to_nowhere(terminals: Sequence[int]) -> None:
    """What is printed to a terminal that has gone would fail, in the middle of an end in order."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
