"""A Ray for one search: started on this machine, or the cluster that this machine is in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from visiontuner.errors import ExperimentError, SearchFailed
from visiontuner.experiment import Search

Where = Literal["local", "auto"]

# Trials map the features by path, so the object store holds next to nothing.
OBJECT_STORE_BYTES = 100 * 1024**2

# Ray and its workers read these at start. Tune's tables and loggers are replaced by ours.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A search is resumed from its journal: Ray's own snapshots would only cost time.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "MALLOC_ARENA_MAX": "2",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial takes, and how many trials run at once."""

    cpus_per_trial: float
    gpus_per_trial: float
    concurrent_trials: int

    @property
    def threads(self) -> int:
        """Threads of one trial's arithmetic."""
        return max(1, int(self.cpus_per_trial))

    def to_ray(self) -> dict[str, float]:
        return {"cpu": self.cpus_per_trial, "gpu": self.gpus_per_trial}


@contextmanager
def ray_for_search(where: Where) -> Iterator[None]:
    """A quiet, initialised Ray; one that was there before is used and left running.

    Raises:
        SearchFailed: Ray cannot start, or there is no cluster to join.
    """
    import ray

    with _environment(_ENVIRONMENT):
        if ray.is_initialized():
            yield
            return
        try:
            ray.init(
                address="auto" if where == "auto" else "local",
                include_dashboard=None if where == "auto" else False,
                object_store_memory=None if where == "auto" else OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise SearchFailed(
                f"Ray does not start here ({' '.join(str(error).split())[:200]}). "
                "`visiontuner doctor` looks for the reason."
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def resources_for(search: Search) -> Resources:
    """What a trial gets on the running Ray.

    Raises:
        ExperimentError: one trial wants more than the largest machine has.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    most_cpus = max(machine.get("CPU", 0) for machine in machines)
    if search.cpus_per_trial > most_cpus:
        raise ExperimentError(
            f"search.cpus_per_trial is {search.cpus_per_trial:g}, but the machine has "
            f"{most_cpus:g}; choose at most that."
        )
    most_gpus = max(machine.get("GPU", 0) for machine in machines)
    gpus = search.gpus_per_trial if most_gpus else 0.0
    if gpus > most_gpus:
        raise ExperimentError(
            f"search.gpus_per_trial is {gpus:g}, but the machine has {most_gpus:g}; "
            "choose at most that."
        )
    slots = sum(_slots(machine, search.cpus_per_trial, gpus) for machine in machines)
    return Resources(
        cpus_per_trial=search.cpus_per_trial, gpus_per_trial=gpus, concurrent_trials=slots
    )


def _slots(machine: dict[str, float], cpus: float, gpus: float) -> int:
    by_cpu = int(machine.get("CPU", 0) / cpus)
    return min(by_cpu, int(machine.get("GPU", 0) / gpus)) if gpus else by_cpu


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set what is not set already, and take it back afterwards."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
