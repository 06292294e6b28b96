"""Training on a GPU against a plain loop in the manner of torchvision's reference recipe.

ResNet-50 at 224 px with SGD and bf16, random weights. On made-up images in memory our own loop
and the plain one take turns, a round each; then our loop trains from JPEG files. The plain loop is
written here: forward and loss under autocast, channels last, backward, step. It never reads the
loss, as the reference recipe does, so that its host never waits: that is the harder comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import Row, Skipped, report, scratch
from PIL import Image

if TYPE_CHECKING:
    import torch

TARGETS = ("at least 0.9 x the plain loop in the same minute", "the share of it, stated")
# On whatever device there is: only so that the commands are tried.
SMALL = {
    "network": "resnet18",
    "batch": 4,
    "size": 64,
    "steps": 2,
    "rounds": 1,
    "files": 16,
    "needs_gpu": False,
}
CLASSES = 10

Batch = tuple["torch.Tensor", "torch.Tensor"]


def measure(
    *,
    network: str = "resnet50",
    batch: int = 256,
    size: int = 224,
    steps: int = 40,
    rounds: int = 3,
    files: int = 4096,
    workers: int | None = None,
    needs_gpu: bool = True,
) -> dict[str, Any]:
    import torch

    if needs_gpu and not torch.cuda.is_available():
        raise Skipped("there is no GPU here")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as a trial does, and torchvision's recipe
    with scratch() as folder:
        speeds = take_turns(network, batch, size, steps, rounds, device)
        speeds["files"] = from_files(network, batch, size, rounds, files, workers, device, folder)
    ours, plain, read = (median(speeds[name]) for name in ("ours", "plain", "files"))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    what = f"{network}, {size} px, batch {batch}, bf16, {where}"
    return report(
        [
            Row(
                what=f"{what}: training on made-up images in memory",
                target=TARGETS[0],
                result=f"{ours / plain:.2f} x: {ours:,.0f} against {plain:,.0f} images/s",
                met=ours >= 0.9 * plain,
            ),
            Row(
                what=f"the same from {files} JPEG files, cropped and flipped by the loader",
                target=TARGETS[1],
                result=f"{read / ours:.0%}: {read:,.0f} images/s",
            ),
        ],
        speeds=speeds,
    )


def take_turns(
    network: str, batch: int, size: int, steps: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Images/s of each round in memory, ours and the plain loop's."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = (torch.arange(batch) % CLASSES).to(device)

    def in_memory() -> Iterator[Batch]:
        for _ in range(steps):
            yield images, labels

    loops = {"ours": our_loop(network, steps, device), "plain": plain_loop(network, device)}
    for loop in loops.values():
        loop(in_memory())  # warm up: algorithms are chosen, memory is taken
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            speeds[name].append(timed(loop, in_memory(), device))
    return speeds


def timed(
    loop: Callable[[Iterable[Batch]], int], batches: Iterable[Batch], device: torch.device
) -> float:
    """Images/s from the first step to the end of the last one on the device."""
    import torch

    began = time.perf_counter()
    count = loop(batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def our_loop(network: str, steps: int, device: torch.device) -> Callable[[Iterable[Batch]], int]:
    """Visiontuner's epoch, everything trained, as `model.train: all` has it."""
    from visiontuner.experiment.schema import Training
    from visiontuner.training.loop import TrainingStep, train_epoch
    from visiontuner.training.optimisation import make_optimizer, make_schedule

    module = make_network(network).to(device)
    settings = Training(optimizer="sgd", learning_rate=0.01, precision="bf16")
    optimizer = make_optimizer(module, settings)
    schedule = make_schedule(optimizer, settings, total_steps=1_000_000)
    step = TrainingStep(module, optimizer, schedule, settings)

    def loop(batches: Iterable[Batch]) -> int:
        return train_epoch(step, batches, epoch=1, steps_per_epoch=steps).samples

    return loop


def plain_loop(network: str, device: torch.device) -> Callable[[Iterable[Batch]], int]:
    """What torchvision's references/classification/train.py does for a batch, in bf16.

    Source: https://github.com/pytorch/vision/tree/main/references/classification
    """
    import torch

    module = make_network(network).to(device).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def loop(batches: Iterable[Batch]) -> int:
        count = 0
        for images, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(module(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += len(images)
        loss.item()
        return count

    return loop


def make_network(name: str) -> torch.nn.Module:
    import torch
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    return network.to(memory_format=torch.channels_last)


def from_files(
    network: str,
    batch: int,
    size: int,
    rounds: int,
    files: int,
    workers: int | None,
    device: torch.device,
    folder: Path,
) -> list[float]:
    """Images/s of each epoch over JPEG files, after the first one."""
    import torch

    from visiontuner.data.arrays import prepare_images
    from visiontuner.data.dataset import load_dataset
    from visiontuner.data.images import Preprocessing
    from visiontuner.experiment.schema import AUGMENTATIONS
    from visiontuner.training.batches import ImageBatches

    write_files(folder / "images", files, side=size * 2)
    imagenet = Preprocessing(
        resize=size * 8 // 7,
        size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
    )
    dataset = load_dataset(folder / "images", cache=folder / "cache")
    store = prepare_images(dataset, preprocessing=imagenet, cache=folder / "cache", augmented=True)
    loader = ImageBatches(
        store.split("train"),
        preprocessing=imagenet,
        augmentation=AUGMENTATIONS["light"],
        num_classes=CLASSES,
        batch_size=batch,
        workers=workers,
        device=device,
    )
    generator = torch.Generator().manual_seed(0)
    loop = our_loop(network, -(-files // batch), device)
    loop(loader.shuffled(generator))  # starts the workers
    speeds = [timed(loop, loader.shuffled(generator), device) for _ in range(rounds)]
    loader.close()
    return speeds


def write_files(root: Path, number: int, *, side: int) -> None:
    """JPEG files of smooth shapes for training, and a few for validation."""
    rng = np.random.default_rng(0)
    for split, count in {"train": number, "valid": CLASSES}.items():
        for index in range(count):
            path = root / split / f"class{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
            image.save(path, quality=90)
