"""A search that writes its journal alone, as in a training job that reaches no MLflow."""

from pathlib import Path

from visiontuner.locations import NO_TRACKING
from visiontuner.workflow.observing import Silent
from visiontuner.workflow.recording import BackgroundTracking


def test_nothing_is_written_and_it_is_said(tmp_path: Path) -> None:
    tracking = BackgroundTracking(tmp_path, NO_TRACKING, None, Silent())
    assert tracking.close() == "MLFLOW_TRACKING_URI is 'none'."
    assert tracking.run_ids == {}
    assert list(tmp_path.iterdir()) == []
