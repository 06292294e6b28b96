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
from types import ModuleType
from typing import Any

import psutil

from visiontuner.experiment import QUICKSTART, Experiment
from visiontuner.workflow import run_search


class _NoWriter:
    """Stands where writer and thread stand, and writes nothing."""

    problem = "off for this measurement"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.run_ids: dict[str, str] = {}

    def close(self, *_: Any) -> bool:
        return False  # so no model is registered


def main() -> None:
    mode, folder, trials, epochs = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    overrides = [
        f"search.trials={trials}",
        f"training.epochs={epochs}",
        "search.algorithm=random",
        "search.scheduler=none",
    ]
    experiment = Experiment.parse(dict(QUICKSTART), overrides, where="the benchmark")
    seconds = {"writing": 0.0, "figures": 0.0, "model": 0.0}
    if mode == "off":
        leave_mlflow_out()
    else:
        measure_into(seconds)
    run_search(experiment, output=folder)
    seconds["search"] = time.time() - psutil.Process().create_time()
    print(json.dumps(seconds))


def leave_mlflow_out() -> None:
    """Modules in the place of the writer's: MLflow is not even imported."""
    for name, thing in (("follow", "WriterThread"), ("mlflow_writer", "MlflowWriter")):
        module = ModuleType(f"visiontuner.tracking.{name}")
        setattr(module, thing, _NoWriter)
        sys.modules[module.__name__] = module


def measure_into(seconds: dict[str, float]) -> None:
    """Note what writer and registration take; `run_search` imports both when it needs them."""
    from visiontuner.serving import registry
    from visiontuner.tracking import follow

    class Noted(follow.WriterThread):
        def close(self, timeout: float = 30.0) -> bool:
            done = super().close(timeout)
            seconds["writing"], seconds["figures"] = self.seconds_spent, self.seconds_figures
            return done

    follow.WriterThread = Noted  # type: ignore[misc]
    registry.log_classifier = _timed(registry.log_classifier, seconds)


def _timed(log: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return log(*arguments, **options)
        finally:
            seconds["model"] = time.monotonic() - began

    return timed


if __name__ == "__main__":
    main()
