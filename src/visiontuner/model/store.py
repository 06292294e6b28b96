"""Feature vectors on disk: what trials read, memory-mapped and without torch.

features/KEY/
  meta.json                   written last: a store that has it is complete; with checksums
  train.features.npy          float32 (N, D), the pictures that could be read, in order
  train.labels.npy            int64 (N,)
  train.samples.json          their paths and content digests
  shards/                     while it is being computed
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.arrays import META, commit_folder
from visiontuner.errors import DataError
from visiontuner.journal import Finding

SCHEMA_VERSION = 1

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """One split of a data set as feature vectors.

    Args:
        features: float32, shape (N, D); memory-mapped, copy-on-write: pages are shared between
            processes until one writes to its own.
        labels: int64, shape (N,), indices into the class names.
        paths: N posix paths, relative to the data set's root.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    paths: list[str]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """A complete feature store.

    Args:
        folder: open it again by this path, in any process.
        findings: one for each picture that could not be read.
        engine: what ran the network.
        seconds: how long the network ran, all sessions together.
        computed: pictures computed by the call that returned this; 0 if all were there.
    """

    folder: Path
    class_names: tuple[str, ...]
    feature_dim: int
    splits: tuple[str, ...]
    findings: tuple[Finding, ...]
    engine: str
    seconds: float
    computed: int = 0

    @classmethod
    def open(cls, folder: Path) -> FeatureSet:
        """Read a store's description; its arrays are mapped by `split`.

        Raises:
            DataError: there is no complete store of a version that this code reads.
        """
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["schema_version"] != SCHEMA_VERSION:
                raise ValueError
            return cls(
                folder=folder,
                class_names=tuple(meta["class_names"]),
                feature_dim=int(meta["feature_dim"]),
                splits=tuple(meta["splits"]),
                findings=tuple(Finding(**finding) for finding in meta["findings"]),
                engine=meta["engine"],
                seconds=float(meta["seconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{folder} holds no complete features. Start the search again to compute them."
            ) from None

    def split(self, name: str) -> SplitFeatures:
        """Map one split.

        Raises:
            DataError: the store has no such split, or its files are damaged.
        """
        if name not in self.splits:
            raise DataError(
                f"The features in {self.folder} have no split {name!r}, only "
                f"{', '.join(self.splits)}."
            )
        try:
            features = np.load(array_path(self.folder, name, "features"), mmap_mode="c")
            labels = np.load(array_path(self.folder, name, "labels"), allow_pickle=False)
            samples = json.loads(samples_path(self.folder, name).read_text(encoding="utf-8"))
            if features.shape != (len(labels), self.feature_dim):
                raise ValueError
            return SplitFeatures(features=features, labels=labels, paths=samples["paths"])
        except (OSError, ValueError, KeyError, EOFError):
            raise DataError(
                f"The features in {self.folder} are damaged. Delete that folder and start again."
            ) from None


def array_path(folder: Path, split: str, kind: str) -> Path:
    return folder / f"{split}.{kind}.npy"


def samples_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.samples.json"


def store_files(split: str) -> tuple[str, ...]:
    """The names of a split's files in its store."""
    return tuple(
        path.name
        for path in (
            array_path(Path(), split, "features"),
            array_path(Path(), split, "labels"),
            samples_path(Path(), split),
        )
    )


def write_meta(features: FeatureSet) -> None:
    """Declare a store complete; raises as `commit_folder`."""
    meta = {
        "schema_version": SCHEMA_VERSION,
        "class_names": features.class_names,
        "feature_dim": features.feature_dim,
        "splits": features.splits,
        "findings": [asdict(finding) for finding in features.findings],
        "engine": features.engine,
        "seconds": features.seconds,
    }
    files = [name for split in features.splits for name in store_files(split)]
    commit_folder(features.folder, meta, files)
