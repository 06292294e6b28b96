"""What a search cost, beside its runs in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from visiontuner.layout import MLFLOW_FILE
from visiontuner.tracking import runs
from visiontuner.tracking.client import Store
from visiontuner.tracking.plan import Point


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds and US dollars of a search and of its trials; dollars None where no price is known.

    Attributes:
        time: when they were known, in milliseconds since the epoch.
        trial_seconds: training time by trial id.
        tags: where it ran, for the search's run.
    """

    time: int
    machine_seconds: float
    dollars: float | None
    trial_seconds: Mapping[str, float]
    trial_dollars: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def log_costs(store: Store, folder: Path, costs: Costs) -> None:
    """Write them as metrics of the runs that `mlflow.json` in a search folder names.

    `seconds` and `cost_usd` of each trial, `machine_seconds` and `cost_usd` of the search.
    """
    known = json.loads((folder / MLFLOW_FILE).read_text(encoding="utf-8"))
    whole = {"machine_seconds": costs.machine_seconds, "cost_usd": costs.dollars}
    _log(store, known["parent_run_id"], whole, costs.time, costs.tags)
    for trial_id, run_id in known["runs"].items():
        if trial_id in costs.trial_seconds:
            part = {
                "seconds": costs.trial_seconds[trial_id],
                "cost_usd": costs.trial_dollars.get(trial_id),
            }
            _log(store, run_id, part, costs.time, {})


def _log(
    store: Store,
    run_id: str,
    values: Mapping[str, float | None],
    time: int,
    tags: Mapping[str, str],
) -> None:
    points = [Point(name, value, time, 0) for name, value in values.items() if value is not None]
    runs.log_batch(store, run_id, points, {}, tags)
