"""What MLflow costs a search: the same search with the writer on and off, in turn.

Figures and the model's registration are not writing; they are reported apart.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from measuring import Row, events, points, report, scratch, script_result, store_in, trial_runs

TARGETS = (
    "writer's own time at most 5 % of the search's",
    "on less off, without figures and model, at most 5 %",
    "everything is in MLflow when the command ends",
)
SMALL = {"repeats": 1, "trials": 4, "epochs": 3}


def measure(*, repeats: int = 3, trials: int = 32, epochs: int = 20) -> dict[str, Any]:
    with scratch() as folder:
        one = one_search(folder, "off", 0, trials=2, epochs=1)  # exports and computes the features
        on, off, missing = [], [], 0
        for number in range(1, repeats + 1):
            off.append(one_search(folder, "off", number, trials=trials, epochs=epochs))
            on.append(one_search(folder, "on", number, trials=trials, epochs=epochs))
            missing += points_missing(folder / f"on-{number}", trials=trials, epochs=epochs)
    wall_on, wall_off = (median(run["search"] for run in runs) for runs in (on, off))
    writing, figures, model = (median(r[k] for r in on) for k in ("writing", "figures", "model"))
    share = median(run["writing"] / run["search"] for run in on)
    slower = (wall_on - figures - model - wall_off) / wall_off
    rows = [
        Row(
            what=f"{trials} trials x {epochs} epochs, features cached, median of {repeats}",
            target=TARGETS[0],
            result=f"{share:.1%}: writing {writing:.2f} s of {wall_on:.1f} s; figures "
            f"{figures:.2f} s, model {model:.2f} s",
            met=share <= 0.05,
        ),
        Row(
            what="the same searches, writer on and off",
            target=TARGETS[1],
            result=f"{slower:+.1%}: {wall_on:.1f} s on, {wall_off:.1f} s off",
            met=slower <= 0.05,
        ),
        Row(
            what="after the command",
            target=TARGETS[2],
            result=f"{missing} points missing",
            met=missing == 0,
        ),
    ]
    return report(rows, on=on, off=off, warm_up=one)


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
