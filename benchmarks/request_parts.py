"""A program of `serving`: where the time of a request goes, in MLflow's server without HTTP.

request_parts.py MODEL SECONDS BODY…      with the Python of the model's environment
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

WARM_UP = 20
_SPENT: defaultdict[str, float] = defaultdict(float)


def main() -> None:
    """Median milliseconds of each part; `all` is MLflow's function behind /invocations."""
    os.environ["_MLFLOW_IS_IN_SERVING_ENVIRONMENT"] = "true"
    from mlflow.pyfunc import scoring_server

    model = scoring_server.load_model_with_mlflow_config(sys.argv[1])
    schema = model.metadata.get_input_schema()
    ours = model.unwrap_python_model()
    timed(scoring_server, "_parse_json_data")
    timed(scoring_server, "predictions_to_json")
    timed(type(ours), "predict")
    classifier = sys.modules[type(ours.classifier).__module__]
    timed(classifier, "read_pixels")
    timed(type(ours.classifier), "outputs")
    bodies = cycle([Path(name).read_bytes() for name in sys.argv[3:]])

    def ask() -> dict[str, float]:
        _SPENT.clear()
        began = time.perf_counter()
        answer = scoring_server.invocations(next(bodies), "application/json", model, schema)
        _SPENT["all"] = time.perf_counter() - began
        if answer.status != 200:
            raise RuntimeError(answer.response)
        return dict(_SPENT)

    for _ in range(WARM_UP):
        ask()
    asked = []
    end = time.perf_counter() + float(sys.argv[2])
    while time.perf_counter() < end:
        asked.append(ask())
    print(json.dumps({part: 1e3 * statistics.median(a[part] for a in asked) for part in asked[0]}))


def timed(owner: Any, name: str) -> None:
    """Let a function add up its seconds."""
    function = getattr(owner, name)

    @functools.wraps(function)  # MLflow looks at the signature
    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _SPENT[name] += time.perf_counter() - began

    setattr(owner, name, run)


if __name__ == "__main__":
    main()
