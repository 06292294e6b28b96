"""Private names of Ray (2.60), each with its gain; without one Ray does as it always does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def skip_callback_statistics() -> None:
    """Ray counts its callbacks for statistics that are off here, importing three trackers: 2 s."""
    with suppress(ImportError):
        from ray.air._internal import usage

        usage.tag_callbacks = lambda callbacks: False  # noqa: ARG005


@contextmanager
def without_monitors() -> Iterator[None]:
    """Start none of Ray's helpers that have nothing to do here.

    Its autoscaler, which has no machines, and what reads its workers' logs take half a second of a
    core each, and the first does not end before it is killed, a second later. Its dashboard, which
    is started even where nobody wants one, asks the machine's network for the cloud it is in. Where
    a later Ray has other names for them, they run.
    """
    from ray._private.node import Node

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    kept = {name: vars(Node)[name] for name in names if name in vars(Node)}
    for name in kept:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in kept.items():
            setattr(Node, name, start)


_LOOK_EVERY = 0.02  # seconds


@contextmanager
def waits_until(given_up: threading.Event) -> Iterator[None]:
    """Have Ray look for its first process's port from Python, until it is there or given up.

    Its own wait, up to half a minute, is compiled code that holds the interpreter's lock: a Ctrl-C
    is answered only afterwards, and nothing is computed meanwhile. Where a later Ray has another
    name for it, it waits so.
    """
    from ray._private import node

    wait = getattr(node, "wait_for_persisted_port", None)
    if wait is None:
        yield
        return

    def look_again(*place: object, timeout_ms: int = 30_000) -> int:
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            try:
                return int(wait(*place, timeout_ms=0))
            except RuntimeError:  # not there yet
                if time.monotonic() >= deadline or given_up.wait(_LOOK_EVERY):
                    raise

    setattr(node, "wait_for_persisted_port", look_again)  # noqa: B010
    try:
        yield
    finally:
        setattr(node, "wait_for_persisted_port", wait)  # noqa: B010


@contextmanager
def ray_constant(name: str, value: object) -> Iterator[None]:
    """What Ray has read from a variable when it was imported, perhaps before the search began."""
    from ray._private import ray_constants

    was = getattr(ray_constants, name, None)
    setattr(ray_constants, name, value)
    try:
        yield
    finally:
        setattr(ray_constants, name, was)


def read_token_settings_again() -> None:
    """Where a later Ray has other names for these, a process can run one local search only."""
    from ray import _raylet

    settings = getattr(_raylet, "Config", None)
    tokens = getattr(_raylet, "AuthenticationTokenLoader", None)
    if settings and tokens:
        settings.initialize("")
        tokens.instance().reset_cache()


@contextmanager
def no_runtime_environments() -> Iterator[None]:
    """Have Tune give its actors no environment of their own: workers inherit this process's.

    Tune copies AWS's credentials into it, which Ray then writes into logs that everybody can read.
    For an environment of their own Ray also starts other workers than those that wait, one a core:
    2 s before the first epoch. Where a later Ray has no such variables, there is nothing to do.
    """
    try:
        from ray.tune.execution import class_cache
    except ImportError:
        yield
        return
    names = ("DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE")
    kept = {name: vars(class_cache)[name] for name in names if name in vars(class_cache)}
    for name, values in kept.items():
        setattr(class_cache, name, type(values)())
    try:
        yield
    finally:
        for name, values in kept.items():
            setattr(class_cache, name, values)
