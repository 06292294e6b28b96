"""Small real networks and images, shared because an export takes seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.model.backbones import Backbone, load_backbone


@pytest.fixture(scope="session")
def cache(shared_cache: Path) -> Path:
    return shared_cache


@pytest.fixture(scope="session")
def resnet(cache: Path) -> Backbone:
    """resnet18 with random weights at 64 pixels."""
    return load_backbone("resnet18", weights="none", image_size=64, cache=cache)


@pytest.fixture(scope="session")
def bundled(cache: Path) -> Backbone:
    return load_backbone("efficientnet_lite0", cache=cache)


def _draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., ImageDataset]:
    """Images of two classes, so many a split, as a data set."""

    def make(train: int = 6, validation: int = 4, test: int = 0) -> ImageDataset:
        root = tmp_path / "images"
        splits = {}
        for split, count in {"train": train, "validation": validation, "test": test}.items():
            samples = []
            for number in range(count):
                path = f"{split}/{'ab'[number % 2]}/{number:04d}.png"
                _draw(root / path, seed=number + 1000 * len(split))
                content = (root / path).read_bytes()
                samples.append(Sample(path, number % 2, hashlib.sha256(content).hexdigest()))
            splits[split] = tuple(samples)
        names = " ".join(sample.digest for part in splits.values() for sample in part)
        return ImageDataset(
            root=root,
            class_names=("a", "b"),
            splits=splits,
            digest=hashlib.sha256(names.encode()).hexdigest(),
            findings=(),
        )

    return make
