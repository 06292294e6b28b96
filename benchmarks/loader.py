"""A network training on 12-megapixel photographs, against its own speed on images in memory.

The photographs are made here. Decoding them once is the first epoch's price and told apart. Then
training on images (views decoded, cropped and flipped by visiontuner) and on one batch that never
changes take turns, an epoch each; the speeds are medians.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import Row, report, scratch
from PIL import Image

if TYPE_CHECKING:
    import torch

TARGETS = ("at least 0.9 x the network alone",)
SMALL = {"photographs": 8, "epochs": 1, "batch": 4}
WIDTH, HEIGHT = 4000, 3000
CLASSES = 4


def measure(*, photographs: int = 128, epochs: int = 3, batch: int = 32) -> dict[str, Any]:
    import torch

    from visiontuner.data.arrays import prepare_images
    from visiontuner.data.dataset import load_dataset
    from visiontuner.data.images import Preprocessing
    from visiontuner.experiment.schema import AUGMENTATIONS
    from visiontuner.training.batches import ImageBatches

    with scratch() as folder:
        megabytes = take_photographs(folder / "photographs", photographs)
        dataset = load_dataset(folder / "photographs", cache=folder / "cache")
        imagenet = Preprocessing(
            resize=256,
            size=224,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            interpolation="bilinear",
        )
        store = prepare_images(
            dataset, preprocessing=imagenet, cache=folder / "cache", augmented=True
        )
        loaders = {
            name: ImageBatches(
                store.split("train"),
                preprocessing=imagenet,
                augmentation=AUGMENTATIONS["light"],
                num_classes=CLASSES,
                batch_size=batch,
                workers=workers,
                device=torch.device("cpu"),
            )
            for name, workers in {"default": None, "0 workers": 0, "2 workers": 2}.items()
        }
        speeds = alternate(loaders, epochs, batch, photographs)
    alone = median(speeds["alone"])
    rows = [
        Row(
            what=f"resnet18, 224 px, batch {batch}, {torch.get_num_threads()} threads: training "
            f"on {photographs} photographs of 12 megapixels ({name})",
            target=TARGETS[0] if name == "default" else "",
            result=f"{median(values) / alone:.2f} x: {median(values):.1f} of {alone:.1f} images/s",
            met=median(values) >= 0.9 * alone if name == "default" else None,
        )
        for name, values in speeds.items()
        if name != "alone"
    ]
    decoded = Row(
        what="before the first epoch: every photograph decoded once",
        target="",
        result=f"{store.seconds:.1f} s, {store.computed / store.seconds:.1f} images/s "
        f"({megabytes:.1f} MB each)",
    )
    return report([*rows, decoded], speeds=speeds, seconds=store.seconds)


def take_photographs(root: Path, number: int) -> float:
    """So many 12-megapixel JPEG files for training and a few for validation; their mean MB."""
    rng = np.random.default_rng(0)
    scenes = [_scene(rng) for _ in range(2)]
    sizes = []
    for split, count in {"train": number, "valid": 2 * CLASSES}.items():
        for index in range(count):
            path = root / split / f"class{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            across, down = int(rng.integers(WIDTH)), int(rng.integers(HEIGHT))
            scene = np.roll(scenes[index % len(scenes)], (down, across), axis=(0, 1))
            Image.fromarray(scene).save(path, quality=92)
            sizes.append(path.stat().st_size / 1e6)
    return float(np.mean(sizes))


def _scene(rng: np.random.Generator) -> np.ndarray:
    """Large shapes, texture and a sensor's noise: uint8 (HEIGHT, WIDTH, 3)."""
    scene = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((8, 110), (80, 40), (800, 16)):
        coarse = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        shapes = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        scene += (np.asarray(shapes, np.float32) - 128) * (strength / 128)
    scene += rng.normal(128, 4, scene.shape)
    return np.clip(scene, 0, 255).astype(np.uint8)


def alternate(
    loaders: dict[str, Any], epochs: int, batch: int, photographs: int
) -> dict[str, list[float]]:
    """Images/s of each epoch, by what the network was trained on."""
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18(num_classes=CLASSES).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % CLASSES

    def in_memory() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(photographs // batch):
            yield images, labels

    def epoch(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        began, count = time.perf_counter(), 0
        for inputs, targets in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
            count += len(inputs)
        return count / (time.perf_counter() - began)

    network.train()
    epoch(in_memory())  # warm up
    speeds: dict[str, list[float]] = {name: [] for name in ("alone", *loaders)}
    for loader in loaders.values():
        epoch(loader.shuffled(generator))  # starts the workers
    for _ in range(epochs):
        speeds["alone"].append(epoch(in_memory()))
        for name, loader in loaders.items():
            speeds[name].append(epoch(loader.shuffled(generator)))
    for loader in loaders.values():
        loader.close()
    return speeds
