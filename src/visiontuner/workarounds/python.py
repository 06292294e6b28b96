"""What Python does at a time that costs: collecting garbage, importing a script again.

Importing torch or MLflow makes hundreds of thousands of objects that stay until the end. Looking
through them again and again took a fifth of those imports, and a second of every command's end
(Python 3.11).
"""

from __future__ import annotations

import atexit
import gc
import sys
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


@contextmanager
def clean_workers() -> Iterator[None]:
    """Start worker processes that do not import the caller's script again, and Ray with it.

    `multiprocessing` has no setting for it (Python 3.11 to 3.13): it reads `__main__`'s file and
    spec. Without this, workers import whatever the script imports, seconds and memory for each.
    """
    main = sys.modules["__main__"]
    missing = object()
    kept = {name: main.__dict__.get(name, missing) for name in ("__file__", "__spec__")}
    main.__dict__.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is missing:
                del main.__dict__[name]
            else:
                main.__dict__[name] = value
