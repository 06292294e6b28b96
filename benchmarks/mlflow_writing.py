"""What MLflow costs a search: the same search with the writer on and off, in turn.

Figures and the model's registration are not writing; they are reported apart.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from measuring import Row, events, points, report, scratch, script_result, store_in, trial_runs

TARGETS = (
    "at most 5 % more than without the writer",
    "everything is in MLflow when the command ends",
)
SMALL = {"repeats": 1, "trials": 4, "epochs": 3}


def measure(*, repeats: int = 9, trials: int = 32, epochs: int = 20) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"off": [], "points": [], "all": []}
    missing = 0
    with scratch() as folder:
        # Exports and computes the features.
        one = one_search(folder, "off", 0, trials=2, epochs=1)
        for number in range(1, repeats + 1):
            for mode, done in runs.items():
                done.append(one_search(folder, mode, number, trials=trials, epochs=epochs))
                if mode != "off":
                    place = folder / f"{mode}-{number}"
                    missing += points_missing(place, trials=trials, epochs=epochs)
    wall = {mode: median(run["search"] for run in done) for mode, done in runs.items()}
    # Of each round: the machine's speed changes from one to the next.
    slower = median(
        on["search"] / off["search"] - 1
        for on, off in zip(runs["points"], runs["off"], strict=True)
    )
    written, everything = runs["points"], runs["all"]
    calls, cpu = (median(run[k] for run in written) for k in ("writing", "cpu"))
    figures, model = (median(run[k] for run in everything) for k in ("figures", "model"))
    rows = [
        Row(
            what=f"{trials} trials x {epochs} epochs, features cached, median of {repeats} rounds: "
            "every point, parameter and tag written, against none",
            target=TARGETS[0],
            result=f"{slower:+.1%}: {wall['points']:.1f} s against {wall['off']:.1f} s; "
            f"{calls:.2f} s in calls, {cpu:.2f} s of a core with MLflow's import",
            met=slower <= 0.05,
        ),
        Row(
            what="with figures, page and the registered model too",
            target="(reported apart)",
            result=f"{wall['all'] / wall['off'] - 1:+.1%}: {wall['all']:.1f} s; figures "
            f"{figures:.2f} s beside the trials, model {model:.2f} s",
        ),
        Row(
            what="after the command",
            target=TARGETS[1],
            result=f"{missing} points missing",
            met=missing == 0,
        ),
    ]
    return report(rows, **runs, warm_up=one)


def one_search(
    folder: Path, mode: str, number: int, *, trials: int, epochs: int
) -> dict[str, float]:
    """Seconds of one search in a folder and a database of its own; the cache is shared."""
    place = folder / f"{mode}-{number}"
    arguments = (mode, str(place / "search"), str(trials), str(epochs))
    return script_result("writer_on_or_off.py", *arguments, folder=place, cache=folder / "cache")


def points_missing(place: Path, *, trials: int, epochs: int) -> int:
    """Epochs that are in the journal or were to be, and not in MLflow."""
    uri, search = store_in(place), place / "search"
    held = sum(len(points(uri, run.info.run_id)) for run in trial_runs(uri, search))
    return max(len(events(search, "epoch")), trials * epochs) - held
