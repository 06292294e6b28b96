"""Python's garbage collector, kept away from where it only costs time.

Importing torch or MLflow makes hundreds of thousands of objects that stay until the end. Looking
through them again and again took a fifth of those imports, and a second of every command's end
(Python 3.11).
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Collections begin when so many more objects were made than freed; Python's own is 700.
_OBJECTS = 50_000


def collect_rarely() -> None:
    """For a whole command: fewer collections, and none at its end."""
    gc.set_threshold(_OBJECTS)
    atexit.register(gc.freeze)


@contextmanager
def left_alone() -> Iterator[None]:
    """No collections inside: around imports."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
