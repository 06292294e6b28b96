"""Pictures that were decoded once: what a training reads, memory-mapped and without torch.

pictures/KEY/
  meta.json                written last: a store that has it is complete; with checksums
  validation.pixels        uint8 (N, S, S, 3), one picture after the other
  validation.labels.npy    int64 (N,)
  validation.samples.json  their paths
  train.pixels             the same; or, where training pictures are changed at random,
  train.views              small JPEG or PNG files, one after the other, and
  train.ends.npy           int64 (N,), where each of them ends
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visiontuner.data.arrays import META, commit_folder
from visiontuner.data.images import Preprocessing
from visiontuner.errors import ClassifierError, DataError
from visiontuner.journal import Finding

SCHEMA_VERSION = 1

Form = Literal["pixels", "views"]
"""`pixels`: what evaluation reads. `views`: a whole picture made small, for random crops."""


class StoredPictures:
    """One split of a data set as decoded pictures; small when pickled, since it maps a file.

    Args:
        folder: the store.
        paths: N posix paths, relative to the data set's root.
        labels: int64, shape (N,), indices into the class names.
        ends: int64, shape (N,), where each picture ends in the file, in bytes.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        form: Form,
        preprocessing: Preprocessing,
        *,
        paths: tuple[str, ...],
        labels: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        self.folder = folder
        self.name = split
        self.form = form
        self.preprocessing = preprocessing
        self.paths = paths
        self.labels = labels
        self._starts = np.concatenate([[0], ends])
        # Copy-on-write: torch wants memory that may be written to; nobody does.
        self._bytes = np.memmap(data_path(folder, split, form), dtype=np.uint8, mode="c")
        if len(self._bytes) != self._starts[-1]:
            raise ValueError

    def __len__(self) -> int:
        return len(self.paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self.folder, self.name)

    @property
    def all_pixels(self) -> NDArray[np.uint8]:
        """uint8, shape (N, S, S, 3), memory-mapped; each picture as `read_pixels` gives it.

        Raises:
            DataError: the store holds views of these pictures, for random crops.
        """
        if self.form != "pixels":
            raise DataError(f"The pictures in {self.folder} for {self.name} are kept for cropping.")
        size = self.preprocessing.size
        return self._bytes.reshape(len(self), size, size, 3)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """uint8, shape (S, S, 3): exactly `data.images.read_pixels` of the file."""
        picture: NDArray[np.uint8] = self.all_pixels[index]
        return picture

    def view(self, index: int) -> Image.Image:
        """A whole training picture, made small; mode RGB.

        It is opened, not decoded: a JPEG's `draft` is still possible.

        Raises:
            DataError: the store holds pixels of these pictures.
        """
        if self.form != "views":
            raise DataError(f"The pictures in {self.folder} for {self.name} are cropped already.")
        content = self._bytes[self._starts[index] : self._starts[index + 1]].tobytes()
        return Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))


@dataclass(frozen=True, kw_only=True)
class PictureStore:
    """A complete store of decoded pictures.

    Args:
        folder: open it again by this path, in any process.
        forms: how each split is kept, by the split's name.
        findings: one for each picture that could not be read.
        seconds: how long decoding took, in the call that finished it.
        computed: pictures decoded by the call that returned this; 0 if all were there.
    """

    folder: Path
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    forms: Mapping[str, Form]
    findings: tuple[Finding, ...]
    seconds: float
    computed: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.forms)

    @classmethod
    def open(cls, folder: Path) -> PictureStore:
        """Read a store's description; its pictures are mapped by `split`.

        Raises:
            DataError: there is no complete store of a version that this code reads.
        """
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["schema_version"] != SCHEMA_VERSION:
                raise ValueError
            return cls(
                folder=folder,
                class_names=tuple(meta["class_names"]),
                preprocessing=Preprocessing.from_dict(meta["preprocessing"]),
                forms=dict(meta["forms"]),
                findings=tuple(Finding(**finding) for finding in meta["findings"]),
                seconds=float(meta["seconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError, ClassifierError):
            raise DataError(
                f"{folder} holds no decoded pictures, or not all. Start again to decode them."
            ) from None

    def write(self) -> None:
        """Declare the store complete; raises as `commit_folder`."""
        meta = {
            "schema_version": SCHEMA_VERSION,
            "class_names": self.class_names,
            "preprocessing": self.preprocessing.to_dict(),
            "forms": dict(self.forms),
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": self.seconds,
        }
        files = [name for split, form in self.forms.items() for name in store_files(split, form)]
        commit_folder(self.folder, meta, files)

    def split(self, name: str) -> StoredPictures:
        """Map one split.

        Raises:
            DataError: the store has no such split, or its files are damaged or gone.
        """
        if name not in self.forms:
            raise DataError(
                f"The pictures in {self.folder} have no split {name!r}, only "
                f"{', '.join(self.splits)}."
            )
        try:
            labels = np.load(array_path(self.folder, name, "labels"), allow_pickle=False)
            samples = json.loads(samples_path(self.folder, name).read_text(encoding="utf-8"))
            return StoredPictures(
                self.folder,
                name,
                self.forms[name],
                self.preprocessing,
                paths=tuple(samples["paths"]),
                labels=labels,
                ends=self._ends(name, len(labels)),
            )
        except (OSError, ValueError, KeyError, EOFError):
            raise DataError(
                f"The decoded pictures in {self.folder} are damaged. Delete that folder and start "
                "again."
            ) from None

    def _ends(self, name: str, count: int) -> NDArray[np.int64]:
        if self.forms[name] == "pixels":
            size = self.preprocessing.size
            return np.arange(1, count + 1, dtype=np.int64) * (size * size * 3)
        ends: NDArray[np.int64] = np.load(array_path(self.folder, name, "ends"), allow_pickle=False)
        if ends.shape != (count,):
            raise ValueError
        return ends


def data_path(folder: Path, split: str, form: Form) -> Path:
    return folder / f"{split}.{form}"


def array_path(folder: Path, split: str, kind: str) -> Path:
    return folder / f"{split}.{kind}.npy"


def samples_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.samples.json"


def store_files(split: str, form: Form) -> tuple[str, ...]:
    """The names of a split's files in its store."""
    paths = [
        data_path(Path(), split, form),
        array_path(Path(), split, "labels"),
        samples_path(Path(), split),
    ]
    if form == "views":
        paths.append(array_path(Path(), split, "ends"))
    return tuple(path.name for path in paths)


def _open_split(folder: Path, split: str) -> StoredPictures:
    return PictureStore.open(folder).split(split)
