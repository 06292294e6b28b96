"""Ask a model in this process, without a server."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from visiontuner.errors import ClassifierError
from visiontuner.layout import CLASSIFIER_FOLDER
from visiontuner.model.classifier import DESCRIPTION, Classifier
from visiontuner.serving.answers import MEMORY, Answer, Options, answer
from visiontuner.serving.client import Transport

# As many as may decode or wait to decode a large picture: here none is told to come again.
_AT_A_TIME = threading.BoundedSemaphore(MEMORY.waiting + 1)


def open_model(folder: Path) -> Transport:
    """A classifier folder, or the one in an MLflow model. No code that the model brings is run.

    Raises:
        ClassifierError: the folder is neither, or damaged.
    """
    if (folder / DESCRIPTION).is_file():
        return ClassifierFolder(folder)
    if not (folder / "MLmodel").is_file():
        raise ClassifierError(
            f"{folder} is no model: it has neither {DESCRIPTION} nor MLmodel. "
            "A search leaves one in its folder, classifier/."
        )
    inside = folder / "artifacts" / CLASSIFIER_FOLDER
    if (inside / DESCRIPTION).is_file():
        return ClassifierFolder(inside)
    raise ClassifierError(
        f"{folder} is an MLflow model without a classifier of visiontuner. Its own code is not run "
        "here; serve it with `mlflow models serve` if you trust it, and ask it with --url."
    )


class ClassifierFolder:
    """The artifact itself; neither MLflow nor torch is imported."""

    body_limit = sys.maxsize

    def __init__(self, folder: Path) -> None:
        self._classifier = Classifier.load(folder)

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        with _AT_A_TIME:
            return answer(self._classifier, contents, options)
