"""Fine-tune an image classifier, see every trial in MLflow, and serve the best one."""

from __future__ import annotations

import os

NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # `ray start` reports that nothing shall be reported: to a port where nobody listens.
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Variables with which the libraries below report nothing to their makers.

They read them when they are imported: in a command, in Ray's workers, in MLflow's writer and where
a model is served, all of which import this package first. A value that is set already stays.
"""

for _name, _value in NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)
