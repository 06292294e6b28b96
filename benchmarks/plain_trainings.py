"""The head trainings of a search in a plain torch loop, one process a core; nothing else.

    python plain_trainings.py SEARCH_FOLDER PROCESSES

Takes the configurations and the features from the search's journal. Prints JSON: seconds of the
trainings (processes are up and torch is loaded by then) and the best validation accuracy.
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from visiontuner.data.arrays import FeatureSet
from visiontuner.journal import SearchRecord, read_events


def main() -> None:
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    record = SearchRecord.load(folder)
    ready = [e for e in read_events(folder).events if e["event"] == "features_ready"]
    epochs = int(record.started["experiment"]["training"]["epochs"])
    jobs = [
        (Path(ready[-1]["folder"]), trial.configuration, epochs) for trial in record.trials.values()
    ]
    with get_context("spawn").Pool(processes) as pool:
        pool.map(train, [(*jobs[0][:2], 1)] * processes, chunksize=1)  # imports, pages, warm caches
        began = time.monotonic()
        accuracies = pool.map(train, jobs, chunksize=1)
        seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds, "best": max(accuracies), "trials": len(jobs)}))


def train(job: tuple[Path, dict[str, Any], int]) -> float:
    """The best validation accuracy of one configuration."""
    folder, configuration, epochs = job
    torch.set_num_threads(1)
    store = FeatureSet.open(folder)
    (x, y), (x_val, y_val) = (
        (torch.from_numpy(split.features), torch.from_numpy(split.labels))
        for split in map(store.split, ("train", "validation"))
    )
    torch.manual_seed(7)
    head = torch.nn.Linear(store.feature_dim, len(store.class_names))
    batch_size = int(configuration["batch_size"])
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=configuration["learning_rate"], weight_decay=0.01, fused=True
    )
    steps = -(-len(x) // batch_size) * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = 0.0
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        with torch.inference_mode():
            best = max(best, float((head(x_val).argmax(1) == y_val).float().mean()))
    return best


if __name__ == "__main__":
    main()
