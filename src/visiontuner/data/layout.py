"""Which picture files a folder holds, in which split and class; file contents are not read.

Two layouts are understood: `train/CLASS/…` with `valid` (or `val`, `validation`) and `test` beside
it, and one folder per class. Folders that only wrap another one are descended.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from visiontuner.data.images import picture_extensions
from visiontuner.errors import DataError

SPLIT_FOLDERS = {
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
LAYOUTS = (
    "Expected train/, valid/ and test/ with one folder per class in each, or one folder per class."
)
_NOT_DATA = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


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
        layout.ignored += [name for name in _children(root) if name not in splits]
        for folder, split in splits.items():
            _read_classes(layout, folder, split)
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
    found = {name: SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in SPLIT_FOLDERS}
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
        if len(layout.files) == before:
            layout.empty_classes.append(prefix + name)


def _add_file(
    layout: Layout, entry: os.DirEntry[str], relative: str, class_name: str, split: str | None
) -> None:
    if os.path.splitext(entry.name)[1].lower() not in picture_extensions():  # noqa: PTH122
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


def _walk(
    folder: Path | str, relative: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Files below a folder in a stable order, links followed."""
    status = os.stat(folder)  # noqa: PTH116 - called for every folder of a large tree
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder above it; remove it.")
    for entry in _scan(folder):
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
    return [entry.name for entry in _scan(folder)]


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _scan(folder) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{entry.path} is a link to itself; remove it.") from None
        raise DataError(f"Cannot read {entry.path}: {error.strerror}.") from None


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
