"""What test_killed_training.py runs in a process of its own, and kills.

It is given FOLDER, STORE (None for features), WORKERS, and KILL_AT: the step of this process after
which it is killed, or None.
"""

import json
import os
import signal
from multiprocessing import forkserver

import torch
from torch import nn

from visiontuner.data.arrays import PictureStore
from visiontuner.experiment.schema import Augmentation, Training
from visiontuner.training.batches import FeatureBatches, PictureBatches
from visiontuner.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from visiontuner.training.loop import Fit

FOLDER, STORE, WORKERS, KILL_AT = (
    globals()[name] for name in ("FOLDER", "STORE", "WORKERS", "KILL_AT")
)

CLASSES = 3
SETTINGS = Training(
    epochs=6,
    batch_size=8,
    learning_rate=0.02,
    warmup_fraction=0.1,
    ema_decay=0.9,
    gradient_clip=1.0,
    label_smoothing=0.1,
    micro_batch_size=5,
)
AUGMENTATION = Augmentation(policy="trivial", erasing=0.2, mixup=0.2)


def feature_batches(samples: int, seed: int) -> FeatureBatches:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    features = torch.randn(samples, 6, generator=generator) + labels[:, None]
    return FeatureBatches(features, labels, batch_size=SETTINGS.batch_size)


def picture_batches(store: PictureStore, split: str) -> PictureBatches:
    return PictureBatches(
        store.split(split),
        preprocessing=store.preprocessing,
        augmentation=AUGMENTATION,
        num_classes=CLASSES,
        batch_size=SETTINGS.batch_size,
        workers=WORKERS,
        device=torch.device("cpu"),
    )


def make_training(on_step) -> Fit:
    torch.manual_seed(0)
    if STORE is None:
        network: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        train, validation = feature_batches(33, 0), feature_batches(12, 1)
    else:
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
        )
        store = PictureStore.open(STORE)
        train, validation = (picture_batches(store, name) for name in ("train", "validation"))
    network.append(nn.Linear(8, CLASSES))
    return Fit(network, train, validation, SETTINGS, num_classes=CLASSES, seed=3, on_step=on_step)


def main() -> None:
    torch.set_num_threads(1)
    steps = 0

    def on_step(_done) -> None:
        nonlocal steps
        steps += 1
        if steps == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    training = make_training(on_step)
    if (FOLDER / CHECKPOINT_FILE).exists():
        training.load_state_dict(load_checkpoint(FOLDER))
    for result in training.epochs():
        row = result.metrics.to_dict() | {"epoch": result.epoch, "is_kept": result.is_kept}
        row["logits"] = result.validation_logits.tolist()
        with (FOLDER / "epochs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        save_checkpoint(FOLDER, training.state_dict())


# Workers come from the server that started this process; another one would import torch first.
forkserver._forkserver.ensure_running = lambda: None
main()
