"""Tables of labels: which image is of which class, and perhaps in which split and group.

CSV (with commas, semicolons, tabs or bars), JSON lines and Parquet. A table that cannot be read is
refused in one line; rows that name no usable image are counted and listed.
"""

from __future__ import annotations

import csv
import json
import math
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import SplitResult, unquote, urlsplit

import pyarrow.parquet as parquet

from visiontuner.data.images import image_extensions
from visiontuner.errors import DataError
from visiontuner.io.files import ImageFile, file_state
from visiontuner.text import csv_text, printable, without_secrets

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def is_table_name(name: str) -> bool:
    """Whether a file's name, or the last part of an address, is that of a table."""
    return name.lower().endswith(TABLE_SUFFIXES)


# The words that people have for splits, as folders or in a column.


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


@cache
def split_named(word: str) -> str | None:
    """The split that a folder's name or a cell of a table stands for, if it is any's."""
    words = [part for part in re.split(r"[\W_]+", word.lower()) if part and part not in _FILLERS]
    return _SPLIT_WORDS.get(words[0].removesuffix("set")) if len(words) == 1 else None


# A file -> its rows, as text. Every reader asks `choose` once, with the header.


_IMAGE_COLUMNS = {
    "path": ("path", "file_name", "filename", "file", "image", "image_id", "id"),
    "label": ("label", "class", "category", "target"),
    "split": ("split",),
    "group": ("group",),
}
_CLASS_COLUMNS = {"class": ("class",), "becomes": ("becomes",)}
_DELIMITERS = ",;\t|"
_NAMED = 8
_NAME_LENGTH = 40  # of a column that is named in a message
# How files begin that are called .csv and are something else.
_NO_TEXT = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"PK\x03\x04", "a zip file, or an Excel workbook"),
    (b"\x1f\x8b", "a gzip file"),
)

Choose = Callable[[Sequence[str]], dict[str, int]]
Columns = tuple[list[int], dict[str, list[Any]]]  # line numbers, and values by what they are


class Row(NamedTuple):
    """One row; `split` and `group` are empty where the table has no such column."""

    line: int  # of the file, or the number of the row in Parquet
    path: str
    label: str
    split: str
    group: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a table, and which of its columns is what."""

    path: Path
    columns: Mapping[str, str]
    rows: Sequence[Row]


def read_table(path: Path, columns: Mapping[str, str | None] | None = None) -> Table:
    """Read which image has which label.

    Args:
        columns: the names of the columns path, label, split and group, where they are called
            otherwise than people usually call them.

    Raises:
        DataError: the file is no table of images, in one line that says what to change.
    """
    given = {role: name for role, name in (columns or {}).items() if name}
    found: dict[str, str] = {}

    def choose(header: Sequence[str]) -> dict[str, int]:
        chosen = _choose(path, header, _IMAGE_COLUMNS, given, optional=("split", "group"))
        found.update({role: header[index] for role, index in chosen.items()})
        return chosen

    lines, cells = _read(path, choose)
    if not lines:
        raise DataError(f"{path} has a header and no rows.")
    empty = [""] * len(lines)
    # Tables from Windows have backslashes.
    paths = [text.replace("\\", "/") for text in cells["path"]]
    others = (cells.get(role, empty) for role in ("label", "split", "group"))
    return Table(path=path, columns=found, rows=list(map(Row, lines, paths, *others)))


def read_class_map(path: Path) -> dict[str, str]:
    """Class -> the name that it gets, empty to leave it out.

    Raises:
        DataError: the file is no table with the columns class and becomes, or names a class twice.
    """
    lines, cells = _read(path, lambda header: _choose(path, header, _CLASS_COLUMNS))
    names: dict[str, str] = {}
    for line, name, becomes in zip(lines, cells["class"], cells["becomes"], strict=True):
        if not name or name in names:
            twice = f"the class {name} a second time" if name else "no class"
            raise DataError(f"{path}, line {line}: {twice}. Each class has one row.")
        names[name] = becomes
    return names


def _read(path: Path, choose: Choose) -> tuple[list[int], dict[str, list[str]]]:
    """The line numbers of the rows, and the cells of each column as text."""
    readers = {".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".parquet": _read_parquet}
    try:
        lines, columns = readers.get(path.suffix.lower(), _read_csv)(path, choose)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(_not_utf8(path, f"byte {byte:#04x}")) from None
    return lines, {role: _texts(path, lines, role, column) for role, column in columns.items()}


def _open_text(path: Path) -> TextIO:
    with path.open("rb") as file:
        begins = file.read(256)
    known = next((what for start, what in _NO_TEXT if begins.startswith(start)), None)
    if known or b"\0" in begins:
        raise DataError(_not_utf8(path, known or "it holds NUL"))
    return path.open(encoding="utf-8-sig", newline="")


def _not_utf8(path: Path, what: str) -> str:
    return f"{path} is not UTF-8 ({what}): save it again as CSV in UTF-8."


def choose_columns(
    path: Path, header: Sequence[str], roles: Sequence[str], given: Mapping[str, str]
) -> dict[str, int]:
    """Which column of a table is what, by its index.

    Args:
        path: of the table, for messages.
        roles: of path, label, split and group, those that have to be there.
        given: the names of columns that are called otherwise than people usually call them.

    Raises:
        DataError: there is no such column, or there are two.
    """
    return _choose(path, header, {role: _IMAGE_COLUMNS[role] for role in roles}, given)


def _choose(
    path: Path,
    header: Sequence[str],
    known: Mapping[str, Sequence[str]],
    given: Mapping[str, str] | None = None,
    optional: Sequence[str] = (),
) -> dict[str, int]:
    """Which column is what, by its index; `given` are names that the experiment has for some."""
    if any(_ending(name) in image_extensions() for name in header):
        first = ",".join(known)
        raise DataError(
            f"{path} begins with a row ({_names(header)}): its first line has to name the columns, "
            f"`{first.removesuffix(',split,group')}`."
        )
    chosen: dict[str, int] = {}
    for role, names in known.items():
        own = (given or {}).get(role)
        name = own if own in header else None if own else _first_known(names, header)
        if name is None and own:
            raise DataError(
                f"{path} has no column {own!r} (data.columns.{role}): {_names(header)}."
            )
        if name is None and role not in optional:
            how = "" if given is None else f"; name it with data.columns.{role}"
            raise DataError(f"{path} has no column {names[0]!r}, only {_names(header)}{how}.")
        if name is None:
            continue
        if header.count(name) > 1:
            raise DataError(f"{path} has {header.count(name)} columns called {name!r}.")
        chosen[role] = header.index(name)
    return chosen


def _first_known(names: Sequence[str], header: Sequence[str]) -> str | None:
    """The first of some names that a column has, in any capitals if in none as it is written."""
    for name in names:
        if name in header:
            return name
    by_name = {name.casefold(): name for name in reversed(header)}
    return next((by_name[name] for name in names if name in by_name), None)


def _names(header: Sequence[str]) -> str:
    """The first columns, for a message."""
    shown = [
        repr(name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…")
        for name in header[:_NAMED]
    ]
    return ", ".join(shown) + (", …" if len(header) > _NAMED else "")


def _read_csv(path: Path, choose: Choose) -> Columns:
    with _open_text(path) as file:
        first = file.readline()
        if re.fullmatch(r"sep=.\s*", first):  # Excel's word for the delimiter
            delimiter = first[4]
        else:
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        lines, rows = [], []
        try:
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise DataError(f"{path} is empty: a table begins with the names of its columns.")
            chosen = choose(header)
            for row in reader:
                if len(row) == len(header):
                    lines.append(reader.line_num)
                    rows.append(row)
                elif row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, and the first line "
                        f"has {len(header)}. A name with {delimiter!r} in it needs quotes."
                    )
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error} (quotes?).") from None
    return lines, {role: [csv_text(row[index]) for row in rows] for role, index in chosen.items()}


def _read_json_lines(path: Path, choose: Choose) -> Columns:
    lines: list[int] = []
    objects: list[dict[str, object]] = []
    with _open_text(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                raise DataError(f"{path}, line {line} is no JSON.") from None
            if not isinstance(value, dict):
                raise DataError(f'{path}, line {line} is no object such as {{"path": …}}.')
            lines.append(line)
            objects.append(value)
    header = list(dict.fromkeys(name for value in objects for name in value))
    if not header:
        raise DataError(f'{path} is empty: a line of it is an object such as {{"path": …}}.')
    names = {role: header[index] for role, index in choose(header).items()}
    return lines, {role: [value.get(name) for value in objects] for role, name in names.items()}


def _read_parquet(path: Path, choose: Choose) -> Columns:
    try:
        with parquet.ParquetFile(path) as file:
            header = file.schema_arrow.names
            names = {role: header[index] for role, index in choose(header).items()}
            table = file.read(columns=list(names.values()))
    except ValueError as error:  # ArrowInvalid
        raise DataError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from None
    values = {role: table.column(name).to_pylist() for role, name in names.items()}
    return list(range(1, table.num_rows + 1)), values


def _texts(path: Path, lines: Sequence[int], role: str, values: Sequence[Any]) -> list[str]:
    for line, value in zip(lines, values, strict=True):
        if isinstance(value, list | dict | bytes):
            kind = type(value).__name__
            raise DataError(f"{path}, line {line}: the {role} is a {kind}; it has to be text.")
    if role == "path":  # no two are the same, and a file's name is what its bytes say
        return [cell_text(value, as_written=True) for value in values]
    known = {value: cell_text(value) for value in {v for v in values if isinstance(v, str)}}
    return [known[v] if isinstance(v, str) else cell_text(v) for v in values]


def cell_text(value: object, *, as_written: bool = False) -> str:
    """A cell as text; a missing one, and NaN however it is written, is empty.

    Args:
        as_written: the text is not brought to NFC.
    """
    if not isinstance(value, str):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON and Parquet write whole labels as 3.0 where one is missing
    text = str(value).strip()
    if not (as_written or text.isascii()):
        text = unicodedata.normalize("NFC", text)
    return "" if text in ("nan", "NaN") else text


# The rows of a table -> image files.


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """The images that a table names.

    Args:
        bad: rule -> a text for each row that names no usable image.
        repeated: rows that say again what an earlier one said.
    """

    files: list[ImageFile]
    bad: Mapping[str, list[str]]
    repeated: Sequence[str] = field(default=())


BAD_ROWS = {
    "rows_without_path": "the path is empty",
    "rows_outside_the_folder": "the path is absolute, leaves the table's folder by .., or is an "
    "address outside it",
    "rows_without_file": "there is no such file",
    "rows_without_image": "the file's name does not end like that of an image that is read here",
    "rows_without_label": "the label is empty or holds control characters",
    "rows_with_unknown_split": "the split is none of train, validation and test",
    "images_in_two_rows": "two rows say different things of one image",
    "labels_without_image": "data.labels names an image that is not there",
}
"""What is wrong with a row, by the rule of its finding."""


def with_local_paths(table: Table, address: str) -> Table:
    """The table with paths in place of addresses that lie below its own folder.

    Args:
        address: of the folder that the table lies in on S3 or on the web, with a slash at its end.
    """
    rows = [
        row._replace(path=path)
        if "://" in row.path and (path := path_below(address, row.path))
        else row
        for row in table.rows
    ]
    return Table(path=table.path, columns=table.columns, rows=rows)


def path_below(folder: str, address: str) -> str | None:
    """The path of an address relative to a folder's, or None where it does not lie below it.

    On the web both are compared after percent-decoding, and the query counts for nothing; on S3 a
    key is taken as it is written.
    """
    scheme, _, key = address.partition("://")
    if scheme.lower() == "s3":
        inside = folder.lower().startswith("s3://") and key.startswith(folder[5:])
        return key[len(folder) - 5 :] if inside else None
    try:
        own, other = urlsplit(folder), urlsplit(address)
        same = _server(own) == _server(other)
    except ValueError:  # a port that is no number, say
        return None
    above, path = unquote(own.path), unquote(other.path)
    return path[len(above) :] if same and path.startswith(above) else None


def _server(address: SplitResult) -> tuple[str, str | None, int | None]:
    ports = {"http": 80, "https": 443}
    return address.scheme, address.hostname, address.port or ports.get(address.scheme)


def label_files(
    table: Table,
    root: Path,
    *,
    folders: Sequence[str] = ("",),
    split: str | None = None,
) -> LabelledFiles:
    """The image files that a table names.

    Args:
        root: what the paths of the result are relative to.
        folders: below the root and with a slash at their ends, what the table's paths may be
            relative to; the first in which the most of its first rows are found counts. Without
            an ending, `0a1b` is `0a1b.jpg`.
        split: of all rows, where the table itself says nothing about splits. Without it, paths that
            begin with folders of several splits (`train/…`, `val/…`) say it.

    Raises:
        DataError: none of the rows names an image, or the labels cannot be classes.
    """
    _refuse_numberless_classes(table)
    by_folder = split is None and has_split_folders(table)
    find = _Finder(root, _folder_of(table, root, folders))
    bad: dict[str, list[str]] = defaultdict(list)
    said: dict[str, tuple[int, ImageFile]] = {}
    repeated, contradicted = [], set()
    for row in table.rows:
        read = find.file(row, _first_folder(row.path) if by_folder else split)
        if isinstance(read, str):
            bad[read].append(f"line {row.line}: {_said_wrong(read, row)}")
            continue
        line, first = said.setdefault(read.path, (row.line, read))
        if first != read:
            contradicted.add(read.path)
            bad["images_in_two_rows"].append(f"{read.path} (lines {line} and {row.line})")
        elif line != row.line:
            repeated.append(f"{read.path} (lines {line} and {row.line})")
    files = [file for path, (_, file) in said.items() if path not in contradicted]
    if not files:
        rule, items = max(bad.items(), key=lambda entry: len(entry[1]))
        raise DataError(
            f"{table.path} names no image that could be used: {len(table.rows):,} rows, "
            f"{items[0]}: {BAD_ROWS[rule]}."
        )
    return LabelledFiles(files=files, bad=bad, repeated=repeated)


def has_split_folders(table: Table) -> bool:
    """Whether a table's paths alone say the splits: `train/…` and `val/…` or `test/…`."""
    if "split" in table.columns:
        return False
    splits = set()
    for row in table.rows:
        split = _first_folder(row.path)
        if split is None:
            return False
        splits.add(split)
    return "train" in splits and len(splits) > 1


def _first_folder(path: str) -> str | None:
    """The split that the first folder of a path stands for, if it is any's."""
    first, slash, _ = path.removeprefix("./").partition("/")
    return split_named(first) if slash else None


def _said_wrong(rule: str, row: Row) -> str:
    path = without_secrets(row.path)
    return f"{path}: {row.split!r}" if rule == "rows_with_unknown_split" else path


def _refuse_numberless_classes(table: Table) -> None:
    """A column of names, scores or texts was taken for the labels."""
    labels, column = Counter(row.label for row in table.rows), table.columns["label"]
    if len(labels) > 100 and 2 * len(labels) > len(table.rows):
        raise DataError(
            f"{table.path}: the column {column!r} has {len(labels):,} different values in "
            f"{len(table.rows):,} rows, too many to be classes. Name the right one with "
            "data.columns.label."
        )


def _folder_of(table: Table, root: Path, folders: Sequence[str]) -> str:
    """The folder in which the most of the first rows have a file; on a tie the earlier one."""
    if len(folders) == 1:
        return folders[0]
    finders = {folder: _Finder(root, folder) for folder in folders}
    first = table.rows[:20]
    hits = {
        folder: sum(finder.stat(path_inside(row.path) or ".") is not None for row in first)
        for folder, finder in finders.items()
    }
    return max(folders, key=lambda folder: hits[folder])


class _Finder:
    """Finds the files of rows below one folder."""

    def __init__(self, root: Path, folder: str) -> None:
        self._root = os.fspath(root)
        self._folder = folder
        self._endings = list(image_extensions())
        self._known = frozenset(self._endings)
        self._spellings: dict[str, dict[str, str]] = {}  # of a folder: NFC -> as it is on disk

    def file(self, row: Row, split: str | None) -> ImageFile | str:
        """The file that a row names, or the rule that it breaks."""
        path = path_inside(row.path)
        if path is None:
            return "rows_outside_the_folder" if row.path else "rows_without_path"
        if not _is_class_name(row.label):
            return "rows_without_label"
        named = split_named(row.split) if row.split else split
        if row.split and named is None:
            return "rows_with_unknown_split"
        found = self.stat(path)
        if found is None:
            return "rows_without_file"
        path, status = found
        if _ending(path) not in self._known:
            return "rows_without_image"
        return ImageFile(path, row.label, named, file_state(status), row.group or None)

    def stat(self, path: str) -> tuple[str, os.stat_result] | None:
        """The file at a path, or at that path with an image's ending; None where there is none."""
        path = f"{self._folder}{path}"
        found = self._stat(path)
        return found if found is not None or path.isascii() else self._stat(self._spelt(path))

    def _stat(self, path: str) -> tuple[str, os.stat_result] | None:
        status = self._regular(path)
        if status is not None:
            return path, status
        if _ending(path) in self._known:
            return None
        for number, ending in enumerate(self._endings):
            if (status := self._regular(path + ending)) is not None:
                self._endings.insert(0, self._endings.pop(number))  # the next one is most likely so
                return path + ending, status
        return None

    def _spelt(self, path: str) -> str:
        """A path as its parts are encoded on disk: macOS and Linux write é differently."""
        there = ""
        for part in path.split("/"):
            name = unicodedata.normalize("NFC", part)
            found = self._names(there).get(name)
            if found is None:  # without its ending, perhaps
                names = (self._names(there).get(name + ending) for ending in self._endings)
                found = next((known for known in names if known), part)
            there = f"{there}/{found}" if there else found
        return there

    def _names(self, folder: str) -> dict[str, str]:
        if folder not in self._spellings:
            try:
                names = [path.name for path in Path(self._root, folder).iterdir()]
            except (OSError, ValueError):
                names = []
            self._spellings[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return self._spellings[folder]

    def _regular(self, path: str) -> os.stat_result | None:
        try:
            status = os.stat(f"{self._root}/{path}")  # noqa: PTH116 - called for every row
        except (OSError, ValueError):  # a NUL in the name
            return None
        return status if stat.S_ISREG(status.st_mode) else None


def path_inside(path: str) -> str | None:
    """A path without detours, or None where it leads out of its folder, or nowhere."""
    name = path.rpartition("/")[2]
    folder = _folder_inside(path[: len(path) - len(name)])
    return None if folder is None or name in ("", ".", "..") else folder + name


@cache  # a table names few folders
def _folder_inside(folder: str) -> str | None:
    """A folder without detours and with a slash at its end, or nothing for the one itself."""
    if folder.startswith("/") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", folder):
        return None
    path = posixpath.normpath(folder)
    return None if path.split("/")[0] == ".." else "" if path == "." else f"{path}/"


@cache
def _is_class_name(label: str) -> bool:
    return bool(label) and printable(label) == label


def _ending(path: str) -> str:
    return path[path.rfind(".") :].lower()


# Labels of single images, and names of classes, that take the place of those that were found.


def override_labels(files: Iterable[ImageFile], table: Table) -> tuple[list[ImageFile], list[str]]:
    """Give images the label that a table has for them, or leave them out where it has none.

    Returns:
        The images, and the rows that name none of them.

    Raises:
        DataError: two rows name one image.
    """
    labels: dict[str, Row] = {}
    for row in table.rows:
        path = unicodedata.normalize("NFC", path_inside(row.path) or row.path)
        if path in labels:
            raise DataError(f"{table.path}, line {row.line}: {path} a second time.")
        labels[path] = row
    changed: list[ImageFile] = []
    for file in files:
        path = unicodedata.normalize("NFC", file.path)
        if path not in labels:
            changed.append(file)
        elif label := labels.pop(path).label:
            changed.append(_with_class(file, label))
    return changed, [f"line {row.line}: {row.path}" for row in labels.values()]


def rename_classes(
    files: Iterable[ImageFile], names: Mapping[str, str]
) -> tuple[list[ImageFile], list[str]]:
    """Rename and merge classes, and leave out those that become nothing.

    Returns:
        The images, and the names in the map that no image has.
    """
    files = list(files)
    there = {file.class_name for file in files}
    changed = [
        _with_class(file, names[file.class_name]) if file.class_name in names else file
        for file in files
        if names.get(file.class_name) != ""
    ]
    return changed, [name for name in names if name not in there]


def _with_class(file: ImageFile, name: str) -> ImageFile:
    return ImageFile(file.path, name, file.split, file.state, file.group)


def group_files(files: Iterable[ImageFile], pattern: str) -> list[ImageFile]:
    """Group images by a pattern of their file names, or of their paths if it holds a slash.

    The group is what the parentheses match, or all of the match without any; an image that does not
    match is in no group.
    """
    compiled, of_path = re.compile(pattern), "/" in pattern
    grouped = []
    for file in files:
        found = compiled.search(file.path if of_path else posixpath.basename(file.path))
        parts: tuple[Any, ...] = (found.groups() or (found[0],)) if found else ()
        group = "/".join(part for part in parts if part) or None
        grouped.append(ImageFile(file.path, file.class_name, file.split, file.state, group))
    return grouped
