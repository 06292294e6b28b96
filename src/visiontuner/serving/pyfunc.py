"""The MLflow model: image in, named probabilities out. No torch.

MLflow runs this file itself ("models from code"), so no pickle is involved. The modules it imports
from visiontuner travel with the model. A request is a table with a column `image`: the content of a
picture file, as bytes or as base64 text. A path is never read: it would be a path on the server.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from visiontuner.data.images import decode_image
from visiontuner.errors import BadImageError
from visiontuner.model.classifier import Classifier

_COLUMN = "image"
_DEFAULT_TOP_K = 5


class ClassifierModel(PythonModel):
    """A classifier folder behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        from pathlib import Path

        self.classifier = Classifier.load(Path(context.artifacts["classifier"]))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Name the picture in each row.

        Args:
            model_input: a column `image` of bytes or base64 text.
            params: `top_k`, how many of the most probable classes to list; default 5.

        Returns:
            A row a picture: `label`, `probability` in [0, 1], and `top_k`, a list of
            `{"label", "probability"}` with the most probable first.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (status 400) with the row for what a client can
                put right, INTERNAL_ERROR (500) without details for anything else.
        """
        try:
            top_k = _read_top_k(params)
            images = _read_images(model_input)
            predictions = self.classifier.predict(images, top_k=top_k) if images else []
        except MlflowException:
            raise
        except BadImageError as error:
            raise _refuse(_name_the_row(images, str(error))) from None
        except Exception:
            raise MlflowException("internal error", error_code=INTERNAL_ERROR) from None
        return pd.DataFrame(
            {
                "label": [p.label for p in predictions],
                "probability": [float(p.probability) for p in predictions],
                "top_k": [
                    [{"label": label, "probability": float(value)} for label, value in p.top_k]
                    for p in predictions
                ],
            }
        )


def _read_top_k(params: dict[str, Any] | None) -> int:
    top_k = (params or {}).get("top_k", _DEFAULT_TOP_K)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise _refuse(f"top_k must be a whole number >= 1, got {top_k!r}.")
    return top_k


def _read_images(table: object) -> list[bytes]:
    if not isinstance(table, pd.DataFrame) or _COLUMN not in table.columns:
        raise _refuse(
            'Send a table with a column "image", for example '
            '{"dataframe_split": {"columns": ["image"], "data": [["<base64>"]]}}.'
        )
    return [_read_image(row, value) for row, value in enumerate(table[_COLUMN])]


def _read_image(row: int, value: object) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise _refuse(f"Row {row}: image must be bytes or base64 text, got {type(value).__name__}.")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise _refuse(f"Row {row}: image is not base64; send the file's content.") from None


def _name_the_row(images: list[bytes], message: str) -> str:
    """Which picture it was: looked for only after one has failed."""
    for row, image in enumerate(images):
        try:
            decode_image(image)
        except BadImageError as error:
            return f"Row {row}: {error}"
    return message


def _refuse(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(ClassifierModel())
