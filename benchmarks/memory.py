"""Private memory of a worker with 100,000 x 1,280 features, against one with 1,000 x 1,280.

Two kinds of private memory of smaps_rollup: pages that a worker wrote itself (dirty), at the peak;
and these with the file pages that it alone happens to have touched so far (clean), as the median
over its trials: the first worker to read a shared file has it for itself until the second does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from measuring import ROOT, Command, Memory, Row, events, memory_of, report, scratch

TARGETS = ("less than 100 MB more private memory per worker",)
SMALL = {"rows": 5_000, "trials": 2, "epochs": 2}
SMALL_ROWS = 1_000


def measure(*, rows: int = 100_000, trials: int = 4, epochs: int = 3) -> dict[str, Any]:
    with scratch() as folder:
        # About as many steps in both, so that there is time to look.
        few = workers(folder / "few", SMALL_ROWS, trials, epochs * rows // SMALL_ROWS // 2)
        many = workers(folder / "many", rows, trials, epochs)
    names = {"dirty_peak": "dirty alone, peak", "private_median": "clean and dirty, median"}
    compared = f"{rows:,} x 1,280 against {SMALL_ROWS:,} x 1,280, {len(many)} workers"
    megabytes = rows * 1280 * 4 / 1e6
    table_rows = []
    for kind, name in names.items():
        more = max(worker[kind] for worker in many) - min(worker[kind] for worker in few)
        table_rows.append(
            Row(
                what=f"{compared}, {name}",
                target=TARGETS[0],
                result=f"{more:+.0f} MB, largest less smallest (features: {megabytes:.0f} MB)",
                met=more < 100,
            )
        )
    return report(table_rows, few=few, many=many)


def workers(folder: Path, rows: int, trials: int, epochs: int) -> list[dict[str, float]]:
    """Each worker's private memory in MB while it ran trials."""
    script = str(ROOT / "benchmarks" / "trials_on_features.py")
    arguments = [script, str(folder / "search"), str(rows), str(trials), str(epochs)]
    seen: dict[int, list[Memory]] = defaultdict(list)
    with Command(arguments, folder=folder, cache=folder / "cache") as command:
        while command.running():
            if events(folder / "search", "epoch"):
                for process in command.children():
                    now = memory_of(process.pid) if _runs_trials(process) else None
                    if now is not None:
                        seen[process.pid].append(now)
            time.sleep(0.1)
        command.wait()
    if not seen:
        raise RuntimeError("no worker was seen: the trials are too short to be measured")
    return [
        {
            "dirty_peak": max(memory.private_dirty for memory in samples),
            "private_median": median(memory.private for memory in samples),
            "rss_peak": max(memory.rss for memory in samples),
            "samples": len(samples),
        }
        for samples in seen.values()
    ]


def _runs_trials(process: psutil.Process) -> bool:
    """Ray names its workers after what they run; its agents and waiting workers are no trials."""
    try:
        name = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return name.startswith("ray::") and "IDLE" not in name and "Agent" not in name
