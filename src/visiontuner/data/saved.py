"""Data sets saved by Hugging Face's `datasets` library: image files and a table, extracted once.

`Dataset.save_to_disk` writes Arrow streams (`data-*.arrow`) beside `state.json`, which lists them,
and `dataset_info.json`, which says what the columns are; `DatasetDict.save_to_disk` writes a folder
of these for each split and `dataset_dict.json`. Everything else here works on image files, so that
the images are written below the cache, as class folders, with the other columns in a table beside
them. The `datasets` library itself is not needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet
from pyarrow import types

from visiontuner import interrupts
from visiontuner.data.images import image_extensions
from visiontuner.data.labels import cell_text, choose_columns
from visiontuner.errors import DataError
from visiontuner.io.download import whole_folder
from visiontuner.io.files import (
    ImageFile,
    as_file_name,
    content_digests,
    file_state,
    is_folder,
    scan_folder,
)

EXTRACTED_TABLE = "labels.parquet"
"""In the extracted folder: the path of each image, and the other columns of the data set."""
_VERSION = 1  # part of the folder's name: what is extracted otherwise lies elsewhere
# How image files begin, for those that were saved without a name.
_BEGINNINGS = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"RIFF", ".webp"),
)
_AGAIN = "Save the data set again with `save_to_disk`."


@dataclass(frozen=True, kw_only=True)
class SavedFolder:
    """A saved data set: the folder of each split's rows, by "" where it has no splits."""

    folder: Path
    splits: Mapping[str, Path]


class _Format(NamedTuple):
    """The columns: which holds images and which labels, and the names of numbered classes."""

    image: str
    label: str
    class_names: Mapping[str, Sequence[str]]  # by column
    others: Sequence[str]


def find_saved(root: Path) -> SavedFolder | None:
    """The saved data set in a folder, or in the only thing that lies in it; None without one.

    Raises:
        DataError: `dataset_dict.json` is damaged.
    """
    while True:
        if (root / "dataset_dict.json").is_file():
            splits = _read_json(root / "dataset_dict.json").get("splits")
            if not isinstance(splits, list) or not all(map(_is_plain_name, splits)):
                raise DataError(f"{root / 'dataset_dict.json'} names no splits. {_AGAIN}")
            return SavedFolder(folder=root, splits={name: root / name for name in splits})
        if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            return SavedFolder(folder=root, splits={"": root})
        entries = scan_folder(root)
        if len(entries) != 1 or not is_folder(entries[0]):
            return None
        root = root / entries[0].name


def extract_saved(
    saved: SavedFolder,
    columns: Mapping[str, str | None],
    *,
    cache: Path,
    into: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the images of a saved data set as files, unless that was done before.

    Args:
        columns: what the columns of images (`path`) and labels are called; by default the only one
            that holds images, and `label`.
        cache: where digests of the Arrow files are remembered.
        into: the folder below which each data set gets one of its own, named by its content.
        progress: called with (images written, images in all).

    Returns:
        The table of the images; they lie beside it, in folders of splits and classes.

    Raises:
        DataError: the folder is damaged or has no such columns, or the disk is full.
    """
    files = {split: _data_files(folder) for split, folder in saved.splits.items()}
    form = _read_format(saved, files, columns)
    every = [file for names in files.values() for file in names]
    key = [_VERSION, form.image, form.label, list(files), _digests(saved.folder, every, cache)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    target = into / "saved" / f"{as_file_name(saved.folder.name)[:40]}-{digest[:16]}"
    if not target.is_dir():
        total = sum(_count_rows(file) for file in every)
        with whole_folder(target) as folder:
            writer = _Writer(saved.folder, folder, form, total, progress)
            for split, names in files.items():
                for file in names:
                    writer.add(file, split)
            writer.write_table()
    return target / EXTRACTED_TABLE


# What the JSON files and the Arrow files' headers say.


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. {_AGAIN}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is no JSON. {_AGAIN}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} is no JSON object. {_AGAIN}")
    return raw


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def _data_files(folder: Path) -> list[Path]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder} keeps its rows by an index of others. {_AGAIN}")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (LookupError, TypeError):
        names = []
    if not names or not all(map(_is_plain_name, names)):
        raise DataError(f"{folder / 'state.json'} names no data files. {_AGAIN}")
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing, and state.json names it. {_AGAIN}")
    return [folder / name for name in names]


def _read_format(
    saved: SavedFolder, files: Mapping[str, Sequence[Path]], columns: Mapping[str, str | None]
) -> _Format:
    schemas = {file: _read_schema(file) for names in files.values() for file in names}
    (first, schema), *_ = schemas.items()
    for file, other in schemas.items():
        if not other.equals(schema):
            raise DataError(f"{file} has other columns than {first}. {_AGAIN}")
    features = _read_json(first.parent / "dataset_info.json").get("features")
    kinds = features if isinstance(features, dict) else {}
    given = {role: name for role in ("path", "label") if (name := columns.get(role))}
    images = [name for name in schema.names if _kind(kinds.get(name)) == "Image"]
    if "path" not in given and len(images) == 1:
        given["path"] = images[0]
    chosen = choose_columns(saved.folder, schema.names, ("path", "label"), given)
    return _Format(
        image=schema.names[chosen["path"]],
        label=schema.names[chosen["label"]],
        class_names={
            name: list(map(str, kinds[name].get("names") or ()))
            for name in schema.names
            if _kind(kinds.get(name)) == "ClassLabel"
        },
        others=[field.name for field in schema if _is_scalar(field.type)],
    )


def _kind(feature: object) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def _is_scalar(kind: pyarrow.DataType) -> bool:
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return types.is_boolean(kind) or any(test(kind) for test in tests)


@contextmanager
def _stream(path: Path) -> Iterator[ipc.RecordBatchStreamReader]:
    """An Arrow stream; whatever is wrong with it is one line."""
    try:
        with pyarrow.memory_map(os.fspath(path)) as file, ipc.open_stream(file) as stream:
            yield stream
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is damaged: {reason}. {_AGAIN}") from None


def _read_schema(file: Path) -> pyarrow.Schema:
    with _stream(file) as stream:
        return stream.schema


def _count_rows(file: Path) -> int:
    with _stream(file) as stream:
        return sum(batch.num_rows for batch in stream)


def _digests(root: Path, files: Sequence[Path], cache: Path) -> list[str]:
    paths = [file.relative_to(root).as_posix() for file in files]
    known = [
        ImageFile(path, "", None, file_state(file.stat()))
        for path, file in zip(paths, files, strict=True)
    ]
    digests = content_digests(root, known, cache=cache)
    for path, digest in digests.items():
        if not isinstance(digest, str):
            raise DataError(f"Cannot read {root / path}: {digest.strerror}.")
    return [str(digests[path]) for path in paths]


# Rows -> files.


class _Writer:
    """Writes the images of one row after the other, and the table of all at the end."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        form: _Format,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._source = source
        self._folder = folder
        self._form = form
        self._total = total
        self._progress = progress
        self._columns: dict[str, list[Any]] = defaultdict(list)
        self._taken: set[str] = set()
        self._done = 0

    def add(self, file: Path, split: str) -> None:
        """Write the images of one Arrow file."""
        with _stream(file) as stream:
            for batch in stream:
                self._add_columns(batch, split)
                labels = self._columns["label"][-batch.num_rows :]
                images = batch.column(self._form.image)
                for index, label in enumerate(labels):
                    path = self._write(images[index].as_py(), label, split)
                    self._columns["path"].append(path)
                    self._done += 1
                self._tell()

    def write_table(self) -> None:
        """Write the table of all images."""
        parquet.write_table(pyarrow.table(dict(self._columns)), self._folder / EXTRACTED_TABLE)

    def _add_columns(self, batch: pyarrow.RecordBatch, split: str) -> None:
        form = self._form
        for name in {*form.others, form.label} - {form.image}:
            values = batch.column(name).to_pylist()
            if name in form.class_names:
                values = [_class_name(form.class_names[name], value) for value in values]
            if name == form.label:
                name, values = "label", [cell_text(value) for value in values]
            elif name in ("path", "label") or (name == "split" and split):
                continue  # what is written under that name says more
            self._columns[name] += values
        if split:
            self._columns["split"] += [split] * batch.num_rows

    def _tell(self) -> None:
        interrupts.check()
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _write(self, image: Any, label: str, split: str) -> str:
        """Write one image; its path, or nothing where the row holds none."""
        held = image if isinstance(image, dict) else {}
        content = image if isinstance(image, bytes) else held.get("bytes")
        given = str((image if isinstance(image, str) else held.get("path")) or "")
        if content is None and not given:
            return ""
        relative = self._unused_path(content, given, label, split)
        path = self._folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        elif (file := self._file(given)) is not None:
            shutil.copyfile(file, path)
        return relative

    def _file(self, given: str) -> Path | None:
        """The file that a row names instead of holding it, if it lies in the saved folder."""
        path = self._source / given
        inside = ".." not in path.parts and path.is_relative_to(self._source)
        return path if inside and "\0" not in given and path.is_file() else None

    def _unused_path(self, content: bytes | None, given: str, label: str, split: str) -> str:
        """`SPLIT/CLASS/NAME`, with the row's number where that is taken or the row has no name."""
        name = PurePosixPath(given.replace("\\", "/")).name
        stem, dot, ending = name.rpartition(".")
        if f".{ending}".lower() not in image_extensions() or not dot:
            stem, ending = name, _ending_of(content or b"").removeprefix(".")
        if not stem or stem != as_file_name(stem):
            stem = f"{self._done:08}"
        folder = "/".join(part for part in (split, as_file_name(label)) if part)
        path = f"{folder}/{stem}.{ending}"
        if path in self._taken:
            path = f"{folder}/{stem}-{self._done:08}.{ending}"
        self._taken.add(path)
        return path


def _class_name(names: Sequence[str], number: object) -> str:
    """The name of a numbered class; nothing for -1, which stands for no label."""
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else ""


def _ending_of(content: bytes) -> str:
    return next((ending for start, ending in _BEGINNINGS if content.startswith(start)), ".bin")
