"""Synthetic journals: a clock that only moves when told, numbers that repeat."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter

START = 1_700_000_000.0


class Search:
    """Writes a search's journal event by event."""

    def __init__(self, folder: Path, *, search_id: str = "search-1", **experiment: Any) -> None:
        self.folder = folder
        self.time = START
        self.journal = JournalWriter(folder, search_id, clock=lambda: self.time)
        self.experiment = Experiment.parse({"name": "images", **experiment})

    def append(self, event: str, **fields: Any) -> None:
        self.time += 1
        self.journal.append(event, **fields)

    def begin(self) -> None:
        self.append(
            "search_started",
            name="images-20261122",
            experiment=self.experiment.model_dump(mode="json"),
            data={
                "source": "photos",
                "root": "photos",
                "digest": "ab" * 32,
                "class_names": ["cat", "dog"],
                "counts": {"train": 8, "validation": 4},
            },
            code={"commit": "c0ffee", "dirty": False, "version": "0.1.0"},
            machine={
                "host": "here",
                "platform": "Linux",
                "python": "3.11",
                "packages": {"torch": "2"},
            },
        )
        self.append(
            "features_ready",
            backbone="efficientnet_lite0",
            weights_digest="w1",
            weights_licence="Apache-2.0",
            engine="ONNX",
        )

    def start(self, number: int, *, attempt: int = 1) -> None:
        rates, sizes = [1e-4, 1e-3, 1e-2, 3e-2], [32, 64, 128]
        self.append(
            "trial_started",
            trial_id=f"t{number:04d}",
            attempt=attempt,
            configuration={
                "learning_rate": rates[number % 4] * (1 + number / 1000),
                "batch_size": sizes[number % 3],
            },
        )

    def epoch(
        self,
        number: int,
        step: int,
        *,
        attempt: int = 1,
        step_losses: list[tuple[int, float]] | None = None,
        **metrics: float,
    ) -> None:
        accuracy = (0.5 + 0.03 * (number % 7)) * (1 - math.exp(-step))
        self.append(
            "epoch",
            trial_id=f"t{number:04d}",
            attempt=attempt,
            step=step,
            metrics={
                "train_loss": 1 / step,
                "train_accuracy": accuracy + 0.05,
                "validation_loss": 1.2 / step,
                "validation_accuracy": accuracy,
                "validation_macro_f1": accuracy - 0.01,
                "learning_rate": 0.001,
                "gradient_norm": 2.0,
                "epoch_seconds": 0.5,
                "images_per_second": 900.0,
                **metrics,
            },
            **({"step_losses": step_losses} if step_losses else {}),
        )

    def end(self, number: int, state: str = "completed", **fields: Any) -> None:
        self.append(
            "trial_ended",
            trial_id=f"t{number:04d}",
            attempt=fields.pop("attempt", 1),
            state=state,
            **{"best_epoch": 2, "best_value": 0.5 + 0.03 * (number % 7), **fields},
        )

    def trial(self, number: int, epochs: int = 3, state: str = "completed", **fields: Any) -> None:
        self.start(number)
        for step in range(1, epochs + 1):
            self.epoch(number, step)
        self.end(number, state, **fields)

    def finish(self, state: str = "completed") -> None:
        self.append("search_ended", state=state, best_trial="t0001")


@pytest.fixture
def new_search(tmp_path: Path) -> Callable[..., Search]:
    """Makes a search folder with an empty journal."""

    def make(name: str = "search", **experiment: Any) -> Search:
        return Search(tmp_path / name, **experiment)

    return make
