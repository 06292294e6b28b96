"""Pretrained networks without their heads: torchvision, timm and bundled ones behind one interface.

A backbone maps pictures to feature vectors, (B, 3, S, S) -> (B, D), and knows how a picture has to
be prepared for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from visiontuner.errors import BackboneError
from visiontuner.model.architecture import Architecture
from visiontuner.model.bundled import BUNDLED
from visiontuner.model.description import BackboneDescription
from visiontuner.model.timm_networks import (
    build_bundled,
    build_timm,
    is_timm_network,
    pretrained_timm_names,
    timm_architectures,
)
from visiontuner.model.torchvision_networks import (
    build_torchvision,
    resize_positions,
    torchvision_facts,
    torchvision_names,
)
from visiontuner.model.weights import digest_weights, fit_state_dict, read_weights
from visiontuner.text import one_line

TIMM = "timm:"


@dataclass(frozen=True, kw_only=True)
class Backbone(BackboneDescription):
    """A network that gives features, loaded.

    Args:
        module: in eval mode, float32, without gradients; (B, 3, size, size) -> (B, feature_dim).
    """

    module: nn.Module


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """A name that `load_backbone` takes; what is not known without building it is None."""

    name: str
    source: Literal["bundled", "torchvision", "timm"]
    parameters: int | None = None
    image_size: int | None = None


def load_backbone(
    name: str, *, weights: str = "default", image_size: int | None = None, cache: Path
) -> Backbone:
    """A network by name, ready to give features.

    Args:
        name: a torchvision classification model, `timm:NAME`, or `efficientnet_lite0`.
        weights: `default` (the pretrained ones), `none` (random, the same each time), the path of
            a state dict, or its https:// URL. The head in a state dict is ignored.
        image_size: side of the network's input, pixels; default: what it was trained with.
        cache: where downloads are kept.

    Raises:
        BackboneError: an unknown name, weights that cannot be had or do not fit, or a size that
            the network does not take.
    """
    with _same_random_numbers():
        network = _build(name, image_size, cache)
        if weights != "none":
            _load(network, name, weights, cache)
    module = network.module.eval().requires_grad_(False)
    return Backbone(
        name=name,
        module=module,
        feature_dim=_feature_dim(module, network.preprocessing.size, name),
        preprocessing=network.preprocessing,
        weights_digest=digest_weights(module),
    )


def list_backbones(contains: str = "") -> list[BackboneInfo]:
    """Every name that `load_backbone` takes and that contains a text, the bundled one first."""
    infos = [
        BackboneInfo(name=BUNDLED, source="bundled", parameters=4_652_008, image_size=224),
        *(_torchvision_info(name) for name in torchvision_names()),
        *(BackboneInfo(name=TIMM + name, source="timm") for name in pretrained_timm_names()),
    ]
    return [info for info in infos if contains.lower() in info.name.lower()]


def _build(name: str, image_size: int | None, cache: Path) -> Architecture:
    try:
        if name == BUNDLED:
            return build_bundled(image_size)
        if name.startswith(TIMM) and is_timm_network(name.removeprefix(TIMM)):
            return build_timm(name.removeprefix(TIMM), image_size, cache)
        if name in torchvision_names():
            return build_torchvision(name, image_size, cache)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise _unusable(name, image_size, error) from None
    raise _unknown(name)


def _load(network: Architecture, name: str, weights: str, cache: Path) -> None:
    if weights == "default":
        state = network.default_weights()
    else:
        state = read_weights(weights, cache=cache)
    state = resize_positions(state, network.module)
    fitted = fit_state_dict(state, network.module, head=network.head, name=name)
    network.module.load_state_dict(fitted, strict=True)


def _torchvision_info(name: str) -> BackboneInfo:
    parameters, size = torchvision_facts(name)
    return BackboneInfo(name=name, source="torchvision", parameters=parameters, image_size=size)


# checks


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """`weights: none` is the same network each time; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _feature_dim(module: nn.Module, size: int, name: str) -> int:
    try:
        with torch.inference_mode():
            features = module(torch.zeros(2, 3, size, size))
    except (AssertionError, ValueError, RuntimeError, IndexError) as error:
        raise _unusable(name, size, error) from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise BackboneError(
            f"Backbone {name!r} gives {shape}, not one feature vector a picture. Choose another: "
            "`visiontuner backbones`."
        )
    return features.shape[1]


def _unusable(name: str, image_size: int | None, error: Exception) -> BackboneError:
    reason = one_line(error, 160) or type(error).__name__
    at = f" at image size {image_size}" if image_size else ""
    return BackboneError(
        f"Backbone {name!r} cannot be used{at}: {reason}. "
        "Try another `model.image_size`, or leave it out."
    )


def _unknown(name: str) -> BackboneError:
    if name.startswith(TIMM):
        known = [TIMM + other for other in timm_architectures()]
    else:
        known = [BUNDLED, *torchvision_names()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    return BackboneError(f"Unknown backbone {name!r}.{nearest} All: `visiontuner backbones`.")
