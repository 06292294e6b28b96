"""What works without the SageMaker SDK: everything but the submitting of jobs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Stands in the SDK's place for a command and all processes that it starts.
POISON = """
from pathlib import Path

Path(__file__).with_name("imported").touch()
raise ImportError("the SageMaker SDK")
"""


@pytest.mark.usefixtures("aws")
def test_a_local_search_and_questions_to_models_never_import_the_sdk(
    images: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    new_database: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "sagemaker.py").write_text(POISON)
    experiment = {
        **small_search,
        "data": {"source": str(images)},
        "training": {"epochs": 1},
        "search": {**small_search["search"], "trials": 1},
    }
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(poison), os.environ.get("PYTHONPATH")])),
        "VISIONTUNER_CACHE": str(shared_cache),
        "MLFLOW_TRACKING_URI": new_database(tmp_path / "mlflow.db"),
    }

    def visiontuner(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "visiontuner", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert not (poison / "imported").exists(), arguments
        return done.stdout + done.stderr

    image = str(next(images.rglob("*.png")))
    assert "MLflow model: models:/colours/1" in visiontuner(
        "tune", "--experiment", "experiment.yaml", "--output", "search"
    )
    assert "red" in visiontuner("query", "--model", "search/classifier", image)
    assert "nobody" in visiontuner("query", "nobody", image)  # it gets as far as SageMaker
    assert visiontuner("jobs").startswith("None.")
    assert "There is no training job 'nobody'" in visiontuner("attach", "nobody")
