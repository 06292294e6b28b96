"""The pieces in which features are computed, and how they become one store."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.format import write_array_header_2_0
from numpy.typing import NDArray

from visiontuner.data.dataset import Sample, few_levels, none_readable, unreadable_picture
from visiontuner.data.files import write_atomically, write_json
from visiontuner.journal import Finding
from visiontuner.model.store import (
    FeatureSet,
    array_path,
    samples_path,
    write_meta,
)

SHARD_SIZE = 256
FOLDER = "shards"


@dataclass(frozen=True)
class Shard:
    """Up to SHARD_SIZE neighbouring pictures of one split."""

    split: str
    number: int
    samples: tuple[Sample, ...]
    store: Path

    @property
    def path(self) -> Path:
        return self.store / FOLDER / f"{self.split}-{self.number:06d}.npy"

    @property
    def bad_path(self) -> Path:
        return self.path.with_suffix(".bad.json")

    def batches(self, batch_size: int) -> list[tuple[int, int]]:
        """(start, end) of each batch in the shard."""
        length = len(self.samples)
        return list(pairwise([*range(0, length, batch_size), length]))

    def bad(self) -> dict[int, str]:
        """Position in the shard -> why that picture could not be read."""
        return {int(position): reason for position, reason in self._facts()["bad"].items()}

    def few_levels(self) -> list[str]:
        """Paths of its pictures that are nearly black, white or of one shade."""
        return [self.samples[position].path for position in self._facts()["few_levels"]]

    def rows(self) -> NDArray[np.float32]:
        """Features of the readable pictures, float32 (N, D)."""
        rows: NDArray[np.float32] = np.load(self.path, allow_pickle=False)
        return rows

    def is_done(self) -> bool:
        """Whether the shard is on disk, as it was written."""
        try:
            rows = self.rows()
            if _checksum_of_rows(rows) != self._facts()["checksum"]:
                return False
            return len(rows) + len(self.bad()) == len(self.samples)
        except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError):
            return False

    def write(
        self, rows: NDArray[np.float32], bad: Mapping[int, str], few_levels: Sequence[int] = ()
    ) -> None:
        """Keep the shard with the checksum of its rows: what a power cut spoils is seen."""
        facts = {"bad": bad, "few_levels": list(few_levels), "checksum": _checksum_of_rows(rows)}
        write_json(self.bad_path, facts)
        write_atomically(self.path, lambda file: np.save(file, rows, allow_pickle=False))

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.bad_path.read_text(encoding="utf-8"))
        return facts


def _checksum_of_rows(rows: NDArray[np.float32]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).data)


def cut_into_shards(split: str, samples: Sequence[Sample], store: Path) -> Iterator[Shard]:
    for number, start in enumerate(range(0, len(samples), SHARD_SIZE)):
        yield Shard(split, number, tuple(samples[start : start + SHARD_SIZE]), store)


def assemble(shards: Sequence[Shard], store: FeatureSet) -> None:
    """One array a split, then the mark that all is there; then the shards go.

    Args:
        shards: all of them, computed.
        store: the description to write; its findings are filled in.

    Raises:
        DataError: a split has no readable picture.
    """
    findings: list[Finding] = []
    for split in store.splits:
        own = [shard for shard in shards if shard.split == split]
        bad = {shard.path: shard.bad() for shard in own}
        findings += [
            unreadable_picture(shard.samples[position], reason)
            for shard in own
            for position, reason in sorted(bad[shard.path].items())
        ]
        good = [
            sample
            for shard in own
            for position, sample in enumerate(shard.samples)
            if position not in bad[shard.path]
        ]
        if not good:
            raise none_readable(split, findings)
        _write_split(own, good, store, split)
    found = few_levels([path for shard in shards for path in shard.few_levels()])
    findings += [Finding(**found.to_dict())] if found else []
    write_meta(replace(store, findings=tuple(findings)))
    shutil.rmtree(store.folder / FOLDER, ignore_errors=True)


def _write_split(
    shards: Sequence[Shard], samples: Sequence[Sample], store: FeatureSet, split: str
) -> None:
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    listing = {"paths": [s.path for s in samples], "digests": [s.digest for s in samples]}
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(samples), store.feature_dim)}

    def write_features(file: BinaryIO) -> None:
        write_array_header_2_0(file, header)
        for shard in shards:  # one at a time: a split may be larger than memory
            file.write(np.ascontiguousarray(shard.rows(), dtype="<f4").data)

    write_atomically(array_path(store.folder, split, "features"), write_features)
    write_atomically(
        array_path(store.folder, split, "labels"),
        lambda file: np.save(file, labels, allow_pickle=False),
    )
    write_json(samples_path(store.folder, split), listing)
