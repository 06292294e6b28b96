"""Which picture files a folder holds, in which split and class; file contents are not read.

Two layouts are understood: `train/CLASS/…` with `valid` and `test` beside it, under any of the
names that people give them (`val`, `Training`, `test_set`, …), and one folder per class. Folders
that only wrap another one are descended. A folder that is called like a split is one, never a
class. What visiontuner and MLflow write where a command runs is no data.
"""

from __future__ import annotations

import errno
import mimetypes
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from visiontuner.data.files import file_state
from visiontuner.data.images import picture_extensions
from visiontuner.errors import DataError
from visiontuner.journal import FILE_NAME as JOURNAL_FILE
from visiontuner.layout import (
    CACHE_MARK_FILE,
    RANGE_TEST_FILE,
    RANGE_TESTS_FOLDER,
    SEARCHES_FOLDER,
)
from visiontuner.text import printable

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
# Image formats that Pillow has no name for, and some that it can only write or not always open.
_OTHER_FORMATS = {
    ".avif": "AVIF",
    ".dcm": "DICOM",
    ".djvu": "DjVu",
    ".exr": "OpenEXR",
    ".hdr": "Radiance HDR",
    ".heic": "HEIC",
    ".heics": "HEIC",
    ".heif": "HEIC",
    ".hif": "HEIC",
    ".jxl": "JPEG XL",
    ".jxr": "JPEG XR",
    ".svg": "SVG",
    ".wdp": "JPEG XR",
    ".xcf": "XCF",
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "camera RAW"),
}
# What Pillow has an ending for and nobody would call an image.
_NO_IMAGE_FORMATS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "PDF"})
# How image files begin, whatever they are called.
_SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "BMP"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb".{4}ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "HEIC"),
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
    state: Sequence[int]  # of `file_state`


Reason = Literal["format", "place", "ending"]
"""Why an image is left out: not to be read here, in no class folder, called like no image."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An image that is in no split."""

    path: str  # posix, relative to the layout's root
    format: str
    reason: Reason


@dataclass(kw_only=True)
class Layout:
    """What a look at the folders alone tells; paths are posix and relative to `root`."""

    root: Path
    split_folders: dict[str, str] = field(default_factory=dict)  # folder -> split
    files: list[PictureFile] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    left_out_classes: list[str] = field(default_factory=list)  # folders of such images alone
    ignored: list[str] = field(default_factory=list)  # what is no image
    broken_links: list[str] = field(default_factory=list)
    beside_splits: dict[str, int] = field(default_factory=dict)  # folder -> images in it
    formats: Mapping[str, str] = field(default_factory=dict)  # ending -> format that is read
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
    given, root = root, _unwrap(root)
    layout = Layout(root=root, split_folders=_split_folders(root), formats=picture_extensions())
    for above in root.parents:
        if above.is_relative_to(given):
            _read_loose(layout, above)
    if layout.split_folders:
        _read_beside(layout)
        for name, split in layout.split_folders.items():
            folder = _unwrap_split(root, name)
            _refuse_splits_in_split(root / folder)
            _read_classes(layout, folder, split)
    else:
        _read_classes(layout, "", None)
        for name, below in layout.class_folders.items():
            if any(map(_split_named, below)):
                _refuse_splits_in_class(root, name)
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
    """Folder name -> split, or nothing where no folder is called like one."""
    found = _named_like_splits(root)
    if not found:
        return {}
    classes = (
        f" If {next(iter(found))} is a class, put the folders of all classes into a folder train."
        if len(found) < len(_folders(root))
        else ""
    )
    train = [name for name, split in found.items() if split == "train"]
    if not train:
        raise DataError(f"{root} has {', '.join(found)} but no train folder. {LAYOUTS}{classes}")
    if not _folders(root / train[0]):
        raise DataError(f"{root / train[0]} holds no class folders. {LAYOUTS}{classes}")
    for split in set(found.values()):
        names = [name for name, other in found.items() if other == split]
        if len(names) > 1:
            raise DataError(
                f"{root} has {' and '.join(names)}, which mean the same split; keep one of them."
            )
    return found


def _named_like_splits(folder: Path) -> dict[str, str]:
    return {name: split for name in _folders(folder) if (split := _split_named(name))}


def _refuse_splits_in_class(root: Path, name: str) -> None:
    """`data/train/CLASS/…` beside another folder, and `CLASS/train/…`."""
    folder = root / name
    found = _named_like_splits(folder)
    if any(split == "train" and _folders(folder / child) for child, split in found.items()):
        others = ", ".join(other for other in _folders(root) if other != name)
        raise DataError(
            f"{folder} holds splits ({', '.join(found)}), and beside it lies {others}. "
            f"Give {folder} as data.source, or take {others} away."
        )
    if found and len(found) == len(_folders(folder)):
        child = next(iter(found))
        raise DataError(
            f"{folder} holds {', '.join(found)}: splits go above the classes, "
            f"{child}/{name}/… and not {name}/{child}/…. If {child} is no split, rename it."
        )


def _refuse_splits_in_split(folder: Path) -> None:
    """`train/train/…` beside `train/valid/…`; one class may be called like a split here."""
    found = _named_like_splits(folder)
    if len(set(found.values())) > 1:
        raise DataError(
            f"{folder} holds {', '.join(found)}, which are called like splits and would be "
            f"classes. If they are splits, give {folder} as data.source; if not, rename them."
        )


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


def _read_beside(layout: Layout) -> None:
    """What lies beside the splits' folders is left out, and worth a warning if it is images."""
    _read_loose(layout, layout.root)
    for name in _children(layout.root):
        path = layout.root / name
        if name in layout.split_folders or not path.is_dir():
            continue
        if images := _count_images(layout, path):
            layout.beside_splits[name] = images
        else:
            layout.ignored.append(name)


def _count_images(layout: Layout, folder: Path) -> int:
    try:
        return sum(
            _image_format(layout, entry.name) is not None for entry, _ in _walk(folder, "", ())
        )
    except DataError:  # not to be read, and nobody asked for it
        return 0


def _read_loose(layout: Layout, folder: Path) -> None:
    """Files right in a folder that should hold folders of classes or splits."""
    prefix = os.path.relpath(folder, layout.root)
    for entry in _scan(folder):
        if not _is_folder(entry):
            relative = entry.name if prefix == "." else f"{prefix}/{entry.name}"
            _leave_out(layout, entry, relative, in_class=False)


def _leave_out(layout: Layout, entry: os.DirEntry[str], relative: str, *, in_class: bool) -> None:
    """Remember a file that is not used, as an image or as none."""
    known = _image_format(layout, entry.name)
    called_so = known is not None
    if known is None and mimetypes.guess_type(entry.name)[0] is None:
        known = _format_by_content(entry)
    if known is None:
        if not relative.startswith("../"):  # a README above the data set is nobody's concern
            layout.ignored.append(relative)
    elif known not in layout.formats.values():
        layout.left_out.append(LeftOut(relative, known, "format"))
    else:
        reason: Reason = "place" if called_so or not in_class else "ending"
        layout.left_out.append(LeftOut(relative, known, reason))


def _image_format(layout: Layout, name: str) -> str | None:
    """The image format that a file name's ending stands for, read here or not."""
    ending = _file_ending(name)
    if ending in layout.formats:
        return layout.formats[ending]
    known = _OTHER_FORMATS.get(ending) or Image.registered_extensions().get(ending)
    return None if known in _NO_IMAGE_FORMATS else known


def _file_ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _format_by_content(entry: os.DirEntry[str]) -> str | None:
    try:
        if not stat.S_ISREG(entry.stat().st_mode):
            return None
        with open(entry.path, "rb") as file:  # noqa: PTH123
            head = file.read(16)
    except OSError:
        return None
    return next((known for start, known in _SIGNATURES if start.match(head)), None)


def _read_classes(layout: Layout, folder: str, split: str | None) -> None:
    prefix = f"{folder}/" if folder else ""
    _read_loose(layout, layout.root / folder)
    for name in _children(layout.root / folder):
        path = layout.root / folder / name
        if not path.is_dir():
            continue
        class_name = _class_name(path)
        before, left_out = len(layout.files), len(layout.left_out)
        for entry, relative in _walk(path, prefix + name, ()):
            _add_file(layout, entry, relative, class_name, split)
        if found := layout.files[before:]:
            layout.class_folders[prefix + name] = _subfolders(found, prefix + name)
        elif len(layout.left_out) > left_out:
            layout.left_out_classes.append(prefix + name)
        else:
            layout.empty_classes.append(prefix + name)


def _subfolders(files: Iterable[PictureFile], class_folder: str) -> list[str]:
    """The folders right below a class folder that hold pictures."""
    below = (file.path.removeprefix(f"{class_folder}/").split("/") for file in files)
    return sorted({parts[0] for parts in below if len(parts) > 1})


def _add_file(
    layout: Layout, entry: os.DirEntry[str], relative: str, class_name: str, split: str | None
) -> None:
    if _file_ending(entry.name) not in layout.formats:
        _leave_out(layout, entry, relative, in_class=True)
        return
    try:
        status = entry.stat()
    except OSError:
        layout.broken_links.append(relative)
        return
    if not stat.S_ISREG(status.st_mode):
        layout.ignored.append(relative)
        return
    layout.files.append(PictureFile(relative, class_name, split, file_state(status)))


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
    if printable(name) != name:
        raise DataError(
            f"The class folder {printable(str(folder))} has an unreadable name; rename it."
        )
    return name


def left_out_formats(files: Iterable[LeftOut]) -> str:
    """Images by format, most first: `118 HEIC, 2 JPEG XL`."""
    counts = Counter(file.format for file in files)
    return ", ".join(f"{number} {known}" for known, number in counts.most_common())


def why_not_read(files: Iterable[LeftOut]) -> str:
    """What is said of images whose format is not read here."""
    heic = any(file.format == "HEIC" for file in files)
    return "not read here" + (" (HEIC needs the package pillow-heif)" if heic else "")


def _check(layout: Layout) -> None:
    names = sorted({file.class_name for file in layout.files})
    unread = [file for file in layout.left_out if file.reason == "format"]
    hint = f" Left out: {left_out_formats(unread)}, {why_not_read(unread)}." if unread else ""
    if not names:
        seen = [*(file.path for file in layout.left_out), *layout.ignored]
        such = f" (it holds files such as {seen[0]})" if seen else ""
        raise DataError(f"{layout.root} holds no pictures in class folders{such}.{hint} {LAYOUTS}")
    if len(names) == 1:
        raise DataError(
            f"{layout.root} has only one class, {names[0]}; a classifier needs at least two."
            f"{hint} {LAYOUTS}"
        )
