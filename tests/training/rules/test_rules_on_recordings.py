"""Small networks trained for real and recorded: made to fail they raise an error, healthy none.

The larger form, on photographs: `benchmarks/tensor_rules.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from visiontuner.diagnostics.history import TrainingHistory
from visiontuner.diagnostics.recorder import Recorder
from visiontuner.diagnostics.rules import RECORDED_RULES, diagnose_recording
from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import Fit

CLASSES, SIZE = 4, 24
MEAN, STD = 0.45, 0.25


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(number: int) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], (N, 3, S, S): noise, and a bright square in one of four corners."""
    rng = np.random.default_rng(number)
    pixels = rng.uniform(0, 1, (number, 3, SIZE, SIZE)).astype(np.float32)
    labels = np.arange(number) % CLASSES
    for image, label in zip(pixels, labels, strict=True):
        top, left = SIZE // 2 * (label // 2), SIZE // 2 * (label % 2)
        image[:, top : top + SIZE // 2, left : left + SIZE // 2] *= 0.2
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = 0, 1  # black and white are in every image
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def plain(depth: int, activation: type[nn.Module] = nn.ReLU, *, norms: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for place in range(depth):
        layers.append(nn.Conv2d(12 if place else 3, 12, 3, 2 if place == 1 else 1, 1))
        layers += [nn.BatchNorm2d(12)] if norms else []
        layers.append(activation())
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES)]
    return nn.Sequential(*layers, *pooled)


def with_weights(network: nn.Module, change: Callable[[nn.Conv2d], Any]) -> nn.Module:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                change(module)
    return network


def findings(
    network: nn.Module, folder: Path, *, normalised: bool = True, **settings: Any
) -> dict[str, str]:
    """Severity by rule after a real training, of which every fourth step was recorded."""
    training = Training(**{"epochs": 3, "batch_size": 16, "learning_rate": 0.003, **settings})
    batches = []
    for number in (96, 32):
        pixels, labels = drawn(number)
        inputs = (pixels - MEAN) / STD if normalised else pixels
        batches.append(FeatureBatches(inputs, labels, batch_size=training.batch_size))
    recorder = Recorder(
        folder, network, every_steps=4, began=time.perf_counter(),
        about={"mean": [MEAN] * 3, "std": [STD] * 3},
    )  # fmt: skip
    try:
        list(
            Fit(
                network, *batches, training, num_classes=CLASSES, seed=7, callback=recorder
            ).epochs()
        )
    except TrialFailed:
        pass
    finally:
        recorder.close()
    history = TrainingHistory(
        configuration=training.model_dump(), recording=recorder.recording(), num_classes=CLASSES
    )
    return {f.rule: f.severity for f in diagnose_recording(history, RECORDED_RULES)}


def zeroed(layer: nn.Conv2d) -> None:
    layer.weight.zero_()
    layer.requires_grad_(False)


FAILING: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "a learning rate of 1e4": ("weight_update_ratio", lambda: plain(3), {"learning_rate": 1e4}),
    "NaN": ("exploding_tensor", lambda: plain(4), {"learning_rate": 1e20, "optimizer": "sgd"}),
    "sigmoids": ("vanishing_gradient", lambda: plain(12, nn.Sigmoid), {}),
    "large weights before tanh": (
        "saturated_activation",
        lambda: with_weights(plain(4, nn.Tanh), lambda conv: conv.weight.mul_(30)),
        {},
    ),
    "small weights": (
        "poor_weight_initialisation",
        lambda: with_weights(plain(10), lambda conv: conv.weight.mul_(0.05)),
        {},
    ),
    "equal weights": (
        "poor_weight_initialisation",
        lambda: with_weights(plain(3), lambda conv: conv.weight.fill_(0.1)),
        {},
    ),
    "negative biases": (
        "dead_relu",
        lambda: with_weights(plain(4), lambda conv: conv.bias.fill_(-2)),
        {},
    ),
    "a damaged file of weights": ("all_zero", lambda: with_weights(plain(3), zeroed), {}),
    "pixels as they are": ("check_input_images", lambda: plain(3), {"normalised": False}),
    "a learning rate of 1e-12": ("unchanged_tensor", lambda: plain(3), {"learning_rate": 1e-12}),
    "batches of 2": ("batch_size_too_small", lambda: plain(3, norms=True), {"batch_size": 2}),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_training_made_to_fail_raises_its_error(case: str, tmp_path: Path) -> None:
    rule, network, settings = FAILING[case]
    torch.manual_seed(7)
    assert findings(network(), tmp_path, **settings).get(rule) == "error"


@pytest.mark.parametrize(
    ("norms", "settings"),
    [
        (True, {}),
        (True, {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant"}),
        (False, {"epochs": 6}),
    ],
)
def test_a_healthy_training_raises_nothing(
    tmp_path: Path, norms: bool, settings: dict[str, Any]
) -> None:
    torch.manual_seed(7)
    assert findings(plain(4, norms=norms), tmp_path, **settings) == {}


def convnext() -> nn.Module:
    """Its blocks multiply what they add by a factor that begins with 1e-6."""
    stages = [CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 1)]
    return ConvNeXt(stages, num_classes=CLASSES)


def test_a_healthy_convnext_from_random_weights_raises_no_error(tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert "error" not in findings(convnext(), tmp_path, epochs=6).values()
