"""`visiontuner compare` on 500 runs in a SQLite store, on 500 in a journal, and curves of 20."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Row, report, run, scratch, store_in

TARGETS = (
    "500 runs in under 5 s against a SQLite store",
    "reported: the same from the journal",
    "reported: learning curves of 20 of them",
)
SMALL = {"runs": 20, "repeats": 1}
NAME = "many"


def measure(*, runs: int = 500, epochs: int = 10, repeats: int = 3) -> dict[str, Any]:
    """The whole command as a user waits for it: Python's start and MLflow's import included."""
    with scratch() as folder:
        search = folder / "searches" / NAME
        write_search(search, runs=runs, epochs=epochs)
        write_to_mlflow(search, store_in(folder))
        store = [command(folder, NAME) for _ in range(repeats)]
        journal = [command(folder, str(search)) for _ in range(repeats)]
        figure = str(folder / "curves.png")
        curves = [command(folder, NAME, "--top", "20", "--curves", figure) for _ in range(repeats)]
        shown = (folder / "output.log").read_text().count("completed")
    if shown < runs:
        raise RuntimeError(f"{shown} of {runs} runs were shown")
    what = f"{runs} runs of {epochs} epochs, whole command, median of {repeats}"
    rows = [
        Row(
            what=what,
            target=TARGETS[0],
            result=f"{median(store):.1f} s ({min(store):.1f} to {max(store):.1f})",
            met=median(store) < 5,
        ),
        Row(what="the search folder", target=TARGETS[1], result=f"{median(journal):.1f} s"),
        Row(what="SQLite and --curves", target=TARGETS[2], result=f"{median(curves):.1f} s"),
    ]
    return report(rows, store=store, journal=journal, curves=curves)


def command(folder: Path, *arguments: str) -> float:
    """Seconds of one `visiontuner compare`."""
    return run(["-m", "visiontuner", "compare", *arguments], folder=folder, cache=folder / "cache")


def write_search(folder: Path, *, runs: int, epochs: int) -> None:
    """A journal like that of a search, with numbers that repeat."""
    from visiontuner.experiment.schema import Experiment
    from visiontuner.journal import JournalWriter

    now = [1_700_000_000.0]
    journal = JournalWriter(folder, "5" * 32, clock=lambda: now[0])
    experiment = Experiment.parse({"name": NAME}).model_dump(mode="json")
    data = {"source": "made up", "digest": "ab" * 32, "class_names": ["a", "b"]}
    journal.append("search_started", name=NAME, experiment=experiment, data=data)
    for number in range(runs):
        trial = {"trial_id": f"t{number:04d}", "attempt": 1}
        rate, size = 1e-4 * 1.01**number, 32 * 2 ** (number % 4)
        configuration = {"learning_rate": rate, "batch_size": size}
        journal.append("trial_started", configuration=configuration, **trial)
        top = 0.9 - 0.05 * abs(math.log10(rate / 0.003))
        for step in range(1, epochs + 1):
            now[0] += 0.1
            journal.append("epoch", step=step, metrics=metrics(top, step), **trial)
        best = metrics(top, epochs)["validation_accuracy"]
        journal.append(
            "trial_ended", state="completed", best_epoch=epochs, best_value=best, **trial
        )
    journal.append("search_ended", state="completed", best_trial="t0000")
    journal.close()


def metrics(top: float, step: int) -> dict[str, float]:
    """What a trial reports after an epoch."""
    accuracy = top * (1 - math.exp(-step / 2))
    return {
        "train_loss": 1 / step,
        "train_accuracy": accuracy,
        "validation_loss": 1.2 / step,
        "validation_accuracy": accuracy,
        "validation_macro_f1": accuracy,
        "learning_rate": 0.001,
        "gradient_norm": 1.0,
        "epoch_seconds": 0.1,
        "images_per_second": 1000.0,
    }


def write_to_mlflow(folder: Path, tracking_uri: str) -> None:
    from visiontuner.tracking.writer import MlflowWriter

    with MlflowWriter(folder, tracking_uri=tracking_uri, draw=False) as writer:
        writer.catch_up()
