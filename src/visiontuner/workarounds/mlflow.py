"""Private names of MLflow (3.17), each with its gain and its fallback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def requirements_taken_on_trust() -> Iterator[None]:
    """Spare MLflow a look through every file of every installed package: two thirds of the logging.

    It would compare the requirements with what is installed, and they were made from that. Where a
    later MLflow has another name for it, it looks.
    """
    from mlflow.utils import requirements_utils

    name = "_check_requirement_satisfied"
    check = getattr(requirements_utils, name, None)
    if check is None:
        yield
        return
    setattr(requirements_utils, name, lambda _: None)
    try:
        yield
    finally:
        setattr(requirements_utils, name, check)
