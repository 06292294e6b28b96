"""Fine-tuning after the head stage against the head alone: test accuracy on photographs, and time.

The same trials over heads in both searches; the second one goes on with the best heads as networks
(`search.stages`). Both are evaluated as any search is: chosen on validation, tested once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from measuring import Row, photographs, report, run, scratch, settings, tune

TARGETS = ("at least 1 point over the head alone, mean of 3 seeds",)
SMALL = {
    "seeds": (1,),
    "trials": 2,
    "limit_per_class": 4,
    "stages": {"best": 1, "epochs": 1, "learning_rate": 0.001},
}
EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "flowers_fine_tune.yaml"


def measure(
    *,
    seeds: tuple[int, ...] = (1, 2, 3),
    trials: int | None = None,
    limit_per_class: int | None = None,
    stages: dict[str, Any] | None = None,
) -> dict[str, Any]:
    images = photographs("flowers5")
    common = ["--experiment", str(EXPERIMENT), "--data", str(images)]
    if trials is not None:
        common += ["--trials", str(trials)]
    if limit_per_class is not None:
        common += settings(data__limit_per_class=limit_per_class)
    in_stages = settings(search__stages=_yaml(stages)) if stages else []
    # On features, as the first stage has them.
    alone = settings(
        search__stages="null",
        model__train="head",
        training__augmentation="null",
        training__freeze_batch_norm="false",
    )
    measured: list[dict[str, Any]] = []
    with scratch() as folder:
        for seed in seeds:
            arguments = [*common, *settings(seed=seed)]
            row: dict[str, Any] = {"seed": seed}
            for name, more in {"head": alone, "network": in_stages}.items():
                row[name] = _search([*arguments, *more], folder / f"{name}-{seed}", folder)
            measured.append(row)
    return report(_rows(measured), seeds=[_plain(row) for row in measured])


def _search(arguments: list[str], output: Path, folder: Path) -> dict[str, Any]:
    """One search and its evaluation; features and decoded images are there after the first."""
    places = {"folder": folder, "cache": folder / "cache"}
    seconds = run(tune(*arguments, output=output), **places)
    run(["-m", "visiontuner", "evaluate", str(output)], **places)
    with np.load(output / "evaluation" / "predictions.npz", allow_pickle=False) as held:
        order = np.argsort(held["paths"])
        correct = (held["probabilities"].argmax(axis=1) == held["labels"])[order]
    return {"seconds": seconds, "correct": correct, "best": _best(output)}


def _best(folder: Path) -> dict[str, Any]:
    from visiontuner.journal import SearchRecord

    record = SearchRecord.load(folder)
    best = record.best
    assert best is not None
    return {
        "trial": best.trial_id,
        "stage": best.stage,
        "validation": best.best_value,
        "configuration": best.configuration,
    }


def _rows(measured: list[dict[str, Any]]) -> list[Row]:
    from visiontuner.evaluation.intervals import paired_test

    network = [float(row["network"]["correct"].mean()) for row in measured]
    head = [float(row["head"]["correct"].mean()) for row in measured]
    gain = 100 * (np.mean(network) - np.mean(head))
    pooled = paired_test(
        np.concatenate([row["network"]["correct"] for row in measured]),
        np.concatenate([row["head"]["correct"] for row in measured]),
    )
    seconds = {n: np.mean([row[n]["seconds"] for row in measured]) for n in ("head", "network")}
    each = ", ".join(f"{100 * (n - h):+.1f}" for n, h in zip(network, head, strict=True))
    return [
        Row(
            what="test accuracy of fine-tuning after the head stage, flowers5, efficientnet_lite0",
            target=TARGETS[0],
            result=f"{np.mean(network):.4f} against {np.mean(head):.4f}: {gain:+.2f} points "
            f"(by seed {each})",
            met=bool(gain >= 1),
        ),
        Row(
            what="McNemar's test on the pooled predictions",
            target="stated",
            result=f"p = {pooled.p_value:.3g}: only the network is right {pooled.only_a} times, "
            f"only the head {pooled.only_b} times",
        ),
        Row(
            what="seconds of a search, start to end",
            target="stated",
            result=f"{seconds['network']:.0f} s against {seconds['head']:.0f} s",
        ),
    ]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON holds."""
    return {
        "seed": row["seed"],
        **{
            name: {**row[name], "correct": int(row[name]["correct"].sum())}
            for name in ("head", "network")
        },
    }


def _yaml(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"
