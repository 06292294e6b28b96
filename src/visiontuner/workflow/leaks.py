"""Images that show the same in two splits: named, or left out where less depends on them.

Test images stay as they are, so that figures remain comparable; of a pair in training and
validation the training image goes. Pairs within one split are no leaks.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from visiontuner.data.arrays import FeatureSet
from visiontuner.data.dataset import SPLITS, ImageDataset, ListedFinding, Sample, listed
from visiontuner.data.duplicates import TELLS_NOTHING, find_duplicates
from visiontuner.io.files import write_cached_json
from visiontuner.journal import Finding

_VERSION = 1
# Of a pair the image in the split that stands first goes.
_PROTECTION = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Two images that show the same.

    Args:
        path, split: of the image that `drop` leaves out.
        other, other_split: of the one that stays.
        score: of `data.duplicates.same_scene`; 1 for the same file.
    """

    path: str
    split: str
    other: str
    other_split: str
    score: float

    def __str__(self) -> str:
        return f"{self.path} ~ {self.other}"


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """All pairs of a data set.

    Args:
        across_splits: pairs in two splits, the most similar first.
        across_groups: pairs in one split and two groups.
        threshold: the score of a pair; from .95 on only the same files are pairs.
    """

    across_splits: tuple[Leak, ...]
    across_groups: tuple[Leak, ...]
    threshold: float

    @property
    def dropped(self) -> frozenset[str]:
        """Paths of the images that `data.on_leak: drop` leaves out."""
        return frozenset(leak.path for leak in self.across_splits)

    def in_split(self, split: str) -> frozenset[str]:
        """Paths of a split's images that another split shows as well."""
        return frozenset(
            path
            for leak in self.across_splits
            for path, of in ((leak.path, leak.split), (leak.other, leak.other_split))
            if of == split
        )


def find_leaks(
    dataset: ImageDataset,
    stores: Sequence[FeatureSet],
    *,
    cache: Path,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Leaks:
    """Compare the images of a data set by content; what an earlier call found is not looked for.

    Args:
        stores: the features of all its splits.
        progress: called with (pairs looked at, pairs to look at).
    """
    names = json.dumps([_VERSION, dataset.digest, *(store.folder.name for store in stores)])
    kept = cache / "leaks" / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.json"
    known = _read(kept)
    if known is None:
        known = _compare(dataset, stores, progress)
        write_cached_json(kept, asdict(known))
    return known


def _read(path: Path) -> Leaks | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Leaks(
            across_splits=tuple(Leak(**leak) for leak in raw["across_splits"]),
            across_groups=tuple(Leak(**leak) for leak in raw["across_groups"]),
            threshold=float(raw["threshold"]),
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _compare(
    dataset: ImageDataset, stores: Sequence[FeatureSet], progress: Callable[[int, int], None]
) -> Leaks:
    samples = {(split, s.path): s for split in SPLITS for s in dataset.splits[split]}
    parts = [(split, store.split(split)) for store in stores for split in store.splits]
    placed = [(split, samples[split, path]) for split, part in parts for path in part.paths]
    numbers: dict[tuple[str, str | None], int] = {}
    places = [numbers.setdefault((split, s.group), len(numbers)) for split, s in placed]
    found = find_duplicates(
        np.concatenate([part.features for _, part in parts]),
        np.array(places, dtype=np.int64),
        [dataset.root / sample.path for _, sample in placed],
        progress=progress,
    )
    scored = zip(found.pairs.rows.tolist(), found.pairs.values.tolist(), strict=True)
    leaks = list(_same_files(placed))
    leaks += [_leak(placed[a], placed[b], score) for (a, b), score in scored]
    unique = {(leak.split, leak.path, leak.other_split, leak.other): leak for leak in leaks[::-1]}
    leaks = sorted(unique.values(), key=lambda leak: (-leak.score, leak.path, leak.other))
    groups = {path: sample.group for (_, path), sample in samples.items()}
    return Leaks(
        across_splits=tuple(leak for leak in leaks if leak.split != leak.other_split),
        across_groups=tuple(
            leak
            for leak in leaks
            if leak.split == leak.other_split
            and None not in (groups[leak.path], groups[leak.other])
        ),
        threshold=found.threshold,
    )


Placed = tuple[str, Sample]


def _same_files(placed: Sequence[Placed]) -> Iterator[Leak]:
    """One pair for each two splits that hold the same content, and for each further copy."""
    holders: dict[str, list[Placed]] = defaultdict(list)
    for split, sample in placed:
        holders[sample.digest].append((split, sample))
    for copies in holders.values():
        for first, second in combinations(sorted(copies, key=_rank), 2):
            if first[0] != second[0]:
                yield _leak(first, second, 1.0)


def _rank(one: Placed) -> tuple[int, str]:
    return _PROTECTION.index(one[0]), one[1].path


def _leak(first: Placed, second: Placed, score: float) -> Leak:
    (split, sample), (other_split, other) = sorted((first, second), key=_rank)
    return Leak(
        path=sample.path,
        split=split,
        other=other.path,
        other_split=other_split,
        score=round(score, 4),
    )


def without_leaks(dataset: ImageDataset, leaks: Leaks) -> ImageDataset:
    """The data set without what `data.on_leak: drop` leaves out, with a digest of its own.

    Raises:
        DataError: no training or no validation image is left.
    """
    if not leaks.dropped:
        return dataset
    return dataset.without(leaks.dropped, "which another split shows as well")


def leak_findings(leaks: Leaks, *, dropped: bool) -> list[Finding]:
    """Findings about pairs in two splits, and in two groups."""
    shown = list(map(str, leaks.across_splits))
    if dropped:
        number = len(leaks.dropped)
        across = listed(
            "leaks_left_out",
            "info",
            shown,
            f"two splits show the same; the {number:,} images before the ~ are left out",
            "Nothing to do. data.on_leak: warn keeps them.",
        )
    else:
        across = listed(
            "leaks",
            "warning",
            shown,
            "two splits show the same, which makes accuracy read too high",
            "Look at the pairs. data.on_leak: drop leaves out the image before the ~.",
        )
    groups = listed(
        "leaks_between_groups",
        "warning",
        list(map(str, leaks.across_groups)),
        "two groups show the same, so that they may lie in two splits",
        "Look at the pairs; if they show the same, give both the same group.",
    )
    return [finding for finding in (across, groups, _untold(leaks)) if finding is not None]


def _untold(leaks: Leaks) -> Finding | None:
    if leaks.threshold < TELLS_NOTHING:
        return None
    return Finding(
        rule="leaks_not_told",
        severity="info",
        evidence="different images of this data set are as alike as copies (drawn shapes, say): "
        "only equal files and near-duplicates by hash are named",
        advice="Nothing to do, but look at the splits yourself.",
    )


def without_known_pairs(findings: Sequence[Finding], leaks: Leaks) -> list[Finding]:
    """Findings by hash without the pairs that were found by content as well."""
    known = {frozenset(str(leak).split(" ~ ")) for leak in leaks.across_splits}
    known |= {frozenset(str(leak).split(" ~ ")) for leak in leaks.across_groups}
    kept: list[Finding] = []
    for finding in findings:
        if not (isinstance(finding, ListedFinding) and finding.rule.startswith("near_duplicates")):
            kept.append(finding)
            continue
        new = [item for item in finding.items if frozenset(item.split(" ~ ")) not in known]
        if new:
            _, _, what = finding.evidence.partition("): ")
            left = listed(finding.rule, finding.severity, new, what, finding.advice)
            kept += [left] if left is not None else []
    return kept
