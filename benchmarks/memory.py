"""Private memory of a worker with 100,000 x 1,280 features, against one with 1,000 x 1,280.

Both kinds of private memory of smaps_rollup are reported: pages that a worker wrote itself (dirty),
and these with the pages that it alone happens to map (clean and dirty).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
from measuring import ROOT, Command, Memory, Row, events, memory_of, report, scratch

TARGETS = ("less than 100 MB more private memory per worker",)
SMALL = {"rows": 5_000, "trials": 2, "epochs": 2}
SMALL_ROWS = 1_000


def measure(*, rows: int = 100_000, trials: int = 4, epochs: int = 3) -> dict[str, Any]:
    with scratch() as folder:
        # About as many steps in both, so that there is time to look.
        few = workers_at_peak(folder / "few", SMALL_ROWS, trials, epochs * rows // SMALL_ROWS // 2)
        many = workers_at_peak(folder / "many", rows, trials, epochs)
    more = {
        kind: max(m[kind] for m in many) - min(m[kind] for m in few)
        for kind in ("private", "private_dirty")
    }
    names = {"private": "clean and dirty", "private_dirty": "dirty alone"}
    table_rows = [
        Row(
            what=f"{rows:,} x 1,280 against {SMALL_ROWS:,} x 1,280, private {names[kind]}, "
            f"{len(many)} workers",
            target=TARGETS[0],
            result=f"{value:+.0f} MB, largest less smallest (features: {rows * 5120 / 1e6:.0f} MB)",
            met=value < 100,
        )
        for kind, value in more.items()
    ]
    return report(table_rows, few=few, many=many)


def workers_at_peak(folder: Path, rows: int, trials: int, epochs: int) -> list[dict[str, float]]:
    """Each worker's largest private memory, in MB, while it ran trials."""
    script = str(ROOT / "benchmarks" / "trials_on_features.py")
    arguments = [script, str(folder / "search"), str(rows), str(trials), str(epochs)]
    peaks: dict[int, dict[str, float]] = {}
    with Command(arguments, folder=folder, cache=folder / "cache") as command:
        while command.running():
            if events(folder / "search", "trial_started"):
                for process in command.children():
                    _note_peak(peaks, process)
            time.sleep(0.1)
        command.wait()
    if not peaks:
        raise RuntimeError("no worker was seen: the trials are too short to be measured")
    return list(peaks.values())


def _note_peak(peaks: dict[int, dict[str, float]], process: psutil.Process) -> None:
    if not _runs_trials(process):
        return
    now: Memory | None = memory_of(process.pid)
    if now is not None:
        seen = peaks.setdefault(process.pid, {"private": 0.0, "private_dirty": 0.0, "rss": 0.0})
        for kind in seen:
            seen[kind] = max(seen[kind], getattr(now, kind))


def _runs_trials(process: psutil.Process) -> bool:
    """Ray renames a worker after what it runs: `ray::ImplicitFunc` or `ray::run_trial`."""
    try:
        name = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return name.startswith("ray::") and "IDLE" not in name
