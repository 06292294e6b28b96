"""The pictures that a model was packaged with, and its own answers to them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import numpy as np

from visiontuner.errors import ClassifierError
from visiontuner.layout import CLASSIFIER_FOLDER
from visiontuner.serving.answers import Options
from visiontuner.serving.client import encode_request

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reference:
    """What the artifact itself answered when it was packaged.

    Args:
        pictures: the contents of N picture files.
        probabilities: float64, shape (N, C), in the order of `class_names`.
    """

    class_names: list[str]
    pictures: list[bytes]
    probabilities: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def read(cls, model: Path) -> Self:
        """From an MLflow model folder.

        Raises:
            ClassifierError: it holds no readable reference pictures.
        """
        folder = model / "artifacts" / CLASSIFIER_FOLDER
        try:
            names = json.loads((folder / "classifier.json").read_text("utf-8"))["class_names"]
            raw = json.loads((folder / "reference.json").read_text("utf-8"))["pictures"]
            pictures = [base64.b64decode(picture["image"]) for picture in raw]
            recorded = np.array([picture["probabilities"] for picture in raw], dtype=np.float64)
            if recorded.shape != (len(pictures), len(names)) or not pictures:
                raise ValueError("no pictures, or other classes")
        except OSError as error:
            raise ClassifierError(
                f"{model} is no MLflow model of visiontuner ({error.strerror}: {error.filename})."
            ) from None
        except (ValueError, LookupError, TypeError) as error:
            raise ClassifierError(
                f"{folder}/reference.json cannot be used ({type(error).__name__}: {error}). "
                "Package the classifier again."
            ) from None
        return cls(names, pictures, recorded)

    def options(self) -> Options:
        """Ask with these to compare: every class is listed."""
        return Options(top_k=len(self.class_names))

    def bodies(self) -> Iterator[bytes]:
        """Requests with one picture each, without end."""
        return cycle([encode_request([picture], Options()) for picture in self.pictures])

    def difference(self, answers: Sequence[Sequence[Mapping[str, Any]]]) -> float:
        """The largest difference of a probability; NaN if classes or pictures are missing.

        Args:
            answers: for each picture the `top_k` of its answer.
        """
        answered = [{c["label"]: c["probability"] for c in top} for top in answers]
        got = np.array([[row.get(name, np.nan) for name in self.class_names] for row in answered])
        if got.shape != self.probabilities.shape:
            return float("nan")
        return float(np.abs(got - self.probabilities).max())
