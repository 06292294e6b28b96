"""One search with MLflow's writer at work or left out, timed inside.

    python writer_on_or_off.py off|points|all FOLDER TRIALS EPOCHS

`points` writes runs, metrics, parameters and tags alone; `all` draws, and logs and registers the
model too. Prints JSON: seconds of the search (from Python's start to its last line), of calls that
write, of figures, of logging and registering the model, and the processor's of the writer's whole
process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from visiontuner.experiment.schema import QUICKSTART, Experiment
from visiontuner.text import NO_TRACKING
from visiontuner.workflow import tune
from visiontuner.workflow.tracking_process import BackgroundTracking
from visiontuner.workflow.tune import run_search


def main() -> None:
    mode, folder, trials, epochs = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    overrides = [
        f"search.trials={trials}",
        f"training.epochs={epochs}",
        "search.algorithm=random",
        "search.scheduler=none",
    ]
    experiment = Experiment.parse(dict(QUICKSTART), overrides, where="the benchmark")
    seconds = dict.fromkeys(("writing", "figures", "model", "cpu"), 0.0)
    if mode == "off":
        os.environ["MLFLOW_TRACKING_URI"] = NO_TRACKING
    else:
        measure_into(seconds, everything=mode == "all")
    run_search(experiment, output=folder)
    seconds["search"] = time.time() - psutil.Process().create_time()
    print(json.dumps(seconds))


def measure_into(seconds: dict[str, float], *, everything: bool) -> None:
    """Note what writer and registration take."""

    class Noted(BackgroundTracking):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, draw=everything)

        def close(self, *, timeout_seconds: float = 60) -> str | None:
            problem = super().close(timeout_seconds=timeout_seconds)
            seconds.update(self.seconds)
            return problem if everything else "no model for this measurement"

        def register(self) -> str:
            began = time.monotonic()
            try:
                return super().register()
            finally:
                seconds["model"] = time.monotonic() - began

    tune.BackgroundTracking = Noted  # type: ignore[misc]


if __name__ == "__main__":
    main()
