"""One split of a store of decoded pictures while it is written: append, resume, finish."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visiontuner.data.dataset import Sample, none_readable, unreadable_picture
from visiontuner.data.files import cannot_write, write_atomically, write_json
from visiontuner.data.stored_pictures import Form, array_path, data_path, samples_path
from visiontuner.errors import BadImageError
from visiontuner.journal import Finding


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """A picture as it is stored, and whether it is nearly black, white or of one shade."""

    content: bytes
    few_levels: bool


class SplitFile:
    """A split's pictures, one after the other in a file, and how far that file is.

    A line of the progress file stands for some pictures that are in the file, with the checksum of
    their bytes; what lies beyond the last line that fits the file will be decoded again.

    Attributes:
        done: pictures that need no decoding any more, readable or not.
    """

    def __init__(self, folder: Path, split: str, form: Form, samples: Sequence[Sample]) -> None:
        self.split = split
        self.form = form
        self.samples = samples
        self._folder = folder
        self._data = data_path(folder, split, form)
        self._progress = folder / f"{split}.progress.jsonl"
        self._lengths: list[int] = []  # of each picture in bytes, 0 for an unreadable one
        self._bad: dict[int, str] = {}
        self._few_levels: list[int] = []
        self._take_up()

    @property
    def done(self) -> int:
        return len(self._lengths)

    def few_levels(self) -> list[str]:
        """Paths of pictures that are nearly black, white or of one shade."""
        return [self.samples[number].path for number in self._few_levels]

    def append(self, pictures: Sequence[DecodedPicture | BadImageError]) -> None:
        """Add the next pictures, or why they cannot be read.

        Raises:
            VisiontunerError: the disk is full.
        """
        contents = [b"" if isinstance(p, BadImageError) else p.content for p in pictures]
        content = b"".join(contents)
        group = {
            "checksum": zlib.crc32(content),
            "lengths": [len(one) for one in contents],
            "bad": {
                number: str(picture)
                for number, picture in enumerate(pictures)
                if isinstance(picture, BadImageError)
            },
            "few_levels": [
                number
                for number, picture in enumerate(pictures)
                if isinstance(picture, DecodedPicture) and picture.few_levels
            ],
        }
        line = json.dumps(group) + "\n"
        try:
            with self._data.open("ab") as data:
                data.write(content)
            with self._progress.open("a", encoding="utf-8") as progress:
                progress.write(line)
        except OSError as error:
            raise cannot_write(self._data, error) from None
        self._add(json.loads(line))

    def finish(self) -> list[Finding]:
        """Write what belongs to the pictures; a finding for each that could not be read.

        Raises:
            DataError: none could be read.
        """
        findings = [unreadable_picture(self.samples[i], why) for i, why in self._bad.items()]
        good = [s for number, s in enumerate(self.samples) if number not in self._bad]
        if not good:
            raise none_readable(self.split, findings)
        arrays = {"labels": np.array([sample.label for sample in good], dtype=np.int64)}
        if self.form == "views":
            lengths = np.array([n for i, n in enumerate(self._lengths) if i not in self._bad])
            arrays["ends"] = np.cumsum(lengths, dtype=np.int64)
        for kind, array in arrays.items():
            path = array_path(self._folder, self.split, kind)
            write_atomically(path, partial(np.save, arr=array, allow_pickle=False))
        write_json(samples_path(self._folder, self.split), {"paths": [s.path for s in good]})
        return findings

    def forget_progress(self) -> None:
        self._progress.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Read how far an earlier computation came, and cut off what it did not finish."""
        size = length = 0  # of the pictures, of the lines that tell of them
        try:
            lines = self._progress.read_bytes().split(b"\n")[:-1]  # the last one may be torn
            with self._data.open("rb") as data:
                for line in lines:
                    group = json.loads(line)
                    content = data.read(sum(group["lengths"]))
                    if zlib.crc32(content) != group["checksum"]:
                        break
                    if self.done + len(group["lengths"]) > len(self.samples):
                        break
                    self._add(group)
                    size, length = size + len(content), length + len(line) + 1
        except (OSError, ValueError, LookupError, TypeError):
            pass  # nothing there yet, or damaged from here on
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, end in {self._data: size, self._progress: length}.items():
            if not end:  # another training may have mapped what was there: it keeps its own
                path.unlink(missing_ok=True)
            with path.open("ab") as file:
                file.truncate(end)

    def _add(self, group: dict[str, Any]) -> None:
        start = self.done
        self._lengths += [int(length) for length in group["lengths"]]
        self._bad |= {start + int(number): str(why) for number, why in group["bad"].items()}
        self._few_levels += [start + int(number) for number in group["few_levels"]]
