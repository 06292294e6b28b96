"""A folder of pictures -> `ImageDataset`: files, labels, class names, splits and one digest.

A picture's split, where the folders leave it open, depends on nothing but its content: the same
picture never lands in two splits, and adding one moves no other.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visiontuner.data.archive import archive_findings
from visiontuner.data.digests import content_digests
from visiontuner.data.layout import LAYOUTS, Layout, PictureFile, read_layout
from visiontuner.data.layout_findings import layout_findings
from visiontuner.data.listing import ListedFinding, listed
from visiontuner.errors import DataError
from visiontuner.journal import Finding

SPLITS = ("train", "validation", "test")

_VALIDATION_FROM = 0.9  # of train, where there is no validation folder
_WHOLE_SET = (("train", 0.8), ("validation", 0.9), ("test", 1.0))


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture of a data set."""

    path: str  # posix, relative to the data set's root
    label: int  # index into class_names
    digest: str  # SHA-256 of the file's content, hexadecimal


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Pictures with labels in three splits.

    Args:
        root: the folder that the paths are relative to.
        class_names: sorted; a label is an index into it, the same in every split.
        splits: samples by split name, all three of `SPLITS`; test may be empty.
        digest: SHA-256 over names, paths, labels, splits and contents, hexadecimal.
        findings: what was noticed without decoding a picture.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Sample, ...]]
    digest: str
    findings: tuple[Finding, ...]

    def counts(self, split: str) -> list[int]:
        """Pictures of each class in a split, in the order of `class_names`."""
        counts = Counter(sample.label for sample in self.splits[split])
        return [counts[label] for label in range(len(self.class_names))]

    def with_validation_in_train(self) -> ImageDataset:
        """The same pictures, with those of validation in train as well as where they are."""
        train = sorted((*self.splits["train"], *self.splits["validation"]), key=lambda s: s.path)
        splits = {**self.splits, "train": tuple(train)}
        return replace(self, splits=splits, digest=_digest(self.class_names, splits))


def load_dataset(
    root: Path,
    *,
    limit_per_class: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> ImageDataset:
    """Read a folder of pictures.

    Args:
        root: train/, valid/, test/ with class folders, or class folders (then split 80/10/10).
        limit_per_class: at most so many pictures of a class in each split, always the same ones.
        cache: where content digests are remembered, so that a second look reads no picture.
        progress: called with (files read, files to read).

    Raises:
        DataError: there is nothing to train on; the message says what was found instead.
    """
    layout = read_layout(root)
    digests = content_digests(layout.root, layout.files, cache=cache, progress=progress)
    class_names = tuple(sorted({file.class_name for file in layout.files}))
    splits = _make_splits(layout, class_names, digests)
    if limit_per_class is not None:
        splits = {name: _limit(samples, limit_per_class) for name, samples in splits.items()}
    _check_splits(layout, splits)
    dataset = ImageDataset(
        root=layout.root,
        class_names=class_names,
        splits=splits,
        digest=_digest(class_names, splits),
        findings=(),
    )
    unreadable = [path for path, digest in digests.items() if not isinstance(digest, str)]
    findings = (
        *archive_findings(root),
        *layout_findings(layout, unreadable),
        *_class_findings(dataset),
    )
    return replace(dataset, findings=findings)


def _make_splits(
    layout: Layout, class_names: Sequence[str], digests: Mapping[str, str | OSError]
) -> dict[str, tuple[Sample, ...]]:
    labels = {name: label for label, name in enumerate(class_names)}
    has_validation = any(file.split == "validation" for file in layout.files)
    splits: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for file in layout.files:
        digest = digests[file.path]
        if isinstance(digest, str):
            split = _split_of(file, digest, has_validation)
            splits[split].append(Sample(file.path, labels[file.class_name], digest))
    return {name: tuple(sorted(s, key=lambda x: x.path)) for name, s in splits.items()}


def _split_of(file: PictureFile, digest: str, has_validation: bool) -> str:
    position = int(digest[:8], 16) / 2**32  # uniform in [0, 1)
    if file.split is None:
        return next(name for name, end in _WHOLE_SET if position < end)
    if file.split == "train" and not has_validation and position >= _VALIDATION_FROM:
        return "validation"
    return file.split


def _limit(samples: Iterable[Sample], limit: int) -> tuple[Sample, ...]:
    by_label: dict[int, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda s: (s.digest, s.path)):
        if len(by_label[sample.label]) < limit:
            by_label[sample.label].append(sample)
    return tuple(sorted((s for kept in by_label.values() for s in kept), key=lambda s: s.path))


def _digest(class_names: Sequence[str], splits: Mapping[str, Sequence[Sample]]) -> str:
    rows = [
        [split, sample.path, sample.label, sample.digest]
        for split in SPLITS
        for sample in splits[split]
    ]
    return hashlib.sha256(json.dumps([list(class_names), rows]).encode()).hexdigest()


def _check_splits(layout: Layout, splits: Mapping[str, Sequence[Sample]]) -> None:
    for name in ("train", "validation"):
        if not splits[name]:
            total = sum(map(len, splits.values()))
            raise DataError(
                f"{layout.root} has {total} picture files, and none of them is for {name}. "
                f"Add pictures, or sort them into splits yourself. {LAYOUTS}"
            )


def unreadable_picture(sample: Sample, reason: str) -> Finding:
    """A finding about a picture that was left out; `reason` is what `BadImageError` says."""
    # "Cannot read /the/root/a/1.png: why." names the file already.
    _, named, why = reason.rpartition(sample.path)
    return Finding(
        rule="unreadable_picture",
        severity="warning",
        evidence=f"Cannot read {sample.path}{why if named else f': {reason}'}",
        advice="Repair or delete the file; it was left out.",
    )


def few_levels(paths: Sequence[str]) -> ListedFinding | None:
    """A finding about pictures that are nearly black, white or of one shade of gray."""
    return listed(
        "few_levels",
        "warning",
        paths,
        "nearly black, white or of one shade: they use fewer than 20 of 256 levels",
        "Look at them. 12 bits in a file of 16 need a header that says so (BitsPerSample, sBIT); "
        "or convert them to 8 bits.",
    )


def none_readable(split: str, findings: Sequence[Finding]) -> DataError:
    """What is said of a split whose pictures are all in `findings`."""
    return DataError(
        f"None of the {split} pictures can be read: {findings[-1].evidence.rstrip('.')}. "
        "`visiontuner prepare --all --data DATA` lists what is wrong with each."
    )


def find_emptied_classes(
    dataset: ImageDataset, readable: Mapping[str, Collection[int]]
) -> list[Finding]:
    """Classes that have pictures in a split, none of which can be read.

    Args:
        readable: by split, the labels of the pictures that can be.
    """
    found = [_emptied(dataset, split, set(labels)) for split, labels in readable.items()]
    return [finding for finding in found if finding is not None]


def _emptied(dataset: ImageDataset, split: str, left: Collection[int]) -> Finding | None:
    counted = enumerate(zip(dataset.class_names, dataset.counts(split), strict=True))
    names = [name for label, (name, count) in counted if count and label not in left]
    return listed(
        "classes_without_readable_pictures",
        "error" if split == "train" else "warning",
        names,
        f"none of their {split} pictures can be read",
        "Repair or replace them: a class without training pictures cannot be learned, one without "
        "others is not measured.",
    )


def _class_findings(dataset: ImageDataset) -> list[Finding]:
    findings = [
        listed(
            "missing_classes",
            "warning",
            _classes_with(dataset, split, 0),
            f"no pictures in {split}",
            f"Add pictures of them to {split}; until then they are not measured there.",
        )
        for split in ("validation", "test")
        if dataset.splits[split]
    ]
    findings += [
        listed(
            "class_names_alike",
            "warning",
            _alike(dataset.class_names),
            "names that differ in capitals alone are classes of their own",
            "If they mean the same, write them the same.",
        ),
        listed(
            "classes_without_training_pictures",
            "error",
            _classes_with(dataset, "train", 0),
            "classes that cannot be learned",
            "Add pictures of them to train, or remove the classes.",
        ),
        listed(
            "classes_with_one_training_picture",
            "warning",
            _classes_with(dataset, "train", 1),
            "one picture is too few to learn a class from",
            "Add pictures of them to train.",
        ),
    ]
    return [finding for finding in findings if finding is not None]


def _alike(names: Sequence[str]) -> list[str]:
    """Names that differ in capitals alone, together: `Cat and cat`."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spellings[name.casefold()].append(name)
    return [" and ".join(same) for same in spellings.values() if len(same) > 1]


def _classes_with(dataset: ImageDataset, split: str, number: int) -> list[str]:
    counts = dataset.counts(split)
    return [n for n, count in zip(dataset.class_names, counts, strict=True) if count == number]
