"""A search over the three offline networks, against a search over each of them alone.

All on photographs and with nothing cached, in turn; each is evaluated once on the same test images.
What a pass takes is a network's whole search less the same search with its features cached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Row, events, photographs, report, run, scratch, settings, tune
from scipy.stats import binomtest

from visiontuner.experiment.schema import OFFLINE_BACKBONES

TARGETS = (
    "equal to the best single network on test, or better, within noise (McNemar, 5 %)",
    "at most 1.15 x (the three passes + one search with features cached)",
    "repeated: within 10 %; no point of the front is beaten",
)
SMALL = {"trials": 3, "epochs": 1, "limit_per_class": 3}
DATA = ("dogs24", "flowers5")


def measure(
    *, trials: int = 24, epochs: int = 20, limit_per_class: int | None = None
) -> dict[str, Any]:
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in DATA:
        arguments = [
            *("--data", str(photographs(name)), "--trials", str(trials)),
            *settings(training__epochs=epochs),
            *(settings(data__limit_per_class=limit_per_class) if limit_per_class else []),
        ]
        with scratch() as folder:
            found = _measure(arguments, folder)
        rows += _rows(name, found, trials)
        details[name] = found
    return report(rows, **details)


def _measure(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Seconds of each search and what its model answers to the test images."""
    searches = {network: [*arguments, "--backbone", network] for network in OFFLINE_BACKBONES} | {
        "offline": [*arguments, "--backbones", "offline"]
    }
    seconds, models = {}, {}
    for name, flags in searches.items():
        output, cache = folder / name, folder / f"cache-{name}"
        seconds[name] = run(tune(*flags, output=output), folder=folder, cache=cache)
        if name == OFFLINE_BACKBONES[0]:
            again = folder / "again"
            seconds["cached"] = run(tune(*flags, output=again), folder=folder, cache=cache)
        evaluated = run(_evaluate(output), folder=folder, cache=cache)
        models[name] = _answers(output) | {"evaluation_seconds": evaluated}
    first = models["offline"]["networks"]
    run(_evaluate(folder / "offline"), folder=folder, cache=folder / "cache-offline")
    return {
        "seconds": seconds,
        "models": models,
        "costs": [first, _answers(folder / "offline")["networks"]],
        "stopped": [e["backbone"] for e in events(folder / "offline", "network_stopped")],
        "features": {
            e["backbone"]: e["seconds"] for e in events(folder / "offline", "features_ready")
        },
    }


def _evaluate(search: Path) -> list[str]:
    return ["-m", "visiontuner", "evaluate", str(search)]


def _answers(search: Path) -> dict[str, Any]:
    place = search / "evaluation"
    told = json.loads((place / "report.json").read_text())
    with np.load(place / "predictions.npz") as file:
        right = file["probabilities"].argmax(axis=1) == file["labels"]
        losses = -np.log(file["probabilities"][np.arange(len(right)), file["labels"]] + 1e-12)
    return {
        "trial": told["trial_id"],
        "networks": told["networks"],
        "accuracy": float(right.mean()),
        "nll": float(losses.mean()),
        "right": right.tolist(),
    }


def _rows(name: str, found: dict[str, Any], trials: int) -> list[Row]:
    models, seconds = found["models"], found["seconds"]
    alone = {network: models[network] for network in OFFLINE_BACKBONES}
    best = max(alone, key=lambda network: (alone[network]["accuracy"], -alone[network]["nll"]))
    chosen = models["offline"]
    ours, theirs = np.array(chosen["right"]), np.array(alone[best]["right"])
    lost, won = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    p_value = binomtest(won, max(1, won + lost)).pvalue if won + lost else 1.0
    passes = sum(seconds[network] - seconds["cached"] for network in OFFLINE_BACKBONES)
    parts = passes + seconds["cached"]
    first, second = (
        {row["backbone"]: row["ms_one_thread"] for row in rows} for rows in found["costs"]
    )
    apart = max(abs(first[n] - second[n]) / max(first[n], second[n]) for n in first)
    accuracies = ", ".join(
        f"{n.removeprefix('efficientnet_')} {100 * m['accuracy']:.1f} % / {m['nll']:.3f}"
        for n, m in alone.items()
    )
    return [
        Row(
            what=f"{name}, {trials} trials: test accuracy / NLL of what is kept",
            target=TARGETS[0],
            result=f"{100 * chosen['accuracy']:.1f} % / {chosen['nll']:.3f}; alone {accuracies}; "
            f"p = {p_value:.2f}",
            met=bool(ours.mean() >= theirs.mean() or p_value > 0.05),
        ),
        Row(
            what=f"{name}: the whole command, nothing cached",
            target=f"{TARGETS[1]} = {1.15 * parts:.1f} s",
            result=f"{seconds['offline']:.1f} s ({seconds['offline'] / parts:.2f} x)",
            met=seconds["offline"] <= 1.15 * parts,
        ),
        Row(
            what=f"{name}: milliseconds an image, measured twice",
            target=TARGETS[2],
            result=", ".join(f"{first[n]:.1f} and {second[n]:.1f}" for n in first)
            + f": {100 * apart:.0f} % apart",
            met=apart <= 0.10 and not _any_beaten(found["costs"][1]),
        ),
    ]


def _any_beaten(rows: list[dict[str, Any]]) -> bool:
    """Whether a row of the front is as bad as another in everything, and worse in something."""
    keys = ("ms_one_thread", "megabytes", "dollars_per_million")
    values = [(-row["accuracy"], *(row[key] for key in keys)) for row in rows]
    return any(
        row["on_front"]
        and any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in values
        )
        for row, own in zip(rows, values, strict=True)
    )
