"""What recording a training costs: time, with it on and off in turn, and the size of its file."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Row, report

from visiontuner.diagnostics.history import Recording
from visiontuner.diagnostics.recorder import MOST_STEPS as MOST_TIMES
from visiontuner.diagnostics.recorder import Recorder, StepTimes
from visiontuner.diagnostics.system import MOST_SAMPLES, SystemSampler
from visiontuner.diagnostics.tensors import MOST_STEPS
from visiontuner.experiment.schema import Training
from visiontuner.model.backbones import load_backbone
from visiontuner.model.network import Network, Train, build_network, parameter_groups
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.callbacks import Part, TrainingCallback
from visiontuner.training.loop import Fit, TrainingStep, linear_head
from visiontuner.training.optimisation import make_optimizer, make_schedule

NETWORKS: tuple[tuple[str, Train], ...] = (
    ("resnet18", "all"),
    ("efficientnet_lite0", "all"),
    ("efficientnet_lite0", "last_stage"),
)
CLASSES, BATCH = 10, 8
EVERY = 50
MOST_TIME, MOST_STEP_TIME, MOST_BYTES = 0.03, 0.01, 20_000_000

SECONDS_BETWEEN_SAMPLES = 2.0

TARGETS = ("at most 3 % of training time", "at most 1 % of training time", "at most 20 MB")
SMALL = {"networks": (("resnet18", "all"),), "size": 32, "rounds": 1, "full": False}


class _StepTimes(TrainingCallback):
    """Only where the time goes."""

    def __init__(self) -> None:
        self.times = StepTimes(torch.device("cpu"), began=time.perf_counter())

    def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
        self.times.epoch_begins()

    def spent_on(self, part: Part) -> None:
        self.times.spent_on(part)

    def step_begins(self, step: int, inputs: torch.Tensor) -> None:
        self.times.step_begins(step, len(inputs))

    def step_ends(self) -> None:
        self.times.step_ends()


def measure(
    *,
    networks: tuple[tuple[str, Train], ...] = NETWORKS,
    size: int = 224,
    rounds: int = 3,
    full: bool = True,
) -> dict[str, Any]:
    """Steps with recording off and on in turn, and the file at its largest."""
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name, train in networks:
        found = _costs(name, train, size=size, rounds=rounds)
        details[f"{name}, {train}"] = found
        rows += _rows(f"{name}, {train.replace('_', ' ')} trained", size, found)
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
            what=f"{name}, {size} px, batch {BATCH}: recording on against off, a step each in turn",
            target=TARGETS[0],
            result=f"{found['recording']:+.2%}: {found['recorded_steps']:.2%} for every {EVERY}th "
            f"step, which takes {found['recorded_step_seconds']:.3f} s more than the usual "
            f"{found['step_seconds']:.3f} s; {found['other_steps']:+.2%} in the others; "
            f"{found['samples']:.2%} for sampling the machine",
            met=found["recording"] <= MOST_TIME,
        ),
        Row(
            what=f"{name}: step times on against off, a step each in turn",
            target=TARGETS[1],
            result=f"{found['step_times']:+.2%}; the clock's calls alone {found['calls']:.4%}",
            met=found["step_times"] <= MOST_STEP_TIME,
        ),
    ]


def _costs(name: str, train: Train, *, size: int, rounds: int) -> dict[str, float]:
    """Shares of the training's time."""
    seconds: dict[str, list[float]] = {"off": [], "times": [], "all": []}
    for number in range(rounds):
        for kind, spent in _in_turn(name, train, size, backwards=number % 2 == 1).items():
            seconds[kind] += spent
    off, times, everything = (np.array(seconds[kind]) for kind in ("off", "times", "all"))
    usual = float(np.median(off))
    recorded = np.arange(len(off)) % (EVERY - 1) == EVERY - 2  # the last of each round
    extra = float(np.median((everything - off)[recorded]))
    found = {
        "recorded_steps": extra / EVERY / usual,
        "other_steps": float(np.median((everything - off)[~recorded])) / usual,
        "samples": _seconds_of_a_sample() / SECONDS_BETWEEN_SAMPLES,
    }
    return {
        **found,
        "recording": sum(found.values()),
        "step_seconds": usual,
        "recorded_step_seconds": extra,
        "step_times": float(np.median(times - off)) / usual,
        "calls": _stamps_alone() / usual,
    }


def _in_turn(name: str, train: Train, size: int, *, backwards: bool) -> dict[str, list[float]]:
    """Seconds of steps 2 to 50 of three equal trainings, one step of each after the other.

    The machine's mood then meets all three alike; the 50th step is recorded.
    """
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % CLASSES
    seconds: dict[str, list[float]] = {"off": [], "times": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            kind: _Training(kind, _network(name, size, train), Path(folder)) for kind in seconds
        }
        for number in range(1, EVERY + 1):
            for kind in reversed(steps) if (number % 2 == 1) != backwards else steps:
                began = time.perf_counter()
                steps[kind](number, images, labels)
                seconds[kind].append(time.perf_counter() - began)
        for take in steps.values():
            take.close()
    return {kind: spent[1:] for kind, spent in seconds.items()}


class _Training:
    """Takes one step as `train_epoch` does."""

    def __init__(self, kind: str, network: Network, folder: Path) -> None:
        network = network.train().to(memory_format=torch.channels_last)
        settings = Training(epochs=1, batch_size=BATCH, schedule="constant")
        self.recorder = None
        self.callback = TrainingCallback()
        if kind == "times":
            self.callback = _StepTimes()
        elif kind == "all":
            began = time.perf_counter()
            self.callback = self.recorder = Recorder(
                folder, network, every_steps=EVERY, began=began
            )
        optimizer = make_optimizer(network, settings, parameter_groups(network, settings))
        schedule = make_schedule(optimizer, settings, total_steps=EVERY)
        self.step = TrainingStep(network, optimizer, schedule, settings, callback=self.callback)
        self.callback.epoch_begins(1, EVERY)

    def __call__(self, number: int, images: torch.Tensor, labels: torch.Tensor) -> None:
        for part in ("data", "to_device", "data"):  # as often as for images
            self.callback.spent_on(part)  # type: ignore[arg-type]
        self.callback.step_begins(number, images)
        self.step(images, labels)
        self.callback.spent_on("reporting")
        self.callback.step_ends()

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def _seconds_of_a_sample() -> float:
    """Of this process's time, for one look at the machine."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        sampler = SystemSampler(Path(folder), torch.device("cpu"), interval_seconds=0.05)
        time.sleep(2)
        sampler.close()
        return (time.process_time() - began) / len(sampler.record().times)


def _network(name: str, size: int, train: Train = "all") -> Network:
    bundled = name == "efficientnet_lite0"
    backbone = load_backbone(
        name,
        weights="default" if bundled else "none",
        image_size=size,
        cache=Path(tempfile.gettempdir()),
    )
    head = linear_head(backbone.feature_dim, CLASSES, dropout=0.0, seed=0)
    return build_network(backbone, head, train=train)


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

    100 epochs of ImageNet's 1.28 million images at batch 256 are 500,000 steps: full long before.
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
            parameter_groups=parameter_groups(network, settings), callback=recorder,
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
            images=np.full(MOST_TIMES, 256),
        ),
        system=replace(
            system,
            times=system.times[0] + 2.0 * np.arange(MOST_SAMPLES),
            values={name: stretched(v, MOST_SAMPLES) for name, v in system.values.items()},
        ),
    )
