"""torchvision's classification networks without their heads, and their published weights."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from visiontuner.data.images import Preprocessing
from visiontuner.model.architecture import Architecture
from visiontuner.model.light_imports import import_torchvision
from visiontuner.model.weights import StateDict, download_weights, read_state_dict

torchvision: Any = import_torchvision()


def torchvision_names() -> list[str]:
    """Every classification network."""
    return torchvision.models.list_models(module=torchvision.models)  # type: ignore[no-any-return]


def torchvision_facts(name: str) -> tuple[int, int]:
    """Parameters, head included, and the side of the input, pixels, of the published network."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    return weights.meta["num_params"], weights.transforms().crop_size[0]


def build_torchvision(name: str, image_size: int | None, cache: Path) -> Architecture:
    """A torchvision network by name.

    Raises:
        ValueError, RuntimeError and others of torchvision's: it does not take this size.
    """
    published = torchvision.models.get_model_weights(name).DEFAULT
    transforms = published.transforms()
    preprocessing = Preprocessing(
        resize=transforms.resize_size[0],
        size=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
    if image_size is not None:
        preprocessing = preprocessing.with_size(image_size)
    options = _torchvision_options(name, preprocessing.size)
    module = torchvision.models.get_model(name, weights=None, **options)
    return Architecture(
        module=module,
        preprocessing=preprocessing,
        head=_cut_head(module),
        default_weights=lambda: _published_weights(published.url, cache),
    )


def resize_positions(state: StateDict, module: nn.Module) -> StateDict:
    """torchvision's ViT at another size: its position embedding, interpolated."""
    key = "encoder.pos_embedding"
    if not isinstance(module, torchvision.models.VisionTransformer) or key not in state:
        return state
    if state[key].shape == module.state_dict()[key].shape:
        return state
    return cast(
        StateDict,
        torchvision.models.vision_transformer.interpolate_embeddings(
            module.image_size, module.patch_size, OrderedDict(state)
        ),
    )


def _torchvision_options(name: str, size: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": size}
    if name.startswith("maxvit"):
        return {"input_size": (size, size)}
    if name in ("googlenet", "inception_v3"):
        # Their published weights expect the input of their first authors' network.
        return {"init_weights": True, "transform_input": True}
    return {}


def _cut_head(module: nn.Module) -> tuple[str, ...]:
    """Replace the last Linear by nothing; the top-level modules in which heads lie."""
    heads = [name for name in ("aux1", "aux2", "AuxLogits") if hasattr(module, name)]
    for name in heads:  # Inception's helpers in training; eval mode never asks them
        setattr(module, name, None)
    if heads:
        # In training it would return theirs beside the features.
        module.aux_logits = False  # type: ignore[assignment]
    linears = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if linears:
        parent, _, leaf = linears[-1].rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())
        return (linears[-1].split(".")[0], *heads)
    module.classifier = nn.AdaptiveAvgPool2d(1)  # SqueezeNet's head is a convolution
    return ("classifier", *heads)


def _published_weights(url: str, cache: Path) -> StateDict:
    file_name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.is_file():
        # torchvision's file names end in the first digits of their SHA-256: resnet50-11ad3fa6.pth
        found = re.search(r"-([0-9a-f]{8,})\.pth$", file_name)
        path = download_weights(url, cache=cache, sha256_prefix=found[1] if found else "")
    state = read_state_dict(path)
    return _renamed(state, _without_densenet_dots)


def _without_densenet_dots(key: str) -> str:
    """DenseNet's file was written when modules could be called `norm.1`."""
    pattern = r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_\w+))$"
    found = re.match(pattern, key)
    return found[1] + found[2] if found else key


def _renamed(state: StateDict, rename: Callable[[str], str]) -> StateDict:
    renamed: StateDict = OrderedDict((rename(key), value) for key, value in state.items())
    renamed._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    return renamed
