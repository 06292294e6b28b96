"""The test predictions that an evaluation stored with a model version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from mlflow.entities.model_registry import ModelVersion
from numpy.typing import NDArray

from visiontuner.commands import next_command
from visiontuner.data.files import temporary_folder
from visiontuner.errors import UserMistake
from visiontuner.layout import EVALUATION_FOLDER, EVALUATION_PREDICTIONS, EVALUATION_REPORT
from visiontuner.serving.registry import DIGEST_TAG
from visiontuner.serving.versions import Mlflow

_TRIAL_ID = "visiontuner.trial_id"


@dataclass(frozen=True, kw_only=True)
class StoredPredictions:
    """What one version answered on its test pictures.

    Args:
        predicted, labels: int64, shape (N,), indices into `class_names`; N > 0.
        digests: of the pictures' contents, hexadecimal, in the same order.
        data_digest: of the whole data set; None if the evaluation does not say.
    """

    class_names: tuple[str, ...]
    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]
    digests: tuple[str, ...]
    data_digest: str | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which pictures were named rightly, shape (N,)."""
        return np.asarray(self.predicted == self.labels)

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """(content digest, name of the true class) of every picture, in order."""
        names = (self.class_names[label] for label in self.labels)
        return list(zip(self.digests, names, strict=True))


def read_report(mlflow: Mlflow, run_id: str) -> dict[str, Any] | None:
    """The evaluation's report on a trial's run; None if it was never evaluated.

    Raises:
        UserMistake: the report is damaged.
        TrackingError: MLflow is away or refuses.
    """
    if f"{EVALUATION_FOLDER}/{EVALUATION_REPORT}" not in _stored(mlflow, run_id):
        return None
    with temporary_folder() as folder:
        path = _download(mlflow, run_id, EVALUATION_REPORT, str(folder))
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(report, dict):
                raise TypeError("it is not an object")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise _damaged(run_id, EVALUATION_REPORT, error) from None
    return report


def read_predictions(mlflow: Mlflow, version: ModelVersion) -> StoredPredictions | None:
    """A version's test predictions; None if it was never evaluated.

    Raises:
        UserMistake: what is stored is damaged, incomplete or of another trial.
        TrackingError: MLflow is away or refuses.
    """
    if not version.run_id:
        return None
    report = read_report(mlflow, version.run_id)
    if report is None:
        return None
    _require_same_model(version, report)
    if report.get("num_pictures") == 0:
        raise UserMistake(
            f"Version {version.version} of {version.name} was evaluated without any test picture. "
            "Add a folder `test` beside `train` and search again; --force names a champion without."
        )
    if f"{EVALUATION_FOLDER}/{EVALUATION_PREDICTIONS}" not in _stored(mlflow, version.run_id):
        raise _damaged(version.run_id, EVALUATION_PREDICTIONS, FileNotFoundError("it is missing"))
    with temporary_folder() as folder:
        path = _download(mlflow, version.run_id, EVALUATION_PREDICTIONS, str(folder))
        try:
            return _parse(path, report)
        except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile) as error:
            raise _damaged(version.run_id, EVALUATION_PREDICTIONS, error) from None


def _require_same_model(version: ModelVersion, report: dict[str, Any]) -> None:
    """The report is of this very classifier, or at least of its trial.

    One run carries the classifiers of one trial from before and after calibration. Temperature and
    threshold never change which class is the most probable, so the same predictions stand for both.
    """
    if report.get("classifier_digest") == version.tags.get(DIGEST_TAG):
        return
    evaluated, trial = report.get("trial_id"), version.tags.get(_TRIAL_ID)
    if evaluated != trial:
        raise UserMistake(
            f"The evaluation on run {version.run_id} is of trial {evaluated}, and version "
            f"{version.version} of {version.name} of trial {trial}. {_again()}"
        )


def _parse(path: Path, report: dict[str, Any]) -> StoredPredictions:
    names = report["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names must be a list of names")
    # Without pickle: an artifact store is not a place to run code from.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        probabilities, labels = stored["probabilities"], stored["labels"]
        digests = [str(digest) for digest in stored["digests"].tolist()]
    _check(names, probabilities, labels, digests)
    return StoredPredictions(
        class_names=tuple(names),
        predicted=probabilities.argmax(axis=1),
        labels=labels.astype(np.int64),
        digests=tuple(digests),
        data_digest=report.get("data_digest"),
    )


def _check(
    names: Sequence[str],
    probabilities: NDArray[Any],
    labels: NDArray[Any],
    digests: Sequence[str],
) -> None:
    if not len(labels):
        raise ValueError("it holds no pictures")
    if probabilities.shape != (len(labels), len(names)) or len(digests) != len(labels):
        raise ValueError(
            f"{probabilities.shape} probabilities, {labels.shape} labels and {len(digests)} "
            f"digests do not fit {len(names)} classes"
        )
    if len(set(names)) != len(names):
        raise ValueError("class names repeat")
    if not np.issubdtype(labels.dtype, np.integer) or not np.isfinite(probabilities).all():
        raise ValueError("labels must be whole numbers, and probabilities finite")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError("a label is outside the classes")


def _stored(mlflow: Mlflow, run_id: str) -> set[str]:
    return {item.path for item in mlflow.call("list_artifacts", run_id, EVALUATION_FOLDER)}


def _download(mlflow: Mlflow, run_id: str, name: str, folder: str) -> Path:
    return Path(mlflow.call("download_artifacts", run_id, f"{EVALUATION_FOLDER}/{name}", folder))


def _damaged(run_id: str, name: str, error: Exception) -> UserMistake:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return UserMistake(
        f"{EVALUATION_FOLDER}/{name} on run {run_id} cannot be used ({reason}). {_again()}"
    )


def _again() -> str:
    return f"Run `{next_command('evaluate', 'FOLDER')}` with the folder of its search again."
