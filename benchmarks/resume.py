"""`kill -9` of one training at five random moments, then `train --resume`: the same final metrics.

On features and on images with no and with two processes that prepare them; CPU, fp32.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from measuring import Command, Row, end, events, report, scratch

TARGETS = ("every epoch's metrics equal the uninterrupted training's",)
SMALL = {"epochs": 3, "kills": 1}
LONGEST_SECONDS = 900.0
CLOCK = ("epoch_seconds", "images_per_second")
KINDS = {
    "features": [],
    "images, 0 workers": ["model.train=last_stage", "training.workers=0"],
    "images, 2 workers": ["model.train=last_stage", "training.workers=2"],
}


def measure(*, epochs: int = 12, kills: int = 5) -> dict[str, Any]:
    rows, details = [], {}
    with scratch() as folder:
        cache = folder / "cache"
        for number, (kind, settings) in enumerate(KINDS.items()):
            new = [*command(epochs), *(word for s in settings for word in ("--set", s))]
            whole, killed = folder / f"whole-{number}", folder / f"killed-{number}"
            with Command([*new, "--output", "run"], folder=whole, cache=cache) as training:
                training.wait()
            moments = kill_and_resume(
                [*new, "--output", "run"], killed, cache, epochs, kills, random.Random(number)
            )
            expected, got = metrics(whole / "run"), metrics(killed / "run")
            wrong = [step for step in expected if got.get(step) != expected[step]]
            result = f"{kills} kills in epochs {', '.join(map(str, moments))}: " + (
                f"epochs {wrong} differ" if wrong else f"{len(got)} epochs equal"
            )
            rows.append(
                Row(
                    what=kind,
                    target=TARGETS[0],
                    result=result,
                    met=not wrong and len(got) == epochs,
                )
            )
            details[kind] = {"killed_in_epochs": moments, "metrics": expected}
    return report(rows, **details)


def command(epochs: int) -> list[str]:
    """The built-in images and a small network with random weights: nothing to download."""
    words = ["-m", "visiontuner", "train", "--data", "digits", "--backbone", "resnet18"]
    settings = {
        "data.limit_per_class": 12,
        "model.weights": "none",
        "model.image_size": 64,
        "training.batch_size": 16,
        "training.dropout": 0.2,
        "training.epochs": epochs,
    }
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def kill_and_resume(
    new: list[str],
    folder: Path,
    cache: Path,
    epochs: int,
    kills: int,
    dice: random.Random,
) -> list[int]:
    """The epochs that a kill hit; afterwards the training has ended."""
    resume = ["-m", "visiontuner", "train", "--resume", "run"]
    moments = []
    for number in range(kills):
        with Command(resume if moments else new, folder=folder, cache=cache) as training:
            wanted = 1 + number * (epochs - 1) // kills
            seconds = wait_for_epoch(training, folder / "run", wanted)
            time.sleep(dice.random() * seconds)  # somewhere in the epoch after it
            children = training.children()
            training.process.kill()
            training.process.wait()
            end(children)
        moments.append(last_epoch(folder / "run") + 1)
    with Command(resume, folder=folder, cache=cache) as training:
        training.wait()
    return moments


def wait_for_epoch(training: Command, run: Path, step: int) -> float:
    """Until this process has reported an epoch, `step` or a later one; how long that epoch took."""
    attempt = max((e["attempt"] for e in of_kind(run, "trial_started")), default=0) + 1
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline and training.running():
        mine = [e for e in of_kind(run, "epoch") if e["attempt"] == attempt and e["step"] >= step]
        if mine:
            return float(mine[-1]["metrics"]["epoch_seconds"])
        time.sleep(0.005)
    raise RuntimeError(f"epoch {step} was never reported; see {training.log}")


def last_epoch(run: Path) -> int:
    return max(event["step"] for event in of_kind(run, "epoch"))


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """By epoch, as the latest attempt reported it, without how long it took."""
    return {
        event["step"]: {k: v for k, v in event["metrics"].items() if k not in CLOCK}
        for event in of_kind(run, "epoch")
    }


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return events(run, kind) if (run / "journal.jsonl").exists() else []
