"""Lets Ray Tune end a trial when a diagnostic rule says so."""

from __future__ import annotations

from typing import Any

from ray.tune import Stopper

from visiontuner.journal import Finding
from visiontuner.search.live_rules import LiveRules


class RuleStopper(Stopper):
    """Asked by Ray Tune after every result whether a rule ends that trial."""

    def __init__(self, rules: LiveRules, metrics: tuple[str, ...]) -> None:
        self._rules: LiveRules | None = rules
        self._metrics = metrics

    def __getstate__(self) -> dict[str, Any]:
        return {"_rules": None, "_metrics": self._metrics}  # an open journal stays here

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self._rules is None or "epoch" not in result:
            return False
        metrics = {name: float(result[name]) for name in self._metrics}
        found = [Finding(**finding) for finding in result.get("findings", ())]
        trial_id = result["config"]["trial_id"]
        return self._rules.stops(trial_id, int(result["epoch"]), metrics, found)

    def stop_all(self) -> bool:
        return False  # never the whole search
