"""Which picture files a folder holds, in which split and class; file contents are not read.

Two layouts are understood: `train/CLASS/…` with `valid` and `test` beside it, under any of the
names that people give them (`val`, `Training`, `test_set`, …), and one folder per class. Folders
that only wrap another one are descended. What visiontuner and MLflow write where a command runs is
no data.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from visiontuner.data.images import picture_extensions
from visiontuner.errors import DataError
from visiontuner.journal import FILE_NAME as JOURNAL_FILE
from visiontuner.layout import (
    CACHE_MARK_FILE,
    RANGE_TEST_FILE,
    RANGE_TESTS_FOLDER,
    SEARCHES_FOLDER,
)

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# `training_set`, `Test Data`, `seg_train`: what stands beside the word says nothing.
_FILLERS = frozenset({"set", "data", "dataset", "images", "pictures", "seg"})
LAYOUTS = (
    "Expected train/, valid/ and test/ with one folder per class in each, or one folder per class."
)
_NOT_DATA = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "mlflow.db", "mlruns", "mlartifacts"}
)
# In the folder of a search, of a range test, and in the cache.
_OUR_MARKS = (JOURNAL_FILE, RANGE_TEST_FILE, CACHE_MARK_FILE)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """One picture file: `split` is None where the folders say nothing about splits."""

    path: str  # posix, relative to the layout's root
    class_name: str
    split: str | None
    size: int  # bytes
    mtime_ns: int


@dataclass(kw_only=True)
class Layout:
    """What a look at the folders alone tells; paths are posix and relative to `root`."""

    root: Path
    files: list[PictureFile] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # files without a picture's ending, misplaced
    broken_links: list[str] = field(default_factory=list)
    beside_splits: list[str] = field(default_factory=list)  # folders that hold pictures
    # Class folders with pictures -> the folders right below them that hold some.
    class_folders: dict[str, list[str]] = field(default_factory=dict)


def read_layout(root: Path) -> Layout:
    """Find the pictures under a folder.

    Raises:
        DataError: the folder is missing, not a folder, empty, unreadable or no image data set.
    """
    if not root.exists():
        raise DataError(f"There is no folder {root}. Check data.source.")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of pictures. {LAYOUTS}")
    root = _unwrap(root)
    layout = Layout(root=root)
    splits = _split_folders(root)
    if splits:
        _read_beside(layout, splits)
        for folder, split in splits.items():
            _read_classes(layout, _unwrap_split(root, folder), split)
    else:
        _read_classes(layout, "", None)
    _check(layout)
    return layout


def _unwrap(root: Path) -> Path:
    """Descend folders that hold one other folder of folders (`dogImages/train/…`)."""
    while True:
        folders = _folders(root)
        if len(folders) != 1 or _split_folders(root) or not _folders(root / folders[0]):
            return root
        root = root / folders[0]


def _split_folders(root: Path) -> dict[str, str]:
    """Folder name -> split, or nothing where the folders are classes."""
    folders = _folders(root)
    found = {name: split for name in folders if (split := _split_named(name))}
    if not found:
        return {}
    train = [name for name, split in found.items() if split == "train"]
    if not train:
        if len(found) == len(folders):
            raise DataError(f"{root} has {', '.join(found)} but no train folder. {LAYOUTS}")
        return {}
    if not _folders(root / train[0]):
        if len(found) == len(folders):
            raise DataError(f"{root / train[0]} holds no class folders. {LAYOUTS}")
        return {}  # a class that is called "train", among cars and planes
    for split in set(found.values()):
        names = [name for name, other in found.items() if other == split]
        if len(names) > 1:
            raise DataError(
                f"{root} has {' and '.join(names)}, which mean the same split; keep one of them."
            )
    return found


def _split_named(folder: str) -> str | None:
    """The split that a folder's name stands for, if it is any's."""
    words = [word for word in re.split(r"[\W_]+", folder.lower()) if word and word not in _FILLERS]
    return _SPLIT_WORDS.get(words[0].removesuffix("set")) if len(words) == 1 else None


def _unwrap_split(root: Path, folder: str) -> str:
    """Descend a split's folder that holds nothing but itself once more (`test_set/test_set/…`)."""
    children = _folders(root / folder)
    if len(children) == 1 and _split_named(children[0]) == _split_named(Path(folder).name):
        return _unwrap_split(root, f"{folder}/{children[0]}")
    return folder


def _read_beside(layout: Layout, splits: Mapping[str, str]) -> None:
    """What lies beside the splits' folders: left out, and worth a warning if it holds pictures."""
    for name in _children(layout.root):
        if name in splits:
            continue
        path = layout.root / name
        pictures = path.is_dir() and _holds_pictures(path)
        (layout.beside_splits if pictures else layout.ignored).append(name)


def _holds_pictures(folder: Path) -> bool:
    """Whether a folder or one right below it, as a split's would, holds pictures."""
    try:
        entries = _scan(folder)
        below = (entry for child in entries if _is_folder(child) for entry in _scan(child.path))
        return any(_is_picture(entry.name) for entry in chain(entries, below))
    except DataError:  # not to be read, and nobody asked for it
        return False


def _read_classes(layout: Layout, folder: str, split: str | None) -> None:
    prefix = f"{folder}/" if folder else ""
    for name in _children(layout.root / folder):
        path = layout.root / folder / name
        if not path.is_dir():
            layout.ignored.append(prefix + name)
            continue
        class_name = _class_name(path)
        before = len(layout.files)
        for entry, relative in _walk(path, prefix + name, ()):
            _add_file(layout, entry, relative, class_name, split)
        if found := layout.files[before:]:
            layout.class_folders[prefix + name] = _subfolders(found, prefix + name)
        else:
            layout.empty_classes.append(prefix + name)


def _subfolders(files: Iterable[PictureFile], class_folder: str) -> list[str]:
    """The folders right below a class folder that hold pictures."""
    below = (file.path.removeprefix(f"{class_folder}/").split("/") for file in files)
    return sorted({parts[0] for parts in below if len(parts) > 1})


def _add_file(
    layout: Layout, entry: os.DirEntry[str], relative: str, class_name: str, split: str | None
) -> None:
    if not _is_picture(entry.name):
        layout.ignored.append(relative)
        return
    try:
        status = entry.stat()
    except OSError:
        layout.broken_links.append(relative)
        return
    if not stat.S_ISREG(status.st_mode):
        layout.ignored.append(relative)
        return
    layout.files.append(
        PictureFile(relative, class_name, split, status.st_size, status.st_mtime_ns)
    )


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in picture_extensions()  # noqa: PTH122


def _walk(
    folder: Path | str, relative: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Files below a folder in a stable order, links followed."""
    status = os.stat(folder)  # noqa: PTH116 - called for every folder of a large tree
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder above it; remove it.")
    entries = _scan(folder)
    if any(entry.name in _OUR_MARKS for entry in entries):
        return
    for entry in entries:
        path = f"{relative}/{entry.name}"
        if _is_folder(entry):
            yield from _walk(entry.path, path, (*above, identity))
        else:
            yield entry, path


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not _is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}.") from None
    return sorted(visible, key=lambda entry: entry.name)


def _children(folder: Path) -> list[str]:
    return [e.name for e in _scan(folder) if not (_is_folder(e) and _is_ours(Path(e.path)))]


def _folders(folder: Path) -> list[str]:
    return [e.name for e in _scan(folder) if _is_folder(e) and not _is_ours(Path(e.path))]


def _is_ours(folder: Path) -> bool:
    """Whether a search, a range test, a folder of them or the cache lies there."""
    if folder.name in (SEARCHES_FOLDER, RANGE_TESTS_FOLDER):
        return any(_has_mark(Path(child.path)) for child in _scan(folder) if _is_folder(child))
    return _has_mark(folder)


def _has_mark(folder: Path) -> bool:
    return any(os.path.exists(folder / mark) for mark in _OUR_MARKS)  # noqa: PTH110 never raises


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{entry.path} is a link to itself; remove it.") from None
        raise DataError(f"Cannot read {entry.path}: {error.strerror}.") from None


def is_no_data(path: Path) -> bool:
    """Hidden, or left there by a system, by MLflow or by a command of ours."""
    return _is_hidden(path.name) or (path.is_dir() and _is_ours(path))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NOT_DATA


def _class_name(folder: Path) -> str:
    # macOS stores é as two characters, Linux as one: the same class in two splits.
    name = unicodedata.normalize("NFC", folder.name)
    if not name.isprintable():
        raise DataError(f"The class folder {str(folder)!r} has an unreadable name; rename it.")
    return name


def _check(layout: Layout) -> None:
    names = sorted({file.class_name for file in layout.files})
    if not names:
        hint = f" (it holds files such as {layout.ignored[0]})" if layout.ignored else ""
        raise DataError(f"{layout.root} holds no pictures in class folders{hint}. {LAYOUTS}")
    if len(names) == 1:
        raise DataError(
            f"{layout.root} has only one class, {names[0]}; a classifier needs at least two. "
            f"{LAYOUTS}"
        )
