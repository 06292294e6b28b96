from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from visiontuner.data.arrays import DecodedImages, prepare_images
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.data.images import Preprocessing, normalise, read_pixels
from visiontuner.errors import DataError, TrialFailed
from visiontuner.experiment.schema import AUGMENTATIONS, NO_AUGMENTATION, Augmentation
from visiontuner.training import batches as image_workers
from visiontuner.training.batches import FeatureBatches, ImageBatches

SMALL = Preprocessing(
    resize=36, size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="bilinear"
)
STRONG = AUGMENTATIONS["strong"]
CPU = torch.device("cpu")
TRAIN = 21  # the last class has one image
Batch = tuple[Tensor, Tensor]
MakeBatches = Callable[..., ImageBatches]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = tmp_path_factory.mktemp("images")
    splits: dict[str, tuple[Sample, ...]] = {"test": ()}
    for split, count in {"train": TRAIN, "validation": 5}.items():
        samples = []
        for number in range(count):
            coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            path = f"{split}-{number}.png"
            Image.fromarray(coarse).resize((200, 150)).save(root / path)
            label = 2 if number == TRAIN - 1 else number % 2
            samples.append(Sample(path, label, f"{split}{number}"))
        splits[split] = tuple(samples)
    return ImageDataset(
        root=root, class_names=("a", "b", "c"), splits=splits, digest="0" * 64, findings=()
    )


@pytest.fixture
def store(dataset: ImageDataset, tmp_path: Path) -> DecodedImages:
    """Views to train on, pixels to evaluate."""
    return prepare_images(dataset, preprocessing=SMALL, cache=tmp_path, augmented=True)


@pytest.fixture
def make_batches(store: DecodedImages) -> Iterator[MakeBatches]:
    made: list[ImageBatches] = []

    def make(split: str = "train", **options: object) -> ImageBatches:
        defaults = {
            "preprocessing": SMALL,
            "augmentation": STRONG,
            "num_classes": 3,
            "batch_size": 4,
            "workers": 0,
            "device": CPU,
        }
        made.append(ImageBatches(store.split(split), **(defaults | options)))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


@pytest.fixture
def plain(dataset: ImageDataset, tmp_path: Path) -> ImageBatches:
    """Training images that no epoch changes."""
    unaugmented = prepare_images(dataset, preprocessing=SMALL, cache=tmp_path, augmented=False)
    return ImageBatches(
        unaugmented.split("train"),
        preprocessing=SMALL,
        augmentation=NO_AUGMENTATION,
        num_classes=3,
        batch_size=4,
        device=CPU,
    )


def epochs(batches: ImageBatches, number: int, *, seed: int = 7) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [batch for _ in range(number) for batch in batches.shuffled(generator)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(one, other)
        for mine, yours in zip(ours, theirs, strict=True)
        for one, other in zip(mine, yours, strict=True)
    )


def read(dataset: ImageDataset, split: str) -> np.ndarray:
    pixels = [read_pixels(dataset.root / s.path, SMALL) for s in dataset.splits[split]]
    return normalise(np.stack(pixels), SMALL)


def worker_pids() -> list[int]:
    """Worker processes of this one; torch gives them their name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name() == "pt_data_worker" and _runs(process.pid):
                found.append(process.pid)
    return found


def awaited(look: Callable[[], Any]) -> Any:
    """What `look` finds once it finds something: processes begin and end in their own time."""
    while not (found := look()):
        time.sleep(0.05)
    return found


def test_unaugmented_epoch_is_what_evaluation_would_read(
    plain: ImageBatches, dataset: ImageDataset
) -> None:
    expected = read(dataset, "train")
    batches = epochs(plain, 1)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 4, 4, 1]
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(7))
    inputs = torch.cat([inputs for inputs, _ in batches])
    np.testing.assert_array_equal(inputs.numpy(), expected[order])
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [dataset.splits["train"][i].label for i in order.tolist()]
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_unaugmented_epochs_have_the_order_of_features(plain: ImageBatches) -> None:
    features = torch.arange(TRAIN, dtype=torch.float32).reshape(-1, 1)
    on_features = FeatureBatches(features, plain.labels, batch_size=4)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(3):
        labels = [labels.tolist() for _, labels in plain.shuffled(ours)]
        assert labels == [labels.tolist() for _, labels in on_features.shuffled(theirs)]
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_evaluation_reads_images_in_order(make_batches: MakeBatches, dataset: ImageDataset) -> None:
    batches = make_batches("validation", batch_size=2)
    inputs = list(batches.in_order())
    assert [len(part) for part in inputs] == [2, 2, 1]
    np.testing.assert_array_equal(torch.cat(inputs).numpy(), read(dataset, "validation"))
    assert batches.labels.tolist() == [s.label for s in dataset.splits["validation"]]


def test_views_cannot_be_evaluated(make_batches: MakeBatches) -> None:
    with pytest.raises(DataError, match="kept for cropping"):
        next(make_batches("train").in_order())


def test_batches_are_channels_last(make_batches: MakeBatches, plain: ImageBatches) -> None:
    for batches in (make_batches(), plain):
        inputs, _ = epochs(batches, 1)[0]
        assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_epoch_has_every_image_once_with_its_label(make_batches: MakeBatches) -> None:
    batches = make_batches(augmentation=AUGMENTATIONS["light"])
    labels = torch.cat([labels for _, labels in epochs(batches, 1)])
    assert labels.bincount().tolist() == [10, 10, 1]
    assert labels.dtype == torch.int64


def test_mixing_gives_shares_of_classes(make_batches: MakeBatches) -> None:
    for inputs, labels in epochs(make_batches(augmentation=Augmentation(cutmix=1)), 1):
        assert (labels.dtype, labels.shape) == (torch.float32, (len(inputs), 3))
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(inputs)))


def test_seed_of_the_generator_decides_all(make_batches: MakeBatches) -> None:
    first = epochs(make_batches(), 2)
    assert same(first, epochs(make_batches(), 2))
    assert not same(first, epochs(make_batches(), 2, seed=8))
    assert not same(first[:6], first[6:])


def test_batch_larger_than_the_data_set_is_one_batch(make_batches: MakeBatches) -> None:
    batches = epochs(make_batches(batch_size=1000), 1)
    assert [len(labels) for _, labels in batches] == [TRAIN]


@pytest.mark.parametrize(
    ("asked", "cores", "workers"),
    [(64, 96, 16), (64, 8, 8), (3, 96, 3), (0, 96, 0), (None, 96, 10), (None, 4, 4)],
)
def test_there_are_never_more_than_16_workers_or_one_a_core(monkeypatch, asked, cores, workers):
    monkeypatch.setattr(image_workers, "available_cpus", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 40)
    assert image_workers.choose_workers(asked, torch.device("cpu")) == workers


@pytest.mark.slow
def test_workers_make_the_same_batches(make_batches: MakeBatches) -> None:
    expected = epochs(make_batches(workers=0), 3)
    before = torch.get_rng_state()
    batches = make_batches(workers=2)
    assert same(epochs(batches, 3), expected)
    # Dropout draws from it: the same training with and without workers.
    assert torch.equal(torch.get_rng_state(), before)
    assert batches.take_notes() == []
    assert worker_pids()
    batches.close()
    assert worker_pids() == []


@pytest.mark.slow
def test_epoch_that_was_left_early_does_not_disturb_the_next(make_batches: MakeBatches) -> None:
    batches, expected = make_batches(workers=2), make_batches(workers=0)
    for either in (batches, expected):
        next(either.shuffled(torch.Generator().manual_seed(1)))
    assert same(epochs(batches, 1), epochs(expected, 1))


@pytest.mark.slow
def test_killed_worker_is_one_line_and_the_next_epoch_has_new_ones(
    make_batches: MakeBatches,
) -> None:
    batches = make_batches(workers=2, batch_size=1)
    generator = torch.Generator().manual_seed(7)
    with pytest.raises(TrialFailed) as failure:  # noqa: PT012
        for number, _ in enumerate(batches.shuffled(generator)):
            if number == 1:
                os.kill(awaited(worker_pids)[0], signal.SIGKILL)
    assert awaited(lambda: worker_pids() == [])
    assert "A process that prepares images died" in str(failure.value)
    assert "training.workers=0" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert same(epochs(batches, 1), epochs(make_batches(batch_size=1), 1))


@pytest.mark.slow
def test_full_shared_memory_costs_speed_alone(make_batches: MakeBatches) -> None:
    batches = make_batches(workers=2)
    generator = torch.Generator().manual_seed(7)
    made = []
    for number, batch in enumerate(batches.shuffled(generator)):
        made.append(batch)
        if number == 0:
            for pid in worker_pids():  # an image has 3,072 bytes
                psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))
    made += batches.shuffled(generator)
    assert same(made, epochs(make_batches(), 2))
    (note,) = batches.take_notes()
    assert "/dev/shm is full: batches take the slower way" in note
    assert batches.take_notes() == []  # said once


def test_without_any_shared_memory_this_process_prepares_the_images(
    make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_workers, "SHARED_MEMORY", Path("/proc"))  # 0 bytes are free there
    batches = make_batches(workers=2)
    assert same(epochs(batches, 2), epochs(make_batches(), 2))
    assert worker_pids() == []
    (note,) = batches.take_notes()
    assert "this process prepares the images" in note


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_damaged_view_is_one_line_with_its_name(
    make_batches: MakeBatches, store: DecodedImages, workers: int
) -> None:
    batches = make_batches(workers=workers)
    file = store.folder / "train.views"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError) as failure:
        epochs(batches, 1)
    assert str(failure.value).startswith("train-")
    assert "is damaged in" in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_store_deleted_before_the_workers_come_is_one_line(
    make_batches: MakeBatches, store: DecodedImages
) -> None:
    in_process, by_workers = make_batches(workers=0), make_batches(workers=2)
    shutil.rmtree(store.folder)
    epochs(in_process, 1)  # mapped before
    with pytest.raises(DataError) as failure:
        epochs(by_workers, 1)
    assert worker_pids() == []
    assert "holds no decoded images" in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_workers_end_with_their_training_and_know_nothing_of_its_script(
    store: DecodedImages, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal
            from pathlib import Path

            with open({str(tmp_path / "runs")!r}, "a") as runs:
                runs.write("once more ")

            import psutil, torch
            from visiontuner.data.arrays import DecodedImages
            from visiontuner.experiment.schema import AUGMENTATIONS
            from visiontuner.training.batches import ImageBatches

            store = DecodedImages.open(Path({str(store.folder)!r}))
            batches = ImageBatches(
                store.split("train"), preprocessing=store.preprocessing, num_classes=3,
                augmentation=AUGMENTATIONS["light"], batch_size=4, workers=2,
                device=torch.device("cpu"),
            )
            for _ in batches.shuffled(torch.Generator()):
                children = psutil.Process().children(recursive=True)
                print(*[child.pid for child in children], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 3  # two workers and their server
    assert (tmp_path / "runs").read_text() == "once more "
    while any(_runs(pid) for pid in pids):
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
