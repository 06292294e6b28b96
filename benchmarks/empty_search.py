"""A Ray Tune search whose trials do nothing but import torch and report; prints its seconds.

python empty_search.py TRIALS EPOCHS
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from typing import Any

# As a search of ours sets them, see search/ray_cluster.py.
os.environ.update(
    {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)

import ray
from ray import tune


def trial(config: dict[str, Any]) -> None:
    import torch  # noqa: F401 - what every worker needs

    for epoch in range(config["epochs"]):
        tune.report({"epoch": epoch, "score": 0.5})


def main() -> None:
    trials, epochs = int(sys.argv[1]), int(sys.argv[2])
    began = time.monotonic()
    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"epochs": epochs},
            tune_config=tune.TuneConfig(
                metric="score", mode="max", num_samples=trials, reuse_actors=True
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    ray.shutdown()
    print(json.dumps({"seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
