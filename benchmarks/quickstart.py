"""The first command a user types: `visiontuner tune` with nothing cached.

Set-up (`make install`) is not counted; the export of the network, the features, the search, MLflow
and the registration are.
"""

from __future__ import annotations

from typing import Any

from measuring import Row, best_value, events, report, run, scratch, settings, tune

TARGETS = ("whole command under 90 s", "best validation accuracy at least 0.95")
SMALL = {"trials": 2, "epochs": 2}


def measure(*, trials: int = 16, epochs: int = 20) -> dict[str, Any]:
    with scratch() as folder:
        search = folder / "search"
        arguments = ["--trials", str(trials), *settings(training__epochs=epochs)]
        seconds = run(tune(*arguments, output=search), folder=folder, cache=folder / "cache")
        accuracy = best_value(search)
        ended = events(search, "trial_ended")
    rows = [
        Row(
            what=f"digits, {trials} trials of up to {epochs} epochs, nothing cached",
            target=TARGETS[0],
            result=f"{seconds:.1f} s",
            met=seconds < 90,
        ),
        Row(
            what="the best trial",
            target=TARGETS[1],
            result=f"{accuracy:.4f}",
            met=accuracy >= 0.95,
        ),
    ]
    return report(rows, seconds=seconds, accuracy=accuracy, trials=len(ended))
