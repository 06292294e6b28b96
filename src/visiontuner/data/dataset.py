"""A source of images -> `ImageDataset`: files, labels, class names, splits and one digest."""

from __future__ import annotations

import difflib
import hashlib
import json
import mimetypes
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from visiontuner.data.images import image_extensions
from visiontuner.data.labels import (
    BAD_ROWS,
    TABLE_SUFFIXES,
    group_files,
    has_split_folders,
    is_table_name,
    label_files,
    override_labels,
    read_class_map,
    read_table,
    rename_classes,
    split_named,
    with_local_paths,
)
from visiontuner.data.saved import SavedFolder, extract_saved, find_saved
from visiontuner.data.web import fetch_table, folder_address, is_web_table
from visiontuner.errors import DataError
from visiontuner.io.download import (
    _NAMES_NOTE,
    ARCHIVE_SUFFIXES,
    download,
    extract,
    is_archive_name,
    whole_folder,
)
from visiontuner.io.files import (
    ImageFile,
    content_digests,
    file_digest,
    file_state,
    is_folder,
    is_made_by_commands,
    locked,
    scan_folder,
    walk_files,
)
from visiontuner.journal import Finding, Severity
from visiontuner.paths import local_path, split_uri
from visiontuner.text import HIDDEN, next_command, printable, without_secrets


def archive_findings(folder: Path) -> list[Finding]:
    """What is worth a word about an archive that was unpacked into a folder."""
    try:
        note = json.loads((folder / _NAMES_NOTE).read_text(encoding="utf-8"))
        encoding, count, examples = note["encoding"], note["count"], ", ".join(note["examples"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [
        Finding(
            rule="names_without_encoding",
            severity="warning",
            evidence=f"the archive does not say how its names are encoded; {count} of them were "
            f"read as {encoding} ({examples if examples.isprintable() else ascii(examples)})",
            advice="Look at the class names. If they are wrong, unpack the archive yourself "
            "(`unzip -O ENCODING`) and give the folder.",
        )
    ]


# Findings about many files or names: a line that counts them, and all of them.


@dataclass(frozen=True, kw_only=True)
class ListedFinding(Finding):
    """A finding whose evidence names the first of `items`; the journal keeps the evidence alone."""

    items: tuple[str, ...]


def listed(
    rule: str, severity: Severity, items: Sequence[str], what: str, advice: str
) -> ListedFinding | None:
    """A finding about some paths or names, with their number and the first as an example."""
    if not items:
        return None
    evidence = f"{len(items)} ({items[0]}{', …' if len(items) > 1 else ''}): {what}"
    return ListedFinding(
        rule=rule, severity=severity, evidence=evidence, advice=advice, items=tuple(items)
    )


# Which image files a folder holds, in which split and class; file contents are not read.
#
# Two layouts are understood: `train/CLASS/…` with `valid` and `test` beside it, under any of the
# names that people give them (`val`, `Training`, `test_set`, …), and one folder per class. Folders
# that only wrap another one are descended. A folder that is called like a split is one, never a
# class. What visiontuner and MLflow write where a command runs is no data.


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
    files: list[ImageFile] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    left_out_classes: list[str] = field(default_factory=list)  # folders of such images alone
    ignored: list[str] = field(default_factory=list)  # what is no image
    broken_links: list[str] = field(default_factory=list)
    beside_splits: dict[str, int] = field(default_factory=dict)  # folder -> images in it
    formats: Mapping[str, str] = field(default_factory=dict)  # ending -> format that is read
    # Class folders with images -> the folders right below them that hold some.
    class_folders: dict[str, list[str]] = field(default_factory=dict)
    table: str = ""  # what labelled the files, where no folders did
    bad_rows: dict[str, list[str]] = field(default_factory=dict)  # rule -> rows
    repeated_rows: Sequence[str] = ()
    unknown_classes: Sequence[str] = ()  # of the class map
    notes: list[str] = field(default_factory=list)  # what was found beyond files and classes
    address: str = ""  # of the root on S3 or on the web, with a slash at its end
    saved_in: Path | None = None  # a saved data set, whose images were extracted to the root


def read_layout(root: Path) -> Layout:
    """Find the images under a folder.

    Raises:
        DataError: the folder is missing, not a folder, empty, unreadable or no image data set.
    """
    if not root.exists():
        raise DataError(f"There is no folder {root}. Check data.source.")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of images. {LAYOUTS}")
    given, root = root, _unwrap(root)
    layout = Layout(root=root, split_folders=_split_folders(root), formats=image_extensions())
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
            if any(map(split_named, below)):
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
    return {name: split for name in _folders(folder) if (split := split_named(name))}


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


def _unwrap_split(root: Path, folder: str) -> str:
    """Descend a split's folder that holds nothing but itself once more (`test_set/test_set/…`)."""
    children = _folders(root / folder)
    if len(children) == 1 and split_named(children[0]) == split_named(Path(folder).name):
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
        return sum(_image_format(layout, entry.name) is not None for entry, _ in walk_files(folder))
    except DataError:  # not to be read, and nobody asked for it
        return 0


def _read_loose(layout: Layout, folder: Path) -> None:
    """Files right in a folder that should hold folders of classes or splits."""
    prefix = os.path.relpath(folder, layout.root)
    for entry in scan_folder(folder):
        if not is_folder(entry):
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
        for entry, relative in walk_files(path, prefix + name):
            _add_file(layout, entry, relative, class_name, split)
        if found := layout.files[before:]:
            layout.class_folders[prefix + name] = _subfolders(found, prefix + name)
        elif len(layout.left_out) > left_out:
            layout.left_out_classes.append(prefix + name)
        else:
            layout.empty_classes.append(prefix + name)


def _subfolders(files: Iterable[ImageFile], class_folder: str) -> list[str]:
    """The folders right below a class folder that hold images."""
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
    layout.files.append(ImageFile(relative, class_name, split, file_state(status)))


def _children(folder: Path) -> list[str]:
    return [
        e.name
        for e in scan_folder(folder)
        if not (is_folder(e) and is_made_by_commands(Path(e.path)))
    ]


def _folders(folder: Path) -> list[str]:
    return [
        e.name
        for e in scan_folder(folder)
        if is_folder(e) and not is_made_by_commands(Path(e.path))
    ]


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


class _OneClass(DataError):
    """There is one class alone: nothing to train on, and enough to evaluate."""

    def __init__(self, message: str, layout: Layout) -> None:
        super().__init__(message)
        self.layout = layout


def _check(layout: Layout) -> None:
    names = sorted({file.class_name for file in layout.files})
    unread = [file for file in layout.left_out if file.reason == "format"]
    hint = f" Left out: {left_out_formats(unread)}, {why_not_read(unread)}." if unread else ""
    if len(names) == 1 and layout.table:
        raise _OneClass(
            f"{layout.saved_in or layout.root / layout.table} has only one class, {names[0]}; a "
            f"classifier needs at least two. {_why_one_class(layout)}",
            layout,
        )
    if not names:
        seen = [*(file.path for file in layout.left_out), *layout.ignored]
        such = f" (it holds files such as {seen[0]})" if seen else ""
        raise DataError(f"{layout.root} holds no images in class folders{such}.{hint} {LAYOUTS}")
    if len(names) == 1:
        raise _OneClass(
            f"{layout.root} has only one class, {names[0]}; a classifier needs at least two."
            f"{hint} {LAYOUTS}",
            layout,
        )


def _why_one_class(layout: Layout) -> str:
    if not layout.bad_rows:
        return "Is it the right column? data.columns.label names another."
    rule, rows = max(layout.bad_rows.items(), key=lambda entry: len(entry[1]))
    return f"{len(rows):,} rows are left out, {printable(rows[0])}: {BAD_ROWS[rule]}."


# A table -> the same layout: the one that is given, or those that lie where no class folders do.


_TABLES = ("labels", "metadata")  # what a table of all images is called, but for its ending


def read_table_layout(
    path: Path, columns: Mapping[str, str | None] | None = None, address: str = ""
) -> Layout:
    """The images that a table names; their paths are relative to its folder.

    Args:
        address: of its folder, where that lies on S3 or on the web: rows may hold whole addresses.

    Raises:
        DataError: it is no table of images, or names one class alone.
    """
    layout = _table_layout(path.parent, address, path.name)
    _add_table(layout, path, columns)
    _check(layout)
    return layout


def _table_layout(root: Path, address: str, table: str = "") -> Layout:
    return Layout(root=root, formats=image_extensions(), address=address, table=table)


def find_table_layout(
    root: Path, columns: Mapping[str, str | None] | None, address: str = ""
) -> Layout | None:
    """The images that tables in a folder name, by the names that people give such tables.

    `labels` or `metadata` with all images, `metadata` in the folder of each split (Hugging Face),
    or a table for each split beside its folder (`train.csv` and `train/`).

    Raises:
        DataError: there are such tables, and one of them is no table of images.
    """
    while True:
        tables = {
            Path(e.name).stem.lower(): Path(e.path) for e in scan_folder(root) if _is_table(e)
        }
        folders = _folders(root)
        if tables or len(folders) != 1 or _named_like_splits(root):
            break
        root = root / folders[0]
        address = address and f"{address}{folders[0]}/"
    for stem in _TABLES:
        if stem in tables:
            layout = _table_layout(root, address, tables[stem].name)
            _add_table(layout, tables[stem], columns, folders=("", "images/"))
            _check(layout)
            return layout
    layout = _table_layout(root, address)
    return _metadata_of_splits(layout, columns) or _tables_of_splits(layout, tables, columns)


def _is_table(entry: os.DirEntry[str]) -> bool:
    return is_table_name(entry.name) and not is_folder(entry)


def _metadata_of_splits(layout: Layout, columns: Mapping[str, str | None] | None) -> Layout | None:
    for folder, split in _named_like_splits(layout.root).items():
        for entry in scan_folder(layout.root / folder):
            if _is_table(entry) and Path(entry.name).stem.lower() == "metadata":
                _add_table(layout, Path(entry.path), columns, folders=(f"{folder}/",), split=split)
                layout.table = f"{layout.table}, {folder}/{entry.name}".removeprefix(", ")
    return _checked(layout)


def _tables_of_splits(
    layout: Layout, tables: Mapping[str, Path], columns: Mapping[str, str | None] | None
) -> Layout | None:
    """`train.csv` beside `train/`, and those of other splits that have labels."""
    named = {path: split for stem, path in tables.items() if (split := split_named(stem))}
    if "train" not in named.values():
        return None
    labelled = [path for path in named if _has_labels(path, columns, named[path], layout)]
    for path in labelled:
        split = named[path] if len(labelled) > 1 else None
        _add_table(layout, path, columns, folders=(f"{path.stem}/", "", "images/"), split=split)
    layout.table = ", ".join(path.name for path in labelled)
    return _checked(layout)


def _has_labels(
    path: Path, columns: Mapping[str, str | None] | None, split: str, layout: Layout
) -> bool:
    """Whether a table has labels: a competition's test set has none, and that of train must."""
    try:
        read_table(path, columns)
    except DataError:
        if split == "train":
            raise
        layout.notes.append(f"{path.name} left out, without labels")
        return False
    return True


def _checked(layout: Layout) -> Layout | None:
    if not layout.files:
        return None
    _check(layout)
    return layout


def _add_table(
    layout: Layout,
    path: Path,
    columns: Mapping[str, str | None] | None,
    *,
    folders: Sequence[str] = ("",),
    split: str | None = None,
) -> None:
    """Add the images that a table names, and what is to be said of its rows."""
    table = read_table(path, columns)
    if layout.address:
        below = path.parent.relative_to(layout.root).as_posix()
        table = with_local_paths(table, layout.address + ("" if below == "." else f"{below}/"))
    named = label_files(table, layout.root, folders=folders, split=split)
    layout.files += named.files
    which = "" if split is None else f"{path.relative_to(layout.root).as_posix()}, "
    for rule, rows in named.bad.items():
        layout.bad_rows.setdefault(rule, []).extend(f"{which}{row}" for row in rows)
    layout.repeated_rows = [*layout.repeated_rows, *named.repeated]
    said = [
        f"{r}s in column `{table.columns[r]}`" for r in ("split", "group") if r in table.columns
    ]
    if split is None and has_split_folders(table):
        said.append("splits by their folders")
    layout.notes += [note for note in said if note not in layout.notes]


# What the folders of a data set alone say about it -> findings.


_NAMED = 3


def layout_findings(layout: Layout, unreadable: Sequence[str]) -> list[Finding]:
    """Everything that is worth a word; `unreadable` are files that could not be opened."""
    findings: list[Finding | None] = [
        listed(
            "ignored_files",
            "info",
            layout.ignored,
            "left out: no image in a class folder",
            "Nothing to do, unless they should be images.",
        ),
        *_left_out_images(layout),
        listed(
            "tables_not_read",
            "info",
            [] if layout.table else [n for n in layout.ignored if _is_table_of_images(n)],
            "a table lies beside class folders, which label the images",
            "Give the table as data.source if its labels, splits or groups are meant.",
        ),
        *_bad_rows(layout),
        *_folder_findings(layout),
        listed(
            "unreadable_files",
            "warning",
            unreadable,
            "left out: the file cannot be opened",
            "Check the files' permissions.",
        ),
        listed(
            "empty_class_folders",
            "warning",
            layout.empty_classes,
            "no images in the folder",
            "Add images or remove the folders.",
        ),
    ]
    findings.append(_same_subfolders(layout) or _merged_subfolders(layout))
    findings += _splits_without_classes(layout)
    return [finding for finding in findings if finding is not None]


def _folder_findings(layout: Layout) -> list[Finding | None]:
    """Folders and links whose images are left out."""
    return [
        listed(
            "classes_left_out",
            "error",
            _left_out_classes(layout),
            "all images of these classes were left out, so that the classes are missing",
            "Bring their images into a format that is read.",
        ),
        listed(
            "folders_beside_splits",
            "warning",
            [f"{folder}: {number} images" for folder, number in layout.beside_splits.items()],
            "left out: not the folder of a split, and it holds images",
            "Name the splits' folders train, valid and test.",
        ),
        listed(
            "broken_links",
            "warning",
            layout.broken_links,
            "left out: the link's target is gone",
            "Restore the targets or remove the links.",
        ),
    ]


def _is_table_of_images(name: str) -> bool:
    return "/" not in name and is_table_name(name) and Path(name).stem.lower() in _TABLES


def _left_out_images(layout: Layout) -> Iterator[Finding | None]:
    """Images that are in no split, by reason, with their formats."""
    for rule, reason, why, advice in (
        (
            "formats_not_read",
            "format",
            why_not_read(layout.left_out),
            "Save them as JPEG or PNG, or install what reads them.",
        ),
        (
            "images_outside_classes",
            "place",
            "in no class folder",
            "Put each into the folder of its class, train/CLASS/… for example.",
        ),
        (
            "images_without_ending",
            "ending",
            "called like no image",
            "Rename them, to end in .jpg or .png for example.",
        ),
    ):
        files = [file for file in layout.left_out if file.reason == reason]
        yield listed(
            rule,
            "warning",
            [file.path for file in files],
            f"images left out: {left_out_formats(files)}, {why}",
            advice,
        )


def _bad_rows(layout: Layout) -> Iterator[Finding | None]:
    """Rows of a table that name no usable image, and classes that a map names in vain."""
    for rule, rows in layout.bad_rows.items():
        yield listed(
            rule,
            "warning",
            rows,
            f"left out: {BAD_ROWS[rule]}",
            "Correct the rows; data.on_bad_image: fail refuses them instead.",
        )
    yield listed(
        "repeated_rows",
        "info",
        layout.repeated_rows,
        "rows that say the same of one image; it counts once",
        "Nothing to do.",
    )
    yield listed(
        "unknown_classes",
        "warning",
        layout.unknown_classes,
        "data.classes names classes that no image has",
        "Compare their spelling with the classes that `prepare` lists.",
    )


def _left_out_classes(layout: Layout) -> list[str]:
    """Class folders all of whose images were left out, where no other split has the class."""
    learned = {file.class_name for file in layout.files}
    return [folder for folder in layout.left_out_classes if Path(folder).name not in learned]


def _splits_without_classes(layout: Layout) -> list[Finding]:
    """What becomes of validation and test where their folders give no images."""
    given = {file.split for file in layout.files}
    given = given if given == {None} else {split or "train" for split in given}
    folders = {split: folder for folder, split in layout.split_folders.items()}
    found = []
    for split, instead in (
        ("validation", "10 % of train, of each class, are used for validation"),
        ("test", "there is nothing to test on"),
    ):
        if "train" not in given or split in given:
            continue
        if split in folders:
            found.append(
                Finding(
                    rule="split_without_classes",
                    severity="warning",
                    evidence=f"{folders[split]} holds no images in class folders: {instead}",
                    advice=f"Sort its images into {folders[split]}/CLASS/….",
                )
            )
        elif split == "validation":
            found.append(
                Finding(
                    rule="no_validation_folder",
                    severity="info",
                    evidence=f"no images are given for validation: {instead}"
                    if layout.table
                    else f"there is no validation folder: {instead}",
                    advice="Nothing to do; add a valid folder to choose the images yourself.",
                )
            )
    return found


def _same_subfolders(layout: Layout) -> Finding | None:
    """Every class folder holds the same folders: then those are the classes, most often."""
    names, *others = layout.class_folders.values() or ([],)
    if len(names) < 2 or any(other != names for other in others):
        return None
    return Finding(
        rule="same_subfolders_in_every_class",
        severity="warning",
        evidence=(
            f"every class folder ({_some(list(layout.class_folders))}) holds the same folders "
            f"({_some(names)}), whose images are taken together"
        ),
        advice=(
            "If those are the classes, name the folders above them train, valid and test, or look "
            "at one of these alone."
        ),
    )


def _merged_subfolders(layout: Layout) -> Finding | None:
    merged = [
        f"{folder}: {_some(names)}"
        for folder, names in layout.class_folders.items()
        if len(names) > 1
    ]
    return listed(
        "merged_subfolders",
        "warning",
        merged,
        "the folders in a class folder are taken together as one class",
        "If they are classes of their own, put them beside the others.",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


# The built-in data set: scikit-learn's 1,797 handwritten digits as images.


# Part of the folder's name: another way of drawing them is another data set.
_VERSION = 1
_SIDE = 32  # pixels; the originals are 8 x 8, drawn four times as large
_FOLDERS = (("valid", 0.1), ("test", 0.1))


def write_digits(cache: Path) -> Path:
    """Write the digits once, as train/, valid/ and test/ with a folder for each of "0" to "9".

    A tenth of each digit is for validation and a tenth for the test, chosen by content.

    Returns:
        The folder; calls at the same time, in other processes too, end with the same one.

    Raises:
        DataError: the cache cannot be written.
    """
    target = cache / "datasets" / f"digits-{_VERSION}"
    if target.is_dir():
        return target
    with whole_folder(target) as folder:
        _write(folder)
    return target


def _write(folder: Path) -> None:
    from sklearn.datasets import load_digits  # a second to import, needed once

    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0 to 16
    for digit in range(10):
        indices = [int(i) for i in np.flatnonzero(digits.target == digit)]
        # By content, not by order: neighbours in the original were written by the same person.
        indices.sort(key=lambda i: hashlib.sha256(levels[i].tobytes()).digest())
        for name, members in _split(indices).items():
            place = folder / name / str(digit)
            place.mkdir(parents=True)
            for index in members:
                image = Image.fromarray(levels[index])
                image = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
                image.save(place / f"{index:04}.png")


def _split(indices: list[int]) -> dict[str, list[int]]:
    parts, start = {}, 0
    for name, fraction in _FOLDERS:
        end = start + round(fraction * len(indices))
        parts[name] = indices[start:end]
        start = end
    return {"train": indices[start:], **parts}


# `data.source` -> a local folder: a folder, an archive, either on S3, a URL, or the digits.
#
# What is downloaded or unpacked lies under the cache and is used again by the next call.


_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def fetch_source(
    source: str,
    *,
    cache: Path,
    sha256: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    images_progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Bring a data source onto this machine.

    Args:
        source: a folder, a table beside or above the images that it names, the path or http(s) URL
            of a zip or tar archive or of a table, an `s3://BUCKET/KEY` of any of them, or `digits`.
        cache: where archives are unpacked and downloads are kept.
        sha256: what the archive or the table at a URL must hash to, hexadecimal.
        columns: how a table at a URL calls its columns.
        progress: called with (bytes so far, bytes in all; 0 if the server does not say).
        images_progress: the same in images, of a table at a URL.
        note: told when S3 does not answer and is asked again.

    Returns:
        A folder or a table for `load_dataset`.

    Raises:
        DataError: the source does not exist, is of an unknown kind, or is a damaged archive.
        DownloadError: the download did not end, or its content is not what `sha256` promises.
        ServingError: S3 cannot be reached.
    """
    scheme = _SCHEME.match(source)
    if scheme:
        _refuse_hidden_secret(source)
    if source == "digits" and not Path(source).is_dir():
        return write_digits(cache)
    if is_web_table(source):
        return fetch_table(
            source,
            columns=columns or {},
            cache=cache,
            sha256=sha256,
            progress=images_progress,
            note=note,
        )
    kind = scheme[1].lower() if scheme else ""
    if kind in ("http", "https"):
        return _fetch_url(source, cache, sha256, progress)
    if kind == "s3":
        return _fetch_s3(source, cache, sha256, progress, note)
    if kind not in ("", "file"):
        raise DataError(_unknown_scheme(source, kind))
    path = local_path(source) if kind else source
    return _open_path(Path(path).expanduser(), cache, sha256)


def _refuse_hidden_secret(address: str) -> None:
    if HIDDEN in address:
        raise DataError(
            f"{address} is an address whose secret was left out where it was written down. Give "
            "the whole one with --data."
        )


def source_address(source: str) -> str:
    """The address of a remote source's folder, with a slash at its end.

    Nothing for an archive and for what lies on this machine.
    """
    if source.lower().startswith("s3://") and not is_archive_name(source):
        folder = source.rpartition("/")[0] if is_table_name(source) else source.rstrip("/")
        return f"{folder}/"
    return folder_address(source) if is_web_table(source) else ""


def _fetch_url(
    url: str, cache: Path, sha256: str | None, progress: Callable[[int, int], None] | None
) -> Path:
    archive = download(url, cache / "downloads", sha256=sha256, progress=progress)
    folder = cache / "archives" / _folder_name(archive.path.name, archive.sha256)
    if not folder.is_dir() and file_digest(archive.path) != archive.sha256:
        archive.path.unlink()  # not what came: damaged since, and a tar would not show it
        return _fetch_url(url, cache, sha256, progress)
    return extract(archive.path, folder)


def _fetch_s3(
    uri: str,
    cache: Path,
    sha256: str | None,
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None] | None,
) -> Path:
    """What lies on S3, here; of what was here already only what changed comes.

    A table comes with all that lies beside it.
    """
    from visiontuner.io.s3 import WholeCopy, download_file, download_folder

    if is_table_name(uri):
        beside, _, table = uri.rpartition("/")
        return _fetch_s3(beside, cache, sha256, progress, note) / table
    bucket, key = split_uri(uri)
    name = key.rstrip("/").rpartition("/")[2]
    place = cache / "s3" / hashlib.sha256(f"{bucket}/{key.rstrip('/')}".encode()).hexdigest()[:16]
    with locked(place):
        memory = place / ".memory.json"
        if is_archive_name(name):
            with WholeCopy(place / name, note):
                download_file(uri, place, memory=memory, progress=progress, note=note)
            return _open_path(place / name, cache, sha256)
        folder = place / (name or bucket)
        with WholeCopy(folder, note):
            moved = download_folder(
                uri, folder, memory=memory, mirror=True, progress=progress, note=note
            )
            if not moved.files + moved.skipped:
                command = next_command("prepare", "--data", "FOLDER", "--upload", uri)
                raise DataError(
                    f"There is nothing at {uri}. Look with `aws s3 ls s3://{bucket}/`, or bring "
                    f"images there: `{command}`."
                )
    return folder


def _open_path(path: Path, cache: Path, sha256: str | None) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_file() and is_table_name(path.name):
        return path
    if not path.is_file() or not is_archive_name(path.name):
        raise DataError(
            f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}), nor a "
            f"table ({', '.join(TABLE_SUFFIXES)})."
        )
    digest = file_digest(path)
    if sha256 is not None and digest != sha256.lower():
        raise DataError(f"{path} has SHA-256 {digest}, not {sha256.lower()} as data.sha256 says.")
    return extract(path, cache / "archives" / _folder_name(path.name, digest))


def _folder_name(name: str, key: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name.split(".")[0])[:40]
    # 2: folders without it may hold names that were read as cp437 whatever they were.
    return f"{stem or 'archive'}-{key[:16]}-2"


def _unknown_scheme(source: str, scheme: str) -> str:
    near = difflib.get_close_matches(scheme, ["http", "https", "file", "s3"], n=1)
    hint = f" Did you mean {near[0]}://?" if near else ""
    return (
        f"{without_secrets(source)} has an unknown scheme.{hint} Use a folder, a table, an "
        "archive, http(s)://, s3:// or digits."
    )


def _missing(path: Path) -> str:
    near = difflib.get_close_matches(str(path), ["digits"], n=1)
    parent = path.parent
    if not near and parent.is_dir():
        names = [
            p.name
            for p in parent.iterdir()
            if p.is_dir() or is_archive_name(p.name) or is_table_name(p.name)
        ]
        near = [str(parent / n) for n in difflib.get_close_matches(path.name, names, n=2)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"There is no data at {path}.{hint} "
        "data.source is a folder, a table, an archive (path or URL), s3://BUCKET/FOLDER or digits."
    )


# A folder of images -> `ImageDataset`: files, labels, class names, splits and one digest.
#
# An image's split, where the folders leave it open, follows from the hashes of the contents in its
# class: the same content never lands in two splits, and each class has its share in every split.


SPLITS = ("train", "validation", "test")

SplitRule = Literal["stratified", "hashed"]
"""How images are split that no folder sorts: shares met in each class, or only on average."""

_SHARE = 10  # one in ten is for validation, and one in ten for the test
_VALIDATION_FROM = 0.9  # of train, where there is no validation folder
_WHOLE_SET = (("train", 0.8), ("validation", 0.9), ("test", 1.0))


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set."""

    path: str  # posix, relative to the data set's root
    label: int  # index into class_names
    digest: str  # SHA-256 of the file's content, hexadecimal
    group: str | None = None  # images of one group are in one split


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Images with labels in three splits.

    Args:
        root: the folder that the paths are relative to.
        class_names: sorted; a label is an index into it, the same in every split.
        splits: samples by split name, all three of `SPLITS`; test may be empty.
        digest: SHA-256 over names, paths, labels, splits and contents, hexadecimal.
        findings: what was noticed without decoding an image.
        own_validation: whether the user says which images are for validation.
        described: what was found where, in a few words.
        saved_in: the folder of a saved data set, whose images were extracted to `root`.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Sample, ...]]
    digest: str
    findings: tuple[Finding, ...]
    own_validation: bool = False
    described: str = ""
    saved_in: Path | None = None

    def counts(self, split: str) -> list[int]:
        """Images of each class in a split, in the order of `class_names`."""
        counts = Counter(sample.label for sample in self.splits[split])
        return [counts[label] for label in range(len(self.class_names))]

    def with_validation_in_train(self) -> ImageDataset:
        """The same images, with those of validation in train as well as where they are."""
        train = sorted((*self.splits["train"], *self.splits["validation"]), key=lambda s: s.path)
        splits = {**self.splits, "train": tuple(train)}
        return replace(self, splits=splits, digest=_digest(self.class_names, splits))

    def without(self, paths: Collection[str], why: str) -> ImageDataset:
        """Without some images: another digest, and what their classes lack is found anew.

        Args:
            why: the end of the clause in `described`, after their number.

        Raises:
            DataError: no training or no validation image is left.
        """
        splits = {
            name: tuple(sample for sample in samples if sample.path not in paths)
            for name, samples in self.splits.items()
        }
        for name in ("train", "validation"):
            if not splits[name]:
                every = f"all {len(self.splits[name]):,}"
                raise DataError(
                    f"{self.root} has no images left for {name}: {every} are left out, {why}. "
                    "Split the images anew."
                )
        gone = sum(map(len, self.splits.values())) - sum(map(len, splits.values()))
        reduced = replace(
            self,
            splits=splits,
            digest=_digest(self.class_names, splits),
            described=f"{self.described}; without {gone:,}, {why}",
        )
        known = {finding.rule for finding in _class_findings(self)}
        others = tuple(finding for finding in self.findings if finding.rule not in known)
        return replace(reduced, findings=(*others, *_class_findings(reduced)))


def load_dataset(
    root: Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    labels: Path | None = None,
    classes: Path | None = None,
    group: str | None = None,
    split: SplitRule = "stratified",
    limit_per_class: int | None = None,
    on_bad_image: Literal["skip", "fail"] = "skip",
    address: str = "",
    cache: Path,
    extract_into: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageDataset:
    """Read a folder of images, or the table that names them.

    Args:
        root: train/, valid/, test/ with class folders, or class folders (then split 80/10/10), or a
            table with the columns path and label, or what Hugging Face's `save_to_disk` writes.
        columns: how a table calls its columns path, label, split and group.
        labels: a table of single images' labels; those without one are left out.
        classes: a table of classes and what becomes of them.
        group: a pattern of file names: images for which it matches the same are in one split.
        split: how images are split that nothing else sorts.
        limit_per_class: at most so many images of a class in each split, always the same ones.
        on_bad_image: whether rows of a table that name no usable image are left out or refused.
        address: of the folder on S3 or on the web, with a slash at its end: rows may hold whole
            addresses of images below it.
        cache: where content digests are remembered, so that a second look reads no image.
        extract_into: where images are written that a saved data set holds; the cache if None.
        progress: called with (files read, files to read).

    Raises:
        DataError: there is nothing to train on; the message says what was found instead.
    """
    layout = _find_layout(root, columns, address, cache, extract_into or cache, progress)
    _refine(layout, labels, classes, group)
    if on_bad_image == "fail":
        _refuse_bad_rows(layout)
    digests = content_digests(layout.root, layout.files, cache=cache, progress=progress)
    class_names = tuple(sorted({file.class_name for file in layout.files}))
    splits = _make_splits(layout.files, class_names, digests, split)
    if limit_per_class is not None:
        splits = {name: _limit(samples, limit_per_class) for name, samples in splits.items()}
    _check_splits(layout, splits)
    unreadable = [path for path, digest in digests.items() if not isinstance(digest, str)]
    return _to_dataset(root, layout, class_names, splits, unreadable)


def _to_dataset(
    root: Path,
    layout: Layout,
    class_names: tuple[str, ...],
    splits: dict[str, tuple[Sample, ...]],
    unreadable: Sequence[str],
) -> ImageDataset:
    dataset = ImageDataset(
        root=layout.root,
        class_names=class_names,
        splits=splits,
        digest=_digest(class_names, splits),
        findings=(),
        own_validation=any(file.split == "validation" for file in layout.files),
        described=_described(root, layout),
        saved_in=layout.saved_in,
    )
    findings = (
        *archive_findings(root),
        *layout_findings(layout, unreadable),
        *_class_findings(dataset),
        *_group_findings(dataset, {file.split for file in layout.files}),
    )
    return replace(dataset, findings=findings)


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images with labels, whatever splits they lie in.

    Args:
        root: the folder that the paths are relative to.
        class_names: sorted; a label is an index into it.
        samples: sorted by path.
        unreadable: paths of files that cannot be opened.
        described: what was found where, in a few words.
    """

    root: Path
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    unreadable: tuple[str, ...]
    described: str


def load_labelled_images(
    root: Path,
    *,
    classes: Path | None = None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> LabelledImages:
    """Read all images of a folder, or of a table, that nothing is to be trained on.

    One class is enough.

    Args: as of `load_dataset`.

    Raises:
        DataError: there are no labelled images; the message says what was found instead.
    """
    try:
        layout = _find_layout(root, None, "", cache, cache, progress)
    except _OneClass as one:
        layout = one.layout
    with suppress(_OneClass):
        _refine(layout, None, classes, None)
    digests = content_digests(layout.root, layout.files, cache=cache, progress=progress)
    class_names = tuple(sorted({file.class_name for file in layout.files}))
    labels = {name: label for label, name in enumerate(class_names)}
    samples = [
        Sample(file.path, labels[file.class_name], digest, file.group)
        for file in layout.files
        if isinstance(digest := digests[file.path], str)
    ]
    return LabelledImages(
        root=layout.root,
        class_names=class_names,
        samples=tuple(sorted(samples, key=lambda sample: sample.path)),
        unreadable=tuple(path for path, d in digests.items() if not isinstance(d, str)),
        described=_described(root, layout),
    )


def _find_layout(
    root: Path,
    columns: Mapping[str, str | None] | None,
    address: str,
    cache: Path,
    into: Path,
    progress: Callable[[int, int], None] | None,
) -> Layout:
    """What a source holds: a saved data set, a table or a folder."""
    saved = find_saved(root) if root.is_dir() else None
    if saved is not None:
        return _read_saved(saved, columns or {}, cache=cache, into=into, progress=progress)
    if is_table_name(root.name) and root.is_file():
        return read_table_layout(root, columns, address)
    try:
        return read_layout(root)
    except DataError:
        layout = find_table_layout(root, columns, address) if root.is_dir() else None
        if layout is None:
            raise
        return layout


def _read_saved(
    saved: SavedFolder,
    columns: Mapping[str, str | None],
    *,
    cache: Path,
    into: Path,
    progress: Callable[[int, int], None] | None,
) -> Layout:
    """The images of a data set that Hugging Face's library saved, as files."""
    table = extract_saved(saved, columns, cache=cache, into=into, progress=progress)
    layout = _table_layout(table.parent, "", saved.folder.name)
    layout.saved_in = saved.folder
    layout.notes.append("saved by Hugging Face's datasets")
    _add_table(layout, table, {**columns, "path": "path", "label": "label"})
    if "" not in saved.splits:
        layout.notes.remove("splits in column `split`")  # it is ours
    _check(layout)
    return layout


def _refine(layout: Layout, labels: Path | None, classes: Path | None, group: str | None) -> None:
    """What the experiment says of the files beyond where they lie."""
    if labels is not None:
        before = layout.files
        layout.files, unknown = override_labels(before, read_table(labels))
        if unknown:
            layout.bad_rows["labels_without_image"] = unknown
        changed = sum(a.class_name != b.class_name for a, b in _same_paths(before, layout.files))
        dropped = len(before) - len(layout.files)
        layout.notes.append(
            f"{labels.name} changes {changed:,} labels and drops {dropped:,} images"
        )
    if classes is not None:
        layout.files, layout.unknown_classes = rename_classes(layout.files, read_class_map(classes))
        layout.notes.append(f"classes after {classes.name}")
    if group is not None:
        if any(file.group for file in layout.files):
            raise DataError(
                f"{layout.table} has a column of groups, and data.group is given too: leave out "
                "data.group, or that column."
            )
        layout.files = group_files(layout.files, group)
        layout.notes.append(f"groups by `{group}`")
    used = {path.name for path in (labels, classes) if path and path.parent == layout.root}
    layout.ignored = [name for name in layout.ignored if name not in used]
    _check(layout)


def _same_paths(
    before: Iterable[ImageFile], after: Iterable[ImageFile]
) -> Iterator[tuple[ImageFile, ImageFile]]:
    kept = {file.path: file for file in after}
    return ((file, kept[file.path]) for file in before if file.path in kept)


def _refuse_bad_rows(layout: Layout) -> None:
    for rule, rows in layout.bad_rows.items():
        more = f", and {len(rows) - 1:,} more such rows" if len(rows) > 1 else ""
        table = "data.labels" if rule == "labels_without_image" else layout.table
        raise DataError(
            f"{table}: {rows[0]}: {BAD_ROWS[rule]}{more}. Correct them, or leave them out with "
            "data.on_bad_image: skip."
        )


def _described(root: Path, layout: Layout) -> str:
    """What was found, in a few words: `labels.csv: 2,100 images, 30 classes, groups in …`."""
    classes = len({file.class_name for file in layout.files})
    notes = [f"{len(layout.files):,} images", f"{classes:,} classes", *layout.notes]
    return f"{layout.table or root.name}: {', '.join(notes)}"


def _make_splits(
    files: Iterable[ImageFile],
    class_names: Sequence[str],
    digests: Mapping[str, str | OSError],
    rule: SplitRule,
) -> dict[str, tuple[Sample, ...]]:
    labels = {name: label for label, name in enumerate(class_names)}
    given: dict[Sample, str | None] = {}
    for file in files:
        digest = digests[file.path]
        if isinstance(digest, str):
            sample = Sample(file.path, labels[file.class_name], digest, file.group)
            given[sample] = file.split
    splits: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for sample, name in _fill_splits(given, rule).items():
        splits[name].append(sample)
    _refuse_groups_in_two_splits(splits)
    return {name: tuple(sorted(s, key=lambda x: x.path)) for name, s in splits.items()}


def _refuse_groups_in_two_splits(splits: Mapping[str, Iterable[Sample]]) -> None:
    """Where folders or a column name the splits, and groups reach across them."""
    seen: dict[str, dict[str, Sample]] = defaultdict(dict)
    for split, samples in splits.items():
        for sample in samples:
            if sample.group is not None:
                seen[sample.group][split] = sample
    torn = {group: places for group, places in seen.items() if len(places) > 1}
    for group, places in torn.items():
        examples = " and ".join(f"{split} ({s.path})" for split, s in places.items())
        more = f"; so are {len(torn) - 1:,} more groups" if len(torn) > 1 else ""
        raise DataError(
            f"The group {printable(group)} is in {examples}{more}. Leave the given splits out, so "
            "that groups are split whole, or leave the groups out."
        )


def _fill_splits(given: Mapping[Sample, str | None], rule: SplitRule) -> dict[Sample, str]:
    """The split of each image, where the folders name one or not."""
    named = set(given.values())
    if "validation" in named:
        return {sample: split or "train" for sample, split in given.items()}
    filled = {sample: split for sample, split in given.items() if split not in (None, "train")}
    units: dict[str, list[Sample]] = defaultdict(list)
    unit_of = find_units(given)
    for sample in given:
        if sample not in filled:
            units[unit_of(sample)].append(sample)
    divide = _stratify if rule == "stratified" else _hash
    for unit, split in divide(units, without_test=named != {None}).items():
        filled.update(dict.fromkeys(units[unit], split))
    return filled


def find_units(samples: Iterable[Sample]) -> Callable[[Sample], str]:
    """Tells which images go together, by a hash: of their group, or else of their content.

    Images of one group go together, and copies of one content: two groups that share a content are
    one unit, with the smaller hash.
    """
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while (parent := above.get(key, key)) != key:
            above[key] = above.get(parent, parent)
            key = parent
        return key

    for sample in samples:
        if sample.group is None:
            continue
        own, known = top(_hash_of(sample.group)), top(sample.digest)
        if known == sample.digest:
            above[known] = own
        elif known != own:
            above[max(known, own)] = min(known, own)
    return lambda sample: top(sample.digest)


def _hash_of(group: str) -> str:
    return hashlib.sha256(f"group {group}".encode(errors="surrogateescape")).hexdigest()


def _stratify(units: Mapping[str, Sequence[Sample]], *, without_test: bool) -> dict[str, str]:
    """The split of each unit: of a class, by hash, the first tenth to validation, the last to test.

    A tenth is rounded, a half up. A unit counts for the class that most of its images have.
    Train lies between the two, so that an image that is added moves none from one to the other.
    """
    classes: dict[int, list[str]] = defaultdict(list)
    for unit, samples in units.items():
        counts = Counter(sample.label for sample in samples)
        classes[min(counts, key=lambda label: (-counts[label], label))].append(unit)
    splits = dict.fromkeys(units, "train")
    for members in classes.values():
        members.sort()
        share = (len(members) + _SHARE // 2) // _SHARE
        splits.update(dict.fromkeys(members[:share], "validation"))
        if not without_test:
            splits.update(dict.fromkeys(members[len(members) - share :], "test"))
    return splits


def _hash(units: Mapping[str, Sequence[Sample]], *, without_test: bool) -> dict[str, str]:
    """The split of each unit, which depends on no other: shares are met on average alone."""
    ends = (("train", _VALIDATION_FROM), ("validation", 1.0)) if without_test else _WHOLE_SET
    positions = {unit: int(unit[:8], 16) / 2**32 for unit in units}  # uniform in [0, 1)
    return {
        unit: next(name for name, end in ends if position < end)
        for unit, position in positions.items()
    }


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
            groups = {file.group for file in layout.files} - {None}
            whole = f" Each of the {len(groups):,} groups is in one split." if groups else ""
            raise DataError(
                f"{layout.saved_in or layout.root} has {total} image files, and none of them is "
                f"for {name}.{whole} Add images, or sort them into splits yourself. {LAYOUTS}"
            )


def unreadable_image(sample: Sample, reason: str) -> Finding:
    """A finding about an image that was left out; `reason` is what `BadImageError` says."""
    # "Cannot read /the/root/a/1.png: why." names the file already.
    _, named, why = reason.rpartition(sample.path)
    return Finding(
        rule="unreadable_image",
        severity="warning",
        evidence=f"Cannot read {sample.path}{why if named else f': {reason}'}",
        advice="Repair or delete the file; it was left out.",
    )


def few_levels(paths: Sequence[str]) -> ListedFinding | None:
    """A finding about images that are nearly black, white or of one shade of gray."""
    return listed(
        "few_levels",
        "warning",
        paths,
        "nearly black, white or of one shade: they use fewer than 20 of 256 levels",
        "Look at them. 12 bits in a file of 16 need a header that says so (BitsPerSample, sBIT); "
        "or convert them to 8 bits.",
    )


class NoneReadable(DataError):
    """No image of a split can be read.

    Args:
        first: what is wrong with one of them, without a full stop.
    """

    def __init__(self, split: str, first: str) -> None:
        super().__init__(
            f"None of the {split} images can be read: {first}. "
            "`visiontuner prepare --all --data DATA` lists what is wrong with each."
        )
        self.first = first


def none_readable(split: str, findings: Sequence[Finding]) -> NoneReadable:
    """What is said of a split whose images are all in `findings`."""
    return NoneReadable(split, findings[-1].evidence.rstrip("."))


_MANY_UNREADABLE = 0.2  # of a class's images in a split


def find_emptied_classes(
    dataset: ImageDataset, readable: Mapping[str, Collection[int]]
) -> list[Finding]:
    """Classes that have images in a split of which none, or much fewer, can be read.

    Args:
        readable: by split, the label of each image that can be.
    """
    found = []
    for split, labels in readable.items():
        left = Counter(labels)
        found += [_emptied(dataset, split, left), _thinned(dataset, split, left)]
    return [finding for finding in found if finding is not None]


def _emptied(dataset: ImageDataset, split: str, left: Collection[int]) -> Finding | None:
    counted = enumerate(zip(dataset.class_names, dataset.counts(split), strict=True))
    names = [name for label, (name, count) in counted if count and label not in left]
    return listed(
        "classes_without_readable_images",
        "error" if split == "train" else "warning",
        names,
        f"none of their {split} images can be read",
        "Repair or replace them: a class without training images cannot be learned, one without "
        "others is not measured.",
    )


def _thinned(dataset: ImageDataset, split: str, left: Mapping[int, int]) -> Finding | None:
    counted = enumerate(zip(dataset.class_names, dataset.counts(split), strict=True))
    names = [
        f"class {name}: {count - left[label]} of {count}"
        for label, (name, count) in counted
        if left.get(label) and count - left[label] >= max(2, _MANY_UNREADABLE * count)
    ]
    return listed(
        "classes_with_many_unreadable_images",
        "warning",
        names,
        f"a fifth or more of their {split} images cannot be read",
        "Repair or replace them: what cannot be read is left out of this class alone.",
    )


def _group_findings(dataset: ImageDataset, given: Collection[str | None]) -> list[Finding]:
    """How many images share a group, and where whole groups leave a split far from its share.

    Args:
        given: the splits that folders or a table name.
    """
    samples = [sample for split in SPLITS for sample in dataset.splits[split]]
    sizes = Counter(sample.group for sample in samples if sample.group is not None)
    if not sizes:
        return []
    shared = sum(size for size in sizes.values() if size > 1)
    alone = len(samples) - sum(sizes.values())
    (largest, most), *_ = sizes.most_common(1)
    findings = [
        Finding(
            rule="groups",
            severity="info",
            evidence=f"{shared:,} of {len(samples):,} images share a group with others: "
            f"{len(sizes):,} groups, the largest {printable(largest)} with {most:,}; {alone:,} "
            "images are in none",
            advice="Nothing to do: each group is in one split. What is measured is how well new "
            "groups are told.",
        )
    ]
    ours = {"validation"} - {*given} | ({"test"} if {*given} == {None} else set())
    for split in sorted(ours, reverse=True):
        share = len(dataset.splits[split]) / len(samples)
        if dataset.splits[split] and not 0.5 / _SHARE <= share <= 2 / _SHARE:
            findings.append(
                Finding(
                    rule="groups_of_unequal_size",
                    severity="warning",
                    evidence=f"{split} holds {share:.0%} of the images, since groups are split "
                    "whole and counted as one each",
                    advice="Give smaller groups, or name the splits yourself.",
                )
            )
    return findings


def _class_findings(dataset: ImageDataset) -> list[Finding]:
    findings = [
        listed(
            "missing_classes",
            "warning",
            _classes_with(dataset, split, 0),
            f"no images in {split}",
            f"Add images of them to {split}; until then they are not measured there.",
        )
        for split in ("validation", "test")
        if dataset.splits[split]
    ]
    findings += [
        listed(
            "class_names_alike",
            "warning",
            _alike(dataset.class_names),
            "names that differ in capitals, blanks or invisible characters alone are classes of "
            "their own",
            "If they mean the same, write them the same, or merge them with data.classes.",
        ),
        listed(
            "classes_without_training_images",
            "error",
            _classes_with(dataset, "train", 0),
            "classes that cannot be learned",
            "Add images of them to train, or remove the classes.",
        ),
        listed(
            "classes_with_one_training_image",
            "warning",
            _classes_with(dataset, "train", 1),
            "one image is too few to learn a class from",
            "Add images of them to train.",
        ),
    ]
    return [finding for finding in findings if finding is not None]


def _alike(names: Sequence[str]) -> list[str]:
    """Names that a reader takes for the same, together: `Cat and cat`."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spellings[_as_seen(name)].append(name)
    return [" and ".join(map(_seen_apart, same)) for same in spellings.values() if len(same) > 1]


def _as_seen(name: str) -> str:
    """A name in small letters, without what cannot be seen, with one blank for many."""
    text = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _seen_apart(name: str) -> str:
    hidden = any(unicodedata.category(letter) in ("Cf", "Zs") for letter in name.replace(" ", ""))
    return ascii(name) if hidden else name


def _classes_with(dataset: ImageDataset, split: str, number: int) -> list[str]:
    counts = dataset.counts(split)
    return [n for n, count in zip(dataset.class_names, counts, strict=True) if count == number]
