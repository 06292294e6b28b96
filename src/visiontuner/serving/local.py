"""Ask a model in this process, without a server."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visiontuner.errors import ClassifierError
from visiontuner.model.classifier import DESCRIPTION, Classifier
from visiontuner.serving.answers import MEMORY, Answer, Options, answer
from visiontuner.serving.client import Transport, read_answer

# As many as may decode or wait to decode a large picture: here none is told to come again.
_AT_A_TIME = threading.BoundedSemaphore(MEMORY.waiting + 1)


def open_model(folder: Path) -> Transport:
    """A classifier folder, or an MLflow model of one.

    Raises:
        ClassifierError: the folder is neither, or damaged.
    """
    if (folder / DESCRIPTION).is_file():
        return ClassifierFolder(folder)
    if (folder / "MLmodel").is_file():
        return MlflowModel(folder)
    raise ClassifierError(
        f"{folder} is no model: it has neither {DESCRIPTION} nor MLmodel. "
        "A search leaves one in its folder, classifier/."
    )


class ClassifierFolder:
    """The artifact itself; neither MLflow nor torch is imported."""

    body_limit = sys.maxsize

    def __init__(self, folder: Path) -> None:
        self._classifier = Classifier.load(folder)

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        with _AT_A_TIME:
            return answer(self._classifier, contents, options)


class MlflowModel:
    """An MLflow model folder, loaded with `mlflow.pyfunc`, as a server loads it."""

    body_limit = sys.maxsize

    def __init__(self, folder: Path) -> None:
        logger = logging.getLogger("mlflow")
        level = logger.level
        logger.setLevel(logging.ERROR)  # notices about versions that differ from the pinned ones
        try:
            with warnings.catch_warnings():
                # MLflow warns about its own type hints when it is imported.
                warnings.simplefilter("ignore")
                import mlflow.pyfunc

                self._model = mlflow.pyfunc.load_model(str(folder))
        finally:
            logger.setLevel(level)

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        import pandas as pd

        params: dict[str, Any] = {"top_k": options.top_k, "on_error": options.on_error}
        if options.threshold is not None:
            params["threshold"] = options.threshold
        with _AT_A_TIME:
            rows = self._model.predict(pd.DataFrame({"image": list(contents)}), params=params)
        return [read_answer(row) for row in rows.to_dict(orient="records")]
