"""Trials on Ray over synthetic features; its workers' memory is watched from outside.

python trials_on_features.py FOLDER ROWS TRIALS EPOCHS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from visiontuner.data.arrays import FeatureSet, array_path, samples_path, write_meta
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import write_json
from visiontuner.journal import JournalWriter, SearchRecord
from visiontuner.search.live import Recorder
from visiontuner.search.plan import Stores, stages_of
from visiontuner.search.ray_cluster import RayForSearch
from visiontuner.search.run import run_trials

CLASSES = tuple(f"class{number}" for number in range(10))
FEATURE_DIM = 1280


def main() -> None:
    folder, (rows, trials, epochs) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    make_store(folder / "features", {"train": rows * 9 // 10, "validation": rows // 10})
    raw = {"name": "memory", "data": {"source": "digits"}, "training": {"epochs": epochs}}
    search = {"trials": trials, "algorithm": "random", "scheduler": "none"}
    experiment = Experiment.parse({**raw, "search": search}, [], where="the benchmark")
    recorder = Recorder(JournalWriter(folder, "memory"), SearchRecord())
    recorder.append("search_started", experiment=experiment.model_dump(mode="json"))
    with RayForSearch("local") as ray:
        ray.start()
        stores = Stores(features=folder / "features", images=None)
        run_trials(folder, stages_of(experiment)[0], recorder, stores=stores, cache=folder)


def make_store(folder: Path, splits: dict[str, int]) -> None:
    """Random features with labels in turn, written piece by piece."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, rows in splits.items():
        path = array_path(folder, split, "features")
        features = open_memmap(path, "w+", np.float32, (rows, FEATURE_DIM))
        for start in range(0, rows, 10_000):
            piece = features[start : start + 10_000]
            piece[:] = generator.standard_normal(piece.shape, dtype=np.float32)
        features.flush()
        np.save(array_path(folder, split, "labels"), np.arange(rows) % len(CLASSES))
        paths = [f"{number}.png" for number in range(rows)]
        write_json(samples_path(folder, split), {"paths": paths, "digests": paths})
    write_meta(
        FeatureSet(
            folder=folder,
            class_names=CLASSES,
            feature_dim=FEATURE_DIM,
            splits=tuple(splits),
            findings=(),
            engine="synthetic",
            seconds=0.0,
        )
    )


if __name__ == "__main__":
    main()
