"""Private names of Ray (2.60), each with its gain; without one Ray does as it always does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Run the trials that a plan names on Ray Tune, and write what happens to the journal.


def skip_callback_statistics() -> None:
    """Ray counts its callbacks for statistics that are off here, importing three trackers: 2 s."""
    with suppress(ImportError):
        from ray.air._internal import usage

        usage.tag_callbacks = lambda callbacks: False  # noqa: ARG005


# A Ray for one search: started on this machine, or the cluster that this machine is in.


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
