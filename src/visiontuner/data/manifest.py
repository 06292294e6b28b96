"""Which images a search was made with: a file in its folder, and what has changed since."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from visiontuner.data.dataset import ImageDataset
from visiontuner.io.files import write_whole
from visiontuner.text import printable

MANIFEST_FILE = "images.json.gz"
_DIGEST_DIGITS = 16  # of 64: two of a million images share them with probability 3e-8
_NAMED = 5


@dataclass(frozen=True)
class Listed:
    """One image of a manifest."""

    split: str
    path: str
    class_name: str
    digest: str


def write_manifest(folder: Path, dataset: ImageDataset) -> None:
    """Keep the images of a search in its folder: split, path, class and content of each.

    Raises:
        OSError: the folder cannot be written.
    """
    rows = {
        split: [[s.path, s.label, s.digest[:_DIGEST_DIGITS]] for s in samples]
        for split, samples in dataset.splits.items()
    }
    content = json.dumps({"class_names": list(dataset.class_names), "splits": rows}).encode()
    packed = gzip.compress(content, compresslevel=6, mtime=0)
    write_whole(folder / MANIFEST_FILE, lambda file: file.write(packed))


def read_manifest(folder: Path) -> list[Listed] | None:
    """The images of a search; None where its folder says nothing of them, or nothing readable."""
    try:
        raw = json.loads(gzip.decompress((folder / MANIFEST_FILE).read_bytes()))
        names = raw["class_names"]
        return [
            Listed(str(split), str(path), str(names[label]), str(digest))
            for split, rows in raw["splits"].items()
            for path, label, digest in rows
        ]
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, kw_only=True)
class ImageChanges:
    """What has become of a search's images, compared by content: a renamed image is the same.

    Args:
        new: images whose content was not there.
        relabelled: images that were there and are of another class now.
        gone: images whose content is not there any more.
        moved: images that are in another split now, relabelled ones aside.
    """

    new: int
    relabelled: int
    gone: int
    moved: int

    def describe(self) -> str:
        """`120 new images, 3 relabelled since, 2 gone.`"""
        if not any((self.new, self.relabelled, self.gone, self.moved)):
            return "The images are the same."
        parts = [
            f"{self.new:,} new image{'s' * (self.new != 1)}",
            f"{self.relabelled:,} relabelled since" if self.relabelled else "",
            f"{self.gone:,} gone" if self.gone else "",
            f"{self.moved:,} in another split" if self.moved else "",
        ]
        return f"{', '.join(part for part in parts if part)}."


def compare_images(earlier: Iterable[Listed], dataset: ImageDataset) -> ImageChanges:
    """What has changed between an earlier search's images and these."""
    old, now = _by_content(earlier), _by_content(_listed(dataset))
    both = old.keys() & now.keys()
    relabelled = {d for d in both if _classes(old[d]) != _classes(now[d])}
    moved = {d for d in both - relabelled if _splits(old[d]) != _splits(now[d])}
    return ImageChanges(
        new=sum(len(now[digest]) for digest in now.keys() - both),
        relabelled=sum(len(now[digest]) for digest in relabelled),
        gone=sum(len(old[digest]) for digest in old.keys() - both),
        moved=sum(len(now[digest]) for digest in moved),
    )


def describe_classes(earlier: Iterable[str], now: Iterable[str]) -> str | None:
    """`Other classes: 2 new (emu, owl), 1 gone (cat).`; None if they are the same."""
    old, new = list(dict.fromkeys(earlier)), list(dict.fromkeys(now))
    groups = {"new": [n for n in new if n not in old], "gone": [n for n in old if n not in new]}
    parts = [f"{len(names)} {what} ({_named(names)})" for what, names in groups.items() if names]
    return f"Other classes: {', '.join(parts)}." if parts else None


def _named(names: list[str]) -> str:
    more = ", …" if len(names) > _NAMED else ""
    return ", ".join(printable(name) for name in names[:_NAMED]) + more


def _listed(dataset: ImageDataset) -> Iterator[Listed]:
    for split, samples in dataset.splits.items():
        for s in samples:
            yield Listed(split, s.path, dataset.class_names[s.label], s.digest[:_DIGEST_DIGITS])


def _by_content(images: Iterable[Listed]) -> Mapping[str, list[Listed]]:
    found: dict[str, list[Listed]] = defaultdict(list)
    for image in images:
        found[image.digest].append(image)
    return found


def _classes(images: Iterable[Listed]) -> set[str]:
    return {image.class_name for image in images}


def _splits(images: Iterable[Listed]) -> set[str]:
    return {image.split for image in images}
