"""What every test shares: nothing of the user's own machine reaches a test."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    "VISIONTUNER_CHANNEL",
)


# Old names in Ray's libraries, sockets left to the collector.
RAYS_OWN_WARNINGS = (
    "ignore::DeprecationWarning:ray",
    "ignore::FutureWarning:ray",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where Ray runs in the test's own process, its own warnings are no errors."""
    for item in items:
        if "running_ray" in getattr(item, "fixturenames", ()):
            for warning in RAYS_OWN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OUTSIDE, *(name for name in os.environ if name.startswith("RAY_"))):
        monkeypatch.delenv(name, raising=False)
    # mlflow.pyfunc.load_model puts a model's code first.
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One VISIONTUNER_CACHE for all searches of a session: a network is exported once."""
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Makes empty MLflow databases and gives their URIs; MLflow itself takes seconds for each."""
    from visiontuner.tracking.client import create_database

    ready = tmp_path_factory.mktemp("database") / "mlflow.db"
    create_database(f"sqlite:///{ready}")

    def make(path: Path) -> str:
        shutil.copyfile(ready, path)
        return f"sqlite:///{path}"

    return make


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    """One Ray for a module: a search uses the one that is there."""
    from visiontuner.search.cluster import RayForSearch

    with RayForSearch("local") as ray:
        ray.start()
        yield


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noisy red, green and blue pictures: 10 for training, 4 for validation a class."""
    root = tmp_path_factory.mktemp("data") / "colours"
    draw_pictures(root)
    return root


def draw_pictures(root: Path, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for split, count in {"train": 10, "valid": 4}.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 30, (32, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="session")
def small_search() -> dict[str, object]:
    """An experiment, but for its data, that needs no download and takes seconds."""
    return {
        "name": "colours",
        "model": {"backbone": "resnet18", "weights": "none", "image_size": 32},
        "training": {"epochs": 8, "learning_rate": 0.03, "batch_size": 16},
        "search": {
            "trials": 3,
            "algorithm": "random",
            "scheduler": "none",
            "space": {"learning_rate": {"low": 0.01, "high": 0.1, "scale": "log"}},
        },
    }
