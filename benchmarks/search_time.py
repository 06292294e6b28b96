"""A whole search on photographs, against its own parts in plain loops.

The parts: export, one pass of the network over the images, and the same head trainings over all
cores. What the command takes beyond them is Ray, MLflow, packaging and Python's imports.
"""

from __future__ import annotations

import os
from typing import Any

from measuring import (
    Row,
    best_value,
    events,
    photographs,
    report,
    run,
    scratch,
    script_result,
    settings,
    tune,
)

TARGETS = (
    "at most 1.5 x (export + pass + head trainings) + 25 s",
    "no features computed",
    "at most 1.5 x head trainings + 25 s",
)
SMALL = {"trials": 2, "epochs": 2, "limit_per_class": 2}
NETWORK = "efficientnet_lite0"


def measure(
    *, trials: int = 32, epochs: int = 20, limit_per_class: int | None = None
) -> dict[str, Any]:
    images = photographs("dogs24")
    with scratch() as folder:
        arguments = [
            *("--data", str(images), "--backbone", NETWORK),
            *("--trials", str(trials), "--algorithm", "random"),
            *settings(search__scheduler="none", training__epochs=epochs),
            *(settings(data__limit_per_class=limit_per_class) if limit_per_class else []),
        ]
        first, second, cache = folder / "first", folder / "second", folder / "cache"
        cold = run(tune(*arguments, output=first), folder=folder, cache=cache)
        again = run(tune(*arguments, output=second), folder=folder, cache=cache)
        network = script_result(
            "network_pass.py",
            *(str(images), NETWORK, "train,validation", str(limit_per_class or 0)),
            folder=folder / "pass",
        )
        heads = script_result(
            "plain_trainings.py", str(first), str(os.cpu_count()), folder=folder / "heads"
        )
        ready = [events(search, "features_ready")[-1] for search in (first, second)]
        accuracy = best_value(first)
    parts = network["export_seconds"] + network["pass_seconds"] + heads["seconds"]
    rows = [
        Row(
            what=f"{trials} trials x {epochs} epochs, nothing cached",
            target=f"{TARGETS[0]} = {1.5 * parts + 25:.1f} s",
            result=f"{cold:.1f} s (export {network['export_seconds']:.1f}, pass "
            f"{network['pass_seconds']:.1f}, heads {heads['seconds']:.1f})",
            met=cold <= 1.5 * parts + 25,
        ),
        Row(
            what="second search, features",
            target=TARGETS[1],
            result=f"{ready[1]['computed']} computed",
            met=ready[1]["computed"] == 0,
        ),
        Row(
            what="second search, whole command",
            target=f"{TARGETS[2]} = {1.5 * heads['seconds'] + 25:.1f} s",
            result=f"{again:.1f} s",
            met=again <= 1.5 * heads["seconds"] + 25,
        ),
    ]
    return report(
        rows,
        cold_seconds=cold,
        second_seconds=again,
        network=network,
        plain_trainings=heads,
        features_ready=[{k: e[k] for k in ("engine", "computed", "seconds")} for e in ready],
        best_validation_accuracy=accuracy,
    )
