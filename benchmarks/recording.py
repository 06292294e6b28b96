"""What recording a training costs: time, with it on and off in turn, and the size of its file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import Row, report
from torch import nn

from visiontuner.experiment import Training
from visiontuner.model.backbone import load_backbone
from visiontuner.model.network import Network, build_network, parameter_groups
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.fit import Fit, linear_head
from visiontuner.training.recording.recorder import Recorder
from visiontuner.training.recording.records import Recording
from visiontuner.training.recording.steps import MOST_STEPS as MOST_TIMES
from visiontuner.training.recording.steps import StepTimes
from visiontuner.training.recording.system import MOST_SAMPLES
from visiontuner.training.recording.tensors import MOST_STEPS
from visiontuner.training.watch import Part, Watch

NETWORKS = ("resnet18", "efficientnet_lite0")
CLASSES, BATCH = 10, 8
EVERY = 50
MOST_TIME, MOST_STEP_TIME, MOST_BYTES = 0.03, 0.01, 20_000_000

TARGETS = ("at most 3 % of training time", "at most 1 % of training time", "at most 20 MB")
SMALL = {"networks": ("resnet18",), "size": 32, "rounds": 1, "full": False}


class _EverySecond(Watch):
    """Where the time goes, of every second step: its neighbours are not watched."""

    def __init__(self, network: nn.Module, _folder: Path) -> None:
        self.times = StepTimes(torch.device("cpu"), began=time.perf_counter())
        self._on = False

    def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
        self.times.epoch_begins()

    def spent_on(self, part: Part) -> None:
        if self._on:
            self.times.spent_on(part)

    def step_begins(self, step: int, inputs: torch.Tensor) -> None:
        if self._on:
            self.times.step_begins(step, len(inputs))

    def step_ends(self) -> None:
        if self._on:
            self.times.step_ends()
        self._on = not self._on


def _recorder(network: nn.Module, folder: Path) -> Recorder:
    return Recorder(folder, network, every_steps=EVERY, began=time.perf_counter())


def measure(
    *, networks: tuple[str, ...] = NETWORKS, size: int = 224, rounds: int = 3, full: bool = True
) -> dict[str, Any]:
    """Trainings of 50 steps, with recording off and on in turn; and the file at its largest."""
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in networks:
        details[name] = found = _costs(name, size=size, rounds=rounds)
        rows += _rows(name, size, found)
    if full:
        size_bytes, described = _size_of_resnet50()
        details["size"] = {"bytes": size_bytes, "of": described}
        rows.append(
            Row(
                what=f"recording.npz of 100 epochs of resnet50: {described}",
                target=TARGETS[2],
                result=f"{size_bytes / 1e6:.2f} MB",
                met=size_bytes <= MOST_BYTES,
            )
        )
    return report(rows, **details)


def _rows(name: str, size: int, found: dict[str, float]) -> list[Row]:
    return [
        Row(
            what=f"{name}, {size} px, batch {BATCH}: recording on against off",
            target=TARGETS[0],
            result=f"{found['recording']:+.2%} (a step {found['step_seconds']:.3f} s; one that is "
            f"recorded {found['recorded_step_seconds']:.3f} s more, which is "
            f"{found['recorded_steps_alone']:.2%} of {EVERY})",
            met=found["recording"] <= MOST_TIME,
        ),
        Row(
            what=f"{name}: steps that are timed against those between them",
            target=TARGETS[1],
            result=f"{found['step_times_in_turn']:+.2%} (the clock's calls alone "
            f"{found['clock_calls']:.4%})",
            met=found["step_times_in_turn"] <= MOST_STEP_TIME,
        ),
    ]


def _costs(name: str, *, size: int, rounds: int) -> dict[str, float]:
    """Shares of the training's time."""
    off, recorded, timed, between = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            off.append(_steps(_network(name, size), lambda *_: Watch(), Path(folder), size))
            recorded.append(_steps(_network(name, size), _recorder, Path(folder), size))
            seconds = _steps(_network(name, size), _EverySecond, Path(folder), size)
            timed += seconds[2::2]  # the first step stands in no list: it is slow anyway
            between += seconds[1::2]
    usual = median(s for run in off for s in run)
    with_it = median(s for run in recorded for s in run[:-1])
    extra = median(run[-1] for run in recorded) - with_it
    return {
        "step_seconds": usual,
        "recorded_step_seconds": extra,
        "recording": (with_it + extra / EVERY) / usual - 1,
        "recorded_steps_alone": extra / EVERY / usual,
        "step_times_in_turn": median(timed) / median(between) - 1,
        "clock_calls": _stamps_alone() / usual,
    }


def _steps(
    network: Network, make: Callable[[nn.Module, Path], Watch], folder: Path, size: int
) -> list[float]:
    """Seconds of every step but the first, up to the 50th, which is recorded."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH * 4, 3, size, size, generator=generator)
    data = _Repeated(images, torch.arange(BATCH * 4) % CLASSES, steps=EVERY)
    settings = Training(epochs=1, batch_size=BATCH, schedule="constant")
    stamps = [time.perf_counter()]
    watch = make(network, folder)
    training = Fit(
        network,
        data,
        FeatureBatches(images[:2], torch.arange(2), batch_size=2),
        settings,
        num_classes=CLASSES,
        seed=0,
        parameter_groups=parameter_groups(network, settings),
        on_step=lambda _done: stamps.append(time.perf_counter()),
        watch=watch,
    )
    next(training.epochs())
    if isinstance(watch, Recorder):
        watch.close()
    return np.diff(stamps).tolist()


class _Repeated(FeatureBatches):
    """The same few pictures for as many steps as are asked for."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, *, steps: int) -> None:
        every = labels.repeat(math.ceil(steps / 4))[: steps * BATCH]
        super().__init__(images, every, batch_size=BATCH)
        self._steps = steps

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(self._steps):
            rows = slice(step % 4 * BATCH, (step % 4 + 1) * BATCH)
            yield self.features[rows], self.labels[rows]


def _network(name: str, size: int) -> Network:
    bundled = name == "efficientnet_lite0"
    backbone = load_backbone(
        name,
        weights="default" if bundled else "none",
        image_size=size,
        cache=Path(tempfile.gettempdir()),
    )
    head = linear_head(backbone.feature_dim, CLASSES, dropout=0.0, seed=0)
    return build_network(backbone, head, train="all")


def _stamps_alone(steps: int = 20_000) -> float:
    """Seconds that the stamps of one step take, without a step between them."""
    times = StepTimes(torch.device("cpu"), began=time.perf_counter())
    times.epoch_begins()
    began = time.perf_counter()
    for step in range(1, steps + 1):
        for part in ("data", "to_device", "data"):
            times.spent_on(part)  # type: ignore[arg-type]
        times.step_begins(step, BATCH)
        for part in ("forward", "backward", "optimizer", "reporting"):
            times.spent_on(part)  # type: ignore[arg-type]
        times.step_ends()
    return (time.perf_counter() - began) / steps


def _size_of_resnet50() -> tuple[int, str]:
    """A whole file: real statistics of two steps of a ResNet-50, varied at random to fill it.

    100 epochs of ImageNet's 1.28 million pictures at batch 256 are 500,000 steps: full long before.
    """
    torch.manual_seed(0)
    network = _network("resnet50", 224)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder), network, every_steps=1, began=time.perf_counter())
        images = torch.randn(8, 3, 224, 224)
        settings = Training(epochs=1, batch_size=8)
        data = FeatureBatches(images, torch.arange(8), batch_size=4)
        training = Fit(
            network, data, data, settings, num_classes=CLASSES, seed=0,
            parameter_groups=parameter_groups(network, settings), watch=recorder,
        )  # fmt: skip
        next(training.epochs())
        recorder.close()
        found = recorder.recording()
        filled = _filled(found)
        path = Path(folder, "full.npz")
        filled.save(path)
        assert filled.tensors is not None
        described = f"{len(filled.tensors.steps)} steps of {len(filled.tensors.layers)} layers"
        return path.stat().st_size, described


def _filled(recording: Recording) -> Recording:
    """As many rows as a recording ever has, each a few percent off the real ones."""
    rng = np.random.default_rng(0)

    def stretched(values: np.ndarray, rows: int) -> np.ndarray:
        chosen = values[rng.integers(0, len(values), rows)]
        noisy = chosen * rng.normal(1, 0.05, chosen.shape)
        return noisy.astype(values.dtype)

    tensors, steps, system = recording.tensors, recording.steps, recording.system
    assert tensors is not None
    assert steps is not None
    assert system is not None
    names = ("input_mean", "input_std", "input_min", "input_max")
    return replace(
        recording,
        tensors=replace(
            tensors,
            steps=np.arange(1, MOST_STEPS + 1),
            values={name: stretched(v, MOST_STEPS) for name, v in tensors.values.items()},
            **{name: stretched(getattr(tensors, name), MOST_STEPS) for name in names},
        ),
        steps=replace(
            steps,
            steps=np.arange(1, MOST_TIMES + 1),
            seconds=stretched(steps.seconds, MOST_TIMES),
            pictures=np.full(MOST_TIMES, 256),
        ),
        system=replace(
            system,
            times=system.times[0] + 2.0 * np.arange(MOST_SAMPLES),
            values={name: stretched(v, MOST_SAMPLES) for name, v in system.values.items()},
        ),
    )
