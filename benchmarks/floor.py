"""A search with everything cached, against an empty Ray Tune search and the head trainings."""

from __future__ import annotations

import os
from typing import Any

from measuring import Row, events, photographs, report, run, scratch, script_result, settings, tune

TARGETS = ("at most 1.2 x (empty search + head trainings)",)
SMALL = {"trials": 2, "epochs": 2, "limit_per_class": 2}
_EMPTY = "empty_search.py"


def measure(
    *, trials: int = 32, epochs: int = 20, limit_per_class: int | None = None
) -> dict[str, Any]:
    images = photographs("dogs24")
    with scratch() as folder:
        arguments = [
            *("--data", str(images), "--backbone", "efficientnet_lite0"),
            *("--trials", str(trials), "--algorithm", "random"),
            *settings(training__epochs=epochs),
            *(settings(data__limit_per_class=limit_per_class) if limit_per_class else []),
        ]
        first, cache = folder / "first", folder / "cache"
        run(tune(*arguments, output=first), folder=folder, cache=cache)
        plain = [*arguments, "--no-baselines"]
        seconds = {
            name: run(tune(*flags, output=folder / name), folder=folder, cache=cache)
            for name, flags in (("plain", plain), ("with_baselines", arguments))
        }
        empty = script_result(_EMPTY, str(trials), str(epochs), folder=folder / "empty")
        heads = script_result(
            "plain_trainings.py", str(first), str(os.cpu_count()), folder=folder / "heads"
        )
        baselines = sum(e["seconds"] for e in events(first, "baseline_ended"))
    floor = empty["seconds"] + heads["seconds"]
    rows = [
        Row(
            what=f"{trials} trials x {epochs} epochs, everything cached, {name.replace('_', ' ')}",
            target=f"{TARGETS[0]} = {1.2 * floor:.1f} s",
            result=f"{taken:.1f} s ({taken / floor:.2f} x; empty search {empty['seconds']:.1f}, "
            f"heads {heads['seconds']:.1f})",
            met=taken <= 1.2 * floor,
        )
        for name, taken in seconds.items()
    ]
    return report(rows, seconds=seconds, empty=empty, heads=heads, baseline_seconds=baselines)
