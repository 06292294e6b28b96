"""What every test shares: nothing of the user's own machine reaches a test."""

from __future__ import annotations

from pathlib import Path

import pytest

# Read by MLflow, Ray or visiontuner itself; a developer's own would change what a test sees.
OUTSIDE = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_ADDRESS",
    "VISIONTUNER_CACHE",
)


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
