"""The MLflow model: image in, named probabilities out. No torch.

MLflow runs this file itself ("models from code"), so no pickle is involved. The modules it imports
from visiontuner travel with the model. A request is a table with a column `image`: the content of
an image file, as bytes or as base64 text. A path is never read: it would be a path on the server.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_EXHAUSTED,
)
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from visiontuner.errors import BusyError
from visiontuner.model.classifier import Classifier
from visiontuner.serving.answers import Answer, BadRequest, Options, answer

_COLUMN = "image"
# glibc's parameters. Blocks from a threshold on are mapped, and go back when they are freed; left
# alone it rises to the largest block so far, an image's, and what is below stays in its arenas.
_ARENA_MAX, _MMAP_THRESHOLD = -8, -3


class ClassifierModel(PythonModel):
    """A classifier folder behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        _let_memory_go_back()
        self.classifier = Classifier.load(Path(context.artifacts["classifier"]))
        self.classifier.warm_up()

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Name the image in each row.

        Args:
            model_input: a column `image` of bytes or base64 text.
            params: `top_k`, how many of the most probable classes to list, default 5; `threshold`,
                below which an answer is not confident, default what the classifier says, which may
                be that no answer is; `on_error`, "fail" (default) or "report": an image that
                cannot be read is then told in its row.

        Returns:
            A row an image: `label`, `probability` in [0, 1], `confident`, `known`, `novelty` in
            [0, 2], and `top_k`, a list of `{"label", "probability"}` with the most probable first.
            With `on_error` "report" also `error`, None for images that were answered; the others
            are None where it is not.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (status 400) with the row for what a client can
                put right, RESOURCE_EXHAUSTED (429) while others wait to decode large images,
                INTERNAL_ERROR (500) without details for anything else.
        """
        try:
            options = Options.read(params)
            rows = answer(self.classifier, _images(model_input), options)
        except BadRequest as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        except BusyError as error:
            raise MlflowException(str(error), error_code=RESOURCE_EXHAUSTED) from None
        except Exception:
            raise MlflowException("internal error", error_code=INTERNAL_ERROR) from None
        return _table(rows, with_errors=options.on_error == "report")


def _let_memory_go_back() -> None:
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 1 << 20)
        mallopt(_ARENA_MAX, 2)


def _images(table: object) -> list[object]:
    if not isinstance(table, pd.DataFrame) or _COLUMN not in table.columns:
        raise BadRequest(
            'Send a table with a column "image", for example '
            '{"dataframe_split": {"columns": ["image"], "data": [["<base64>"]]}}.'
        )
    if list(table.columns).count(_COLUMN) > 1:
        raise BadRequest('Send one column "image", not several.')
    return list(table[_COLUMN])


def _table(rows: list[Answer], *, with_errors: bool) -> pd.DataFrame:
    names = ["label", "probability", "confident", "known", "novelty", "top_k"]
    names += ["error"] * with_errors
    # As objects, or pandas turns a missing probability into NaN, which is no JSON.
    return pd.DataFrame([row.to_dict() for row in rows], columns=names, dtype=object)


set_model(ClassifierModel())
