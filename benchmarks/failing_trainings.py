"""Trainings made to fail, each in one way, and healthy ones: real networks, real images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiontuner.data.arrays import DecodedImages, prepare_images
from visiontuner.data.dataset import load_dataset
from visiontuner.data.images import Preprocessing
from visiontuner.diagnostics.history import Curve, TrainingHistory
from visiontuner.diagnostics.recorder import Recorder
from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import AUGMENTATIONS, NO_AUGMENTATION, Training
from visiontuner.model.backbones import load_backbone
from visiontuner.model.network import Network, build_network, parameter_groups
from visiontuner.paths import writable_cache_folder
from visiontuner.training.batches import Batches, ImageBatches
from visiontuner.training.loop import Fit, linear_head

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SEED = 7


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        rules: each of them has to raise an error; none for a healthy one.
        network: new for every training, from the number of classes.
        around: what is put around the batches of training.
    """

    name: str
    network: Callable[[int], nn.Module]
    rules: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[Batches], Batches] = lambda batches: batches


def failing(*, leaking: int) -> Iterator[Case]:
    """Each goes wrong in one way.

    Args:
        leaking: epochs of the training that leaks, for which the machine has to be watched.
    """
    whole, stage = _backbone("resnet18", train="all"), _backbone("resnet18", train="last_stage")
    adam, sgd = {"learning_rate": 3.0}, {"learning_rate": 50.0, "optimizer": "sgd"}
    yield Case("the first layer zeroed", _changed(stage, _zero_the_first), ("all_zero",))
    yield Case("learning rate x 1000", whole, ("weight_update_ratio",), adam)
    yield Case("learning rate x 1000, SGD, no norms", _plain(6), ("exploding_tensor",), sgd)
    yield Case("12 sigmoids", _plain(12, nn.Sigmoid), ("vanishing_gradient",))
    yield Case("tanh, weights x 30", _scaled(_plain(6, nn.Tanh), 30), ("saturated_activation",))
    yield Case(
        "10 layers, weights x 0.1",
        _scaled(_plain(10), 0.1),
        ("poor_weight_initialisation",),
    )
    yield Case(
        "biases of -1",
        _changed(_plain(6), _negative_biases),
        ("dead_relu", "tensor_variance"),
    )
    yield Case("pixels as they are", whole, ("check_input_images",), {}, _Unnormalised)
    yield Case("learning rate 1e-12", whole, ("unchanged_tensor",), {"learning_rate": 1e-12})
    small = _plain(4)
    yield Case("a slow loader", small, ("io_bottleneck",), {"epochs": 3}, _Slow)
    yield Case("batches of 2", whole, ("batch_size_too_small",), {"batch_size": 2, "epochs": 1})
    yield Case("a loader with hiccups", small, ("step_outliers",), {"epochs": 12}, _Hiccups)
    yield Case("a leak", small, ("memory_increase",), {"epochs": leaking}, _Leak)


def healthy() -> Iterator[Case]:
    """Two architectures, whole and in part, with the optimizers and rates that suit them."""
    fast = {"backbone_learning_rate_factor": 1.0}
    for name, settings in {
        "AdamW 1e-3": {"learning_rate": 1e-3, **fast},
        "AdamW 3e-3, backbone x 0.1": {},
        "SGD 0.02": {"learning_rate": 0.02, "optimizer": "sgd", **fast},
        "AdamW 1e-3, batch 16, bf16": {
            "learning_rate": 1e-3,
            "batch_size": 16,
            "precision": "bf16",
            **fast,
        },
        "Adam 1e-3, clipped, averaged": {
            "learning_rate": 1e-3,
            "optimizer": "adam",
            "gradient_clip": 1.0,
            "ema_decay": 0.9,
            "warmup_fraction": 0.1,
            **fast,
        },
    }.items():
        network = _backbone("resnet18", train="all")
        yield Case(f"resnet18, all: {name}", network, settings={"epochs": 6, **settings})
    for train, name, settings in (
        ("all", "AdamW 3e-3, backbone x 0.1", {}),
        ("all", "SGD 0.01", {"learning_rate": 0.01, "optimizer": "sgd"}),
        ("last_stage", "AdamW 3e-3", {}),
        (
            "last_stage",
            "batch norm frozen, batch 16",
            {"freeze_batch_norm": True, "batch_size": 16},
        ),
        ("last_stage", "AdamW 1e-3, layers decaying", {"learning_rate": 1e-3, "layer_decay": 0.8}),
    ):
        network = _backbone("efficientnet_lite0", train=train)
        yield Case(
            f"efficientnet_lite0, {train}: {name}", network, settings={"epochs": 5, **settings}
        )


def images(folder: Path, cache: Path, *, size: int) -> DecodedImages:
    """The folder's images, decoded once."""
    preprocessing = Preprocessing(
        resize=size + size // 8, size=size, interpolation="bilinear", **IMAGENET
    )
    return prepare_images(
        load_dataset(folder, cache=cache), preprocessing=preprocessing, cache=cache, augmented=True
    )


def train(case: Case, store: DecodedImages, folder: Path, *, every_steps: int) -> TrainingHistory:
    """Train for real, recorded as a search records; what is there of it, however it ended."""
    settings = Training(**{"epochs": 3, "batch_size": 32, "workers": 0, **case.settings})
    began, classes = time.perf_counter(), len(store.class_names)
    torch.manual_seed(SEED)
    network = case.network(classes)
    batches = _batches(store, "train", settings)
    about = {name: list(values) for name, values in IMAGENET.items()}
    recorder = Recorder(
        folder, network, every_steps=every_steps, began=began, workers=batches.workers, about=about
    )
    batches.callback = recorder
    training = Fit(
        network,
        case.around(batches),
        _batches(store, "validation", settings),
        settings,
        num_classes=classes,
        seed=SEED,
        parameter_groups=parameter_groups(network, settings)
        if isinstance(network, Network)
        else None,
        callback=recorder,
    )
    epochs, error = [], None
    try:
        epochs = [result.metrics.to_dict() for result in training.epochs()]
    except TrialFailed as failure:
        error = str(failure)
    finally:
        recorder.close()
        batches.close()
    steps = tuple(range(1, len(epochs) + 1))
    return TrainingHistory(
        metrics={n: Curve(steps, tuple(e[n] for e in epochs)) for n in (epochs or [{}])[0]},
        configuration=settings.model_dump(),
        num_classes=classes,
        error=error,
        recording=recorder.recording(),
    )


def _batches(store: DecodedImages, split: str, settings: Training) -> ImageBatches:
    return ImageBatches(
        store.split(split),
        preprocessing=store.preprocessing,
        augmentation=AUGMENTATIONS["light"] if split == "train" else NO_AUGMENTATION,
        num_classes=len(store.class_names),
        batch_size=settings.batch_size if split == "train" else 64,
        workers=settings.workers,
        device=torch.device("cpu"),
    )


class _Around:
    """Batches that do something besides."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self.labels = batches.labels

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (inputs, labels) in enumerate(self._batches.shuffled(generator)):
            yield self.changed(number, inputs), labels

    def in_order(self) -> Iterator[Tensor]:
        for number, inputs in enumerate(self._batches.in_order()):
            yield self.changed(number, inputs)

    def changed(self, number: int, inputs: Tensor) -> Tensor:
        raise NotImplementedError


class _Unnormalised(_Around):
    """From 0 to 255."""

    def changed(self, number: int, inputs: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in IMAGENET.values())
        return ((inputs * std + mean) * 255).round()


class _Slow(_Around):
    def changed(self, number: int, inputs: Tensor) -> Tensor:
        time.sleep(0.5)
        return inputs


class _Hiccups(_Around):
    def changed(self, number: int, inputs: Tensor) -> Tensor:
        if number == 5:
            time.sleep(3)
        return inputs


class _Leak(_Around):
    """Keeps 4 MB of every step."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(batches)
        self._kept: list[Tensor] = []

    def changed(self, number: int, inputs: Tensor) -> Tensor:
        self._kept.append(torch.ones(2**20))
        return inputs


def _backbone(name: str, *, train: str) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        weights = "default" if name == "efficientnet_lite0" else "none"
        backbone = load_backbone(
            name, weights=weights, image_size=None, cache=writable_cache_folder()
        )
        head = linear_head(backbone.feature_dim, classes, dropout=0.0, seed=SEED)
        return build_network(backbone, head, train=train)

    return build


def _plain(depth: int, activation: type[nn.Module] = nn.ReLU) -> Callable[[int], nn.Module]:
    """Convolutions of 24 channels and activations, no normalisation."""

    def build(classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for place in range(depth):
            stride = 2 if place in (0, 2) else 1
            layers += [nn.Conv2d(24 if place else 3, 24, 3, stride, 1), activation()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes))

    return build


def _changed(
    network: Callable[[int], nn.Module], change: Callable[[nn.Module], None]
) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        built = network(classes)
        with torch.no_grad():
            change(built)
        return built

    return build


def _scaled(network: Callable[[int], nn.Module], by: float) -> Callable[[int], nn.Module]:
    def scale(built: nn.Module) -> None:
        for module in built.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(by)

    return _changed(network, scale)


def _zero_the_first(network: nn.Module) -> None:
    next(network.parameters()).zero_()


def _negative_biases(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.fill_(-1)
