"""One search on two hosts of one core against the same on one such host, start-up left out.

Hosts are network namespaces on this machine (tests/aws/namespaces.py), each pinned to a core, with
their own files; inside runs what runs in a SageMaker job. Needs root, Linux and two idle cores.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from measuring import ROOT, Row, Skipped, events, report, run, scratch, tune

sys.path.insert(0, str(ROOT / "tests" / "aws"))
from namespaces import Hosts, reason_against

TARGETS = ("2 hosts in at most 0.65 x the time of one", "trials on both", "same metrics")
SMALL = {"trials": 4, "epochs": 20, "images": 300}
LONGEST_SECONDS = 1800.0
METRICS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


def measure(*, trials: int = 24, epochs: int = 200, images: int = 4000) -> dict[str, Any]:
    reason = reason_against()
    if reason or (os.cpu_count() or 1) < 2:
        raise Skipped(reason or "needs two cores")
    with scratch() as folder:
        experiment = write_inputs(folder, trials, epochs, images)
        local = search_here(folder, experiment)
        # The features are there already: only trials differ.
        one = search_on(1, folder, experiment)
        two = search_on(2, folder, experiment)
        seconds = {name: seconds_of_trials(where) for name, where in (("1", one), ("2", two))}
        ratio = seconds["2"] / seconds["1"]
        ran_on = sorted({e["host"] for e in events(two, "trial_ended")})
        same = curves(two) == curves(local) == curves(one)
    return report(
        [
            Row(
                what=f"{trials} trials x {epochs} epochs on 2 hosts against 1",
                target="at most 0.65 x",
                result=f"{seconds['2']:.1f} s against {seconds['1']:.1f} s: {ratio:.2f} x",
                met=ratio <= 0.65 and seconds["1"] >= 60,
            ),
            Row(
                what="hosts that ran trials",
                target="2",
                result=str(len(ran_on)),
                met=len(ran_on) == 2,
            ),
            Row(
                what="metrics per trial, 2 hosts, 1 host and local",
                target="the same",
                result="the same" if same else "different",
                met=same,
            ),
        ],
        seconds=seconds,
        hosts=ran_on,
    )


def write_inputs(folder: Path, trials: int, epochs: int, images: int) -> dict[str, Any]:
    """Noise in three colours, so that a search needs no download; returns the experiment."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in {"train": images, "valid": images // 5}.items():
        for number in range(count):
            colour = ("red", "green", "blue")[number % 3]
            mean = np.roll([150, 110, 110], number % 3)
            pixels = np.clip(rng.normal(mean, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            path = folder / "images" / split / colour / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return {
        "name": "two-hosts",
        "data": {"source": str(folder / "images")},
        "model": {"backbone": "resnet18", "weights": "none", "image_size": 32},
        "training": {"epochs": epochs, "batch_size": 32, "learning_rate": 0.003},
        "search": {
            "trials": trials,
            "algorithm": "random",
            "scheduler": "none",
            "space": {"learning_rate": {"low": 0.001, "high": 0.03, "scale": "log"}},
        },
    }


def search_here(folder: Path, experiment: dict[str, Any]) -> Path:
    (folder / "experiment.yaml").write_text(json.dumps(experiment))
    output = folder / "local"
    arguments = tune("--experiment", str(folder / "experiment.yaml"), output=output)
    run(arguments, folder=folder / "home", cache=folder / "cache")
    return output


def search_on(count: int, folder: Path, experiment: dict[str, Any]) -> Path:
    """The same search inside a job of so many hosts; its search folder."""
    place = folder / f"hosts-{count}"
    code = place / "code"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "visiontuner", code / "visiontuner", ignore=ignored)
    (code / "experiment.yaml").write_text(json.dumps(experiment))
    orders = {
        "search": {"output": "/opt/ml/checkpoints/search"},
        "token": secrets.token_hex(32),
        "tracking_uri": None,
    }
    (code / "job.json").write_text(json.dumps(orders))
    names = [f"algo-{number}" for number in range(1, count + 1)]
    with Hosts(count) as network:
        processes = []
        for number, name in enumerate(names):
            ml = place / name
            (ml / "input/config").mkdir(parents=True)
            for part in ("model", "output", "tmp"):
                (ml / part).mkdir()
            resources = {"current_host": name, "hosts": names}
            (ml / "input/config/resourceconfig.json").write_text(json.dumps(resources))
            shutil.copytree(folder / "cache", ml / "checkpoints/cache")
            with (place / f"{name}.log").open("wb") as log:
                command = f"cd {code} && exec {sys.executable} -m visiontuner.aws.container"
                environment = {
                    "HOME": "/opt/ml/tmp",
                    "TRAINING_JOB_NAME": "benchmark",
                    "VISIONTUNER_CACHE": "/opt/ml/checkpoints/cache",
                }
                processes.append(
                    network.start(
                        name,
                        ["bash", "-c", command],
                        ml=ml,
                        environment=environment,
                        log=log,
                        cpu=number,
                    )
                )
        deadline = time.monotonic() + LONGEST_SECONDS
        codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    if any(codes):
        tail = (place / "algo-1.log").read_text(errors="replace")[-1500:]
        raise RuntimeError(f"the hosts ended with {codes}:\n{tail}")
    return place / "algo-1/checkpoints/search"


def seconds_of_trials(folder: Path) -> float:
    """From the first epoch anywhere to the end of the search: imports and start-up are left out."""
    began = min(e["time"] for e in events(folder, "epoch"))
    return float(events(folder, "search_ended")[-1]["time"] - began)


def curves(folder: Path) -> dict[str, Any]:
    from visiontuner.journal import SearchRecord

    trials = SearchRecord.load(folder).trials.values()
    return {t.trial_id: {name: t.curve(name) for name in METRICS} for t in trials}
