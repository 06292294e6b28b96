"""Fine-tune an image classifier, see every trial in MLflow, and serve the best one.

    import visiontuner as vt

    search = vt.tune("photos", backbone="resnet50", trials=16)
    result = search.evaluate()
    vt.promote(search)

Each name is imported when it is used: `import visiontuner` alone costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontuner.api import (
        DataReport,
        Evaluation,
        Search,
        compare,
        deploy,
        diagnose,
        drift,
        endpoints,
        evaluate,
        evaluate_folder,
        export,
        lineage,
        preflight,
        prepare,
        promote,
        quantize,
        query,
        resume,
        suggest,
        suspects,
        train,
        tune,
        undeploy,
    )
    from visiontuner.errors import VisiontunerError
    from visiontuner.experiment.schema import Experiment
    from visiontuner.model.classifier import Classifier

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

_MODULES = {
    "Classifier": "visiontuner.model.classifier",
    "DataReport": "visiontuner.api",
    "Evaluation": "visiontuner.api",
    "Experiment": "visiontuner.experiment.schema",
    "Search": "visiontuner.api",
    "VisiontunerError": "visiontuner.errors",
    "compare": "visiontuner.api",
    "deploy": "visiontuner.api",
    "diagnose": "visiontuner.api",
    "drift": "visiontuner.api",
    "endpoints": "visiontuner.api",
    "evaluate": "visiontuner.api",
    "evaluate_folder": "visiontuner.api",
    "export": "visiontuner.api",
    "lineage": "visiontuner.api",
    "preflight": "visiontuner.api",
    "prepare": "visiontuner.api",
    "promote": "visiontuner.api",
    "quantize": "visiontuner.api",
    "query": "visiontuner.api",
    "resume": "visiontuner.api",
    "suggest": "visiontuner.api",
    "suspects": "visiontuner.api",
    "train": "visiontuner.api",
    "tune": "visiontuner.api",
    "undeploy": "visiontuner.api",
}
__all__ = [
    "Classifier",
    "DataReport",
    "Evaluation",
    "Experiment",
    "Search",
    "VisiontunerError",
    "compare",
    "deploy",
    "diagnose",
    "drift",
    "endpoints",
    "evaluate",
    "evaluate_folder",
    "export",
    "lineage",
    "preflight",
    "prepare",
    "promote",
    "quantize",
    "query",
    "resume",
    "suggest",
    "suspects",
    "train",
    "tune",
    "undeploy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'visiontuner' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
