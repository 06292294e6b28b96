"""What MLflow needs to make a model of a classifier folder: code, signature, requirements."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

import visiontuner
from visiontuner.data.files import temporary_folder
from visiontuner.errors import ClassifierError
from visiontuner.layout import CLASSIFIER_FOLDER

# `serving/pyfunc.py` and all that it imports of visiontuner; it travels with the model.
_PYFUNC = "serving/pyfunc.py"
CODE = (
    "__init__.py",
    "errors.py",
    "data/__init__.py",
    "data/images.py",
    "model/__init__.py",
    "model/classifier.py",
    "serving/__init__.py",
    "serving/answers.py",
)
# mlflow-skinny serves as well as mlflow and is half a gigabyte smaller.
_REQUIREMENTS = ("mlflow-skinny", "onnxruntime", "pillow", "numpy", "pandas")
_EXAMPLES = 2


@contextmanager
def model_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """What MLflow needs to make a model of a classifier folder."""
    with temporary_folder() as temporary, _importable(str(temporary)):
        code, script = _stage_code(temporary)
        if folder.resolve().name != CLASSIFIER_FOLDER:
            # MLflow names an artifact after its folder; what reads the model goes by this name.
            folder = Path(shutil.copytree(folder, temporary / CLASSIFIER_FOLDER))
        yield {
            "python_model": str(script),
            "artifacts": {CLASSIFIER_FOLDER: str(folder)},
            "code_paths": [str(code)],
            "signature": signature(),
            "input_example": (_example(folder), {"top_k": 5}),
            "pip_requirements": requirements(),
        }


def requirements() -> list[str]:
    """What the served model needs, pinned to what is installed here."""
    packages = list(_REQUIREMENTS)
    if importlib.util.find_spec("pillow_heif"):  # what training reads the endpoint reads
        packages.append("pillow-heif")
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]


def signature() -> ModelSignature:
    """A column of picture files in; label, probability, confidence and the top k out."""
    choice = Object([Property("label", DataType.string), Property("probability", DataType.double)])
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                # None for a picture that could not be read, where `on_error` is "report".
                ColSpec(DataType.string, "label", required=False),
                ColSpec(DataType.double, "probability", required=False),
                ColSpec(DataType.boolean, "confident", required=False),
                ColSpec(Array(choice), "top_k"),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("top_k", DataType.long, 5),
                ParamSpec("threshold", DataType.double, None),
                ParamSpec("on_error", DataType.string, "fail"),
            ]
        ),
    )


def _stage_code(folder: Path) -> tuple[Path, Path]:
    """The package that travels with the model, and the script that MLflow runs.

    The package is named after its content, not `visiontuner`: MLflow puts a loaded model's code
    first on the module path, and a process that loads a model keeps its own, whole visiontuner.
    """
    source = Path(visiontuner.__file__).parent
    texts = {name: (source / name).read_text(encoding="utf-8") for name in (*CODE, _PYFUNC)}
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    package = f"visiontuner_{digest[:12]}"
    for name, text in texts.items():
        path = folder / package / name if name != _PYFUNC else folder / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"^from visiontuner\.", f"from {package}.", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    return folder / package, folder / Path(_PYFUNC).name


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """MLflow runs the script once while it logs, and adds to the module path."""
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before


def _example(folder: Path) -> pd.DataFrame:
    """Two real pictures: the first of the reference."""
    try:
        reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        contents = [base64.b64decode(p["image"]) for p in reference["pictures"][:_EXAMPLES]]
        if not contents:
            raise ValueError("it has none")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ClassifierError(
            f"{folder}/reference.json has no picture to show as an example: {error}."
        ) from None
    return pd.DataFrame({"image": contents})
