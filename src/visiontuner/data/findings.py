"""What is wrong with a data set's pictures, before a training tells it in worse ways.

Every picture is decoded once, by `inspect_pictures`; the rules are functions of what that showed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from visiontuner.data.dataset import (
    SPLITS,
    ImageDataset,
    Sample,
    few_levels,
    find_emptied_classes,
)
from visiontuner.data.duplicates import near_pairs
from visiontuner.data.images import picture_extensions
from visiontuner.data.inspection import (
    PictureFacts,
    facts_file,
    inspect_pictures,
    read_facts,
    read_header,
)
from visiontuner.data.listing import listed
from visiontuner.errors import BadImageError
from visiontuner.journal import Finding

Facts = Mapping[str, PictureFacts]

IMBALANCE_RATIO = 10
TINY_PIXELS = 32  # of a network's usual 224: seven times enlarged
NEAR_BITS = 16  # of 256; what distances mean is said in inspection.py
# The same content under another name in Pillow; a person would not call the ending wrong.
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}


@dataclass(frozen=True)
class SizeRange:
    """Smallest, middle and largest of a length in pixels."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """The numbers that describe a data set.

    Args:
        counts: pictures of each class, in the order of `class_names`, by split name.
        totals: pictures by split name.
        width, height: over all readable pictures as they are stored; None if there is none.
        imbalance: pictures of train's largest class for one of its smallest (empty ones left out).
    """

    class_names: tuple[str, ...]
    counts: dict[str, list[int]]
    totals: dict[str, int]
    width: SizeRange | None
    height: SizeRange | None
    imbalance: float


def summarise(dataset: ImageDataset, *, cache: Path | None = None) -> DatasetSummary:
    """Count and measure a data set.

    Sizes come from what `inspect_dataset` remembered under `cache`, else from the files' headers.
    """
    facts = read_facts(facts_file(dataset, cache)) if cache is not None else {}
    sizes = np.array(list(_sizes(dataset, facts)), dtype=np.int64).reshape(-1, 2)
    return DatasetSummary(
        class_names=dataset.class_names,
        counts={split: dataset.counts(split) for split in SPLITS},
        totals={split: len(dataset.splits[split]) for split in SPLITS},
        width=_size_range(sizes[:, 0]),
        height=_size_range(sizes[:, 1]),
        imbalance=_imbalance(dataset),
    )


def inspect_dataset(
    dataset: ImageDataset,
    *,
    workers: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Look at every picture; the findings of `load_dataset` are not repeated.

    Args:
        workers: processes that decode; one for each core by default.
        cache: where results are remembered by content, so that a second look decodes nothing.
        progress: called with (pictures done, pictures to decode).

    Raises:
        VisiontunerError: a worker process died.
    """
    facts = inspect_pictures(dataset, workers=workers, cache=cache, progress=progress)
    findings = [
        find_unreadable(dataset, facts),
        *find_emptied_classes(dataset, _readable(dataset, facts)),
        *find_without_decoding(dataset),
        few_levels([s.path for _, s in _samples(dataset) if facts[s.digest].few_levels]),
        find_tiny(dataset, facts),
        find_wrong_extensions(dataset, facts),
        find_near_across_splits(dataset, facts),
    ]
    return [finding for finding in findings if finding is not None]


def find_without_decoding(dataset: ImageDataset) -> list[Finding]:
    """What counts and content digests tell: imbalance, and the same file in two places."""
    found = find_imbalance(dataset), find_two_classes(dataset), find_same_across_splits(dataset)
    return [finding for finding in found if finding is not None]


def find_unreadable(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Pictures that cannot be decoded."""
    bad = [
        f"{sample.path}: {facts[sample.digest].error.rstrip('.')}"
        for _, sample in _samples(dataset)
        if facts[sample.digest].error
    ]
    return listed(
        "unreadable_pictures",
        "warning",
        bad,
        "cannot be decoded and will be skipped",
        "Replace or remove them; data.on_bad_image: fail stops at the first one instead.",
    )


def _readable(dataset: ImageDataset, facts: Facts) -> dict[str, set[int]]:
    """By split, the labels of pictures that can be decoded."""
    return {
        split: {sample.label for sample in samples if not facts[sample.digest].error}
        for split, samples in dataset.splits.items()
    }


def find_imbalance(dataset: ImageDataset) -> Finding | None:
    """A class with more than ten times the training pictures of another."""
    ratio = _imbalance(dataset)
    if ratio <= IMBALANCE_RATIO:
        return None
    counted = zip(dataset.counts("train"), dataset.class_names, strict=True)
    ranked = sorted(row for row in counted if row[0])
    few, many = ranked[0], ranked[-1]
    return Finding(
        rule="class_imbalance",
        severity="warning",
        evidence=f"{many[1]} has {many[0]} training pictures, {few[1]} has {few[0]}",
        advice="Set training.class_weights: balanced and judge by validation_macro_f1.",
    )


def find_tiny(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Pictures whose shorter side is below 32 pixels."""
    tiny = [
        sample.path
        for _, sample in _samples(dataset)
        if 0 < min(facts[sample.digest].width, facts[sample.digest].height) < TINY_PIXELS
    ]
    return listed(
        "tiny_pictures",
        "info",
        tiny,
        f"the shorter side has fewer than {TINY_PIXELS} pixels",
        "Look for thumbnails that came in by mistake.",
    )


def find_wrong_extensions(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Files whose ending names another format than their content."""
    endings = picture_extensions()
    wrong = []
    for _, sample in _samples(dataset):
        found = facts[sample.digest].format
        said = endings[PurePosixPath(sample.path).suffix.lower()]
        if found and _SAME_FORMAT.get(found, found) != _SAME_FORMAT.get(said, said):
            wrong.append(f"{sample.path} is {found}")
    return listed(
        "wrong_extensions",
        "info",
        wrong,
        "the ending names another format; the pictures are read all the same",
        "Rename them if other programs are to read them.",
    )


def find_two_classes(dataset: ImageDataset) -> Finding | None:
    """The same file under two classes: one of the labels is wrong."""
    return listed(
        "same_picture_in_two_classes",
        "warning",
        _same_apart(dataset, lambda _, sample: sample.label),
        "the same picture with different labels",
        "Decide which label is right and remove the other file.",
    )


def find_same_across_splits(dataset: ImageDataset) -> Finding | None:
    """The same file in two splits: accuracy is measured on what was learned by heart."""
    return listed(
        "same_picture_in_two_splits",
        "warning",
        _same_apart(dataset, lambda split, _: split),
        "the same picture in two splits makes accuracy read too high",
        "Keep each picture in one split.",
    )


def find_near_across_splits(dataset: ImageDataset, facts: Facts) -> Finding | None:
    """Nearly the same picture in two splits: saved again, resized or brightened."""
    samples = [(k, s) for k, s in _samples(dataset) if facts[s.digest].perceptual_hash]
    # Equal hashes once: a thousand blank pictures are one entry, not half a million pairs.
    holders: dict[str, dict[str, Sample]] = defaultdict(dict)
    for split, sample in samples:
        holders[facts[sample.digest].perceptual_hash].setdefault(split, sample)
    hashes = list(holders)
    pairs = [(text, text) for text in hashes if len(holders[text]) > 1]
    pairs += [(hashes[i], hashes[j]) for i, j in near_pairs(hashes, NEAR_BITS)]
    named = [name for a, b in pairs if (name := _near_name(holders[a], holders[b]))]
    return listed(
        "near_duplicates_in_two_splits",
        "warning",
        named,
        "nearly the same picture in two splits makes accuracy read too high",
        "Look at the pairs and keep each picture in one split.",
    )


def _near_name(first: Mapping[str, Sample], second: Mapping[str, Sample]) -> str | None:
    for split, sample in first.items():
        for other_split, other in second.items():
            if split != other_split and sample.digest != other.digest:
                return f"{sample.path} ~ {other.path}"
    return None


def _samples(dataset: ImageDataset) -> Iterator[tuple[str, Sample]]:
    for split in SPLITS:
        for sample in dataset.splits[split]:
            yield split, sample


def _same_apart(dataset: ImageDataset, place: Callable[[str, Sample], object]) -> list[str]:
    """Files of equal content in several places: one path from each, joined by `=`."""
    groups: dict[str, dict[object, str]] = defaultdict(dict)
    for split, sample in _samples(dataset):
        groups[sample.digest][place(split, sample)] = sample.path
    return [" = ".join(paths.values()) for paths in groups.values() if len(paths) > 1]


def _imbalance(dataset: ImageDataset) -> float:
    counts = [count for count in dataset.counts("train") if count]
    return max(counts) / min(counts)


def _sizes(dataset: ImageDataset, facts: Facts) -> Iterator[tuple[int, int]]:
    for _, sample in _samples(dataset):
        known = facts.get(sample.digest)
        if known is None:
            try:
                _, width, height = read_header(dataset.root / sample.path)
            except BadImageError:
                continue
            yield width, height
        elif known.width:
            yield known.width, known.height


def _size_range(lengths: NDArray[np.int64]) -> SizeRange | None:
    if not len(lengths):
        return None
    return SizeRange(int(lengths.min()), float(np.median(lengths)), int(lengths.max()))
