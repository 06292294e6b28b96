"""An evaluation folder -> metrics, tags and artifacts on the run of the trial that it is about."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontuner.commands import next_command
from visiontuner.errors import DataError
from visiontuner.layout import EVALUATION_FOLDER, EVALUATION_REPORT
from visiontuner.tracking.client import Store
from visiontuner.tracking.plan import Point
from visiontuner.tracking.runs import log_batch

TEST_LOOKS = "visiontuner.test_looks"
EVALUATION_DIGEST = "visiontuner.evaluation_digest"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a search folder holds of an evaluation.

    Args:
        digest: of report.json; by it a repetition is known.
        looks: how many times the test pictures of the search were looked at.
        report: the whole of report.json.
    """

    folder: Path
    digest: str
    trial_id: str
    classifier_digest: str
    looks: int
    report: dict[str, Any]


def read_evaluation(folder: Path) -> Evaluation:
    """Read FOLDER/report.json.

    Raises:
        DataError: it is damaged.
    """
    try:
        content = (folder / EVALUATION_REPORT).read_bytes()
        report = json.loads(content)
        return Evaluation(
            folder=folder,
            digest=hashlib.sha256(content).hexdigest(),
            trial_id=str(report["trial_id"]),
            classifier_digest=str(report["classifier_digest"]),
            looks=int(report["looks"]),
            report=report,
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} is damaged ({type(error).__name__}). Evaluate again with "
            f"`{next_command('evaluate', folder.parent)}`."
        ) from None


def log_evaluation(store: Store, evaluation: Evaluation, *, run_id: str) -> None:
    """Write metrics with their intervals, every file of the folder, and the number of looks.

    Repeating it changes nothing: the digest is the last thing that is written.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    tags = store.call("get_run", run_id).data.tags
    if tags.get(EVALUATION_DIGEST) == evaluation.digest:
        return
    now = round(float(evaluation.report.get("time", time.time())) * 1000)
    points = [
        Point(key, value, now, max(1, evaluation.looks))
        for key, value in metrics(evaluation).items()
    ]
    # Numbers do not wait for files.
    log_batch(store, run_id, points, {}, {TEST_LOOKS: str(evaluation.looks)})
    store.call("log_artifacts", run_id, str(evaluation.folder), EVALUATION_FOLDER)
    store.call("set_tag", run_id, EVALUATION_DIGEST, evaluation.digest)


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """`test_NAME` with `_low` and `_high`, temperature and threshold, as MLflow gets them."""
    values: dict[str, float] = {"temperature": float(evaluation.report["temperature"])}
    intervals = dict(evaluation.report["metrics"])
    threshold = evaluation.report.get("threshold") or {}
    intervals["precision_above_threshold"] = threshold.get("precision")
    intervals["coverage_above_threshold"] = threshold.get("coverage")
    for name, interval in intervals.items():
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            if interval and interval.get(part) is not None:
                values[f"test_{name}{suffix}"] = float(interval[part])
    if threshold.get("value") is not None:
        values["confidence_threshold"] = float(threshold["value"])
    return values


def version_tags(evaluation: Evaluation) -> dict[str, str]:
    """What a registered version says of its evaluation."""
    accuracy = (evaluation.report["metrics"].get("accuracy") or {}).get("value")
    tags = {TEST_LOOKS: str(evaluation.looks)}
    if accuracy is not None:
        tags |= {
            "visiontuner.evaluated": "true",
            "visiontuner.test_accuracy": f"{accuracy:.4f}",
            "visiontuner.test_pictures": str(evaluation.report["num_pictures"]),
        }
    return tags
