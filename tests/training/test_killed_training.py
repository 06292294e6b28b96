"""A training that is killed at random steps and goes on gives the numbers of one that is not."""

import json
import multiprocessing
import random
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontuner.data.arrays import prepare_pictures
from visiontuner.data.dataset import load_dataset
from visiontuner.data.images import Preprocessing

CHILD = Path(__file__).with_name("killed_child.py")
# Its 33 training pictures by 8 are 5 steps an epoch, 4 where the last single one joins.
EPOCHS, STEPS = 6, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """33 + 12 little pictures in three classes, decoded."""
    cache, root = (tmp_path_factory.mktemp(name) for name in ("cache", "pictures"))
    generator = np.random.default_rng(0)
    for split, count in (("train", 11), ("valid", 4)):
        for number, name in enumerate(("daisy", "rose", "tulip")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 160, (40, 48, 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    preprocessing = Preprocessing(
        resize=36, size=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear"
    )
    pictures = prepare_pictures(
        load_dataset(root, cache=cache),
        preprocessing=preprocessing,
        cache=cache,
        augmented=True,
    )
    return pictures.folder


def run_child(folder: Path, *, kill_at: int | None = None, **given) -> int:
    """Its exit code. Children come from a server that has imported torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "visiontuner.training.batches"])
    child = context.Process(
        target=runpy.run_path,
        args=(str(CHILD),),
        kwargs={"init_globals": {"FOLDER": folder, "KILL_AT": kill_at, **given}},
    )
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def epochs_of(folder: Path) -> dict[int, dict]:
    """By epoch; one that was trained twice must have given the same numbers twice."""
    epochs: dict[int, dict] = {}
    for line in (folder / "epochs.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["epoch_seconds"], row["images_per_second"]
        assert epochs.setdefault(row["epoch"], row) == row
    return epochs


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory) -> dict[bool, dict[int, dict]]:
    """The epochs of a training on features (False) and on pictures, without workers (True)."""
    epochs = {}
    for on_pictures in (False, True):
        folder = tmp_path_factory.mktemp("whole")
        assert run_child(folder, STORE=store if on_pictures else None, WORKERS=0) == 0
        epochs[on_pictures] = epochs_of(folder)
    return epochs


@pytest.mark.parametrize(
    ("on_pictures", "workers"),
    [(False, 0), (True, 0)],  # with workers: tests/test_train.py
    ids=["features", "pictures"],
)
def test_a_training_killed_five_times_equals_an_uninterrupted_one(
    tmp_path, store, uninterrupted, on_pictures, workers
):
    given = {"STORE": store if on_pictures else None, "WORKERS": workers}
    # Within two epochs of steps: no run but the last one ends, and most have an epoch to keep.
    draw = random.Random(f"{on_pictures} {workers}")
    for _ in range(5):
        kill_at = draw.randint(1, 2 * STEPS)
        assert run_child(tmp_path, kill_at=kill_at, **given) == -signal.SIGKILL
    assert run_child(tmp_path, **given) == 0
    epochs = epochs_of(tmp_path)
    assert list(epochs) == list(range(1, EPOCHS + 1))
    assert epochs == uninterrupted[on_pictures]
    assert epochs[1]["train_loss"] != epochs[2]["train_loss"]
