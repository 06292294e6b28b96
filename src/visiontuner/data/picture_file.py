"""One split of a store of decoded pictures while it is written: append, resume, finish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visiontuner.data.dataset import Sample, none_readable, unreadable_picture
from visiontuner.data.files import cannot_write, write_atomically, write_json
from visiontuner.data.stored_pictures import Form, array_path, data_path, samples_path
from visiontuner.errors import BadImageError
from visiontuner.journal import Finding


class SplitFile:
    """A split's pictures, one after the other in a file, and how far that file is.

    A line of the progress file stands for some pictures that are in the file; bytes beyond the last
    whole line are of pictures that will be decoded again.

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
        self._take_up()

    @property
    def done(self) -> int:
        return len(self._lengths)

    def append(self, pictures: Sequence[bytes | BadImageError]) -> None:
        """Add the next pictures, or why they cannot be read.

        Raises:
            VisiontunerError: the disk is full.
        """
        group = {
            "lengths": [0 if isinstance(p, BadImageError) else len(p) for p in pictures],
            "bad": {
                number: str(picture)
                for number, picture in enumerate(pictures)
                if isinstance(picture, BadImageError)
            },
        }
        line = json.dumps(group) + "\n"
        try:
            with self._data.open("ab") as data:
                data.write(b"".join(p for p in pictures if isinstance(p, bytes)))
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
        try:
            lines = self._progress.read_bytes().split(b"\n")[:-1]  # the last one may be torn
            size = self._data.stat().st_size
            for line in lines:
                self._add(json.loads(line))
            whole = sum(self._lengths) <= size and self.done <= len(self.samples)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
            lines = []
        if not whole:
            self._lengths, self._bad, lines = [], {}, []
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, length in {
            self._data: sum(self._lengths),
            self._progress: sum(len(line) + 1 for line in lines),
        }.items():
            with path.open("ab") as file:
                file.truncate(length)

    def _add(self, group: dict[str, Any]) -> None:
        start = self.done
        self._lengths += [int(length) for length in group["lengths"]]
        self._bad |= {start + int(number): str(why) for number, why in group["bad"].items()}
