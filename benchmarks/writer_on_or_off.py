"""One search with MLflow's writer at work or left out, timed inside.

    python writer_on_or_off.py on|off FOLDER TRIALS EPOCHS

Prints JSON: seconds of the search (from Python's start to its last line), of writing, of figures,
and of logging and registering the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from visiontuner import workflow
from visiontuner.experiment import QUICKSTART, Experiment


class _Off:
    """Stands where the writer stands, and writes nothing."""

    run_ids: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, *_: Any) -> None: ...

    def close(self, **_: Any) -> str:
        return "off for this measurement"  # without runs no model is registered


def main() -> None:
    mode, folder, trials, epochs = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    overrides = [
        f"search.trials={trials}",
        f"training.epochs={epochs}",
        "search.algorithm=random",
        "search.scheduler=none",
    ]
    seconds = {"writing": 0.0, "figures": 0.0, "model": 0.0}
    if mode == "off":
        workflow._Tracking = _Off  # type: ignore[misc, assignment]
    else:
        _measure_writing(seconds)
    experiment = Experiment.parse(dict(QUICKSTART), overrides, where="the benchmark")
    workflow.run_search(experiment, output=folder)
    seconds["search"] = time.time() - psutil.Process().create_time()
    print(json.dumps(seconds))


def _measure_writing(seconds: dict[str, float]) -> None:
    tracking, register = workflow._Tracking, workflow._register

    class Timed(tracking):  # type: ignore[misc, valid-type]
        def close(self, **options: Any) -> str | None:
            problem: str | None = super().close(**options)
            seconds["writing"] = self._thread.seconds_spent
            seconds["figures"] = self._thread.seconds_figures
            return problem

    workflow._Tracking = Timed  # type: ignore[misc]
    workflow._register = _timed(register, seconds)


def _timed(register: Callable[..., str], seconds: dict[str, float]) -> Callable[..., str]:
    def timed(*arguments: Any) -> str:
        began = time.monotonic()
        try:
            return register(*arguments)
        finally:
            seconds["model"] = time.monotonic() - began

    return timed


if __name__ == "__main__":
    main()
