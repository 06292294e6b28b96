"""timm's networks without their heads, the bundled one of them, and their published weights."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from visiontuner.data.images import Interpolation, Preprocessing
from visiontuner.errors import BackboneError
from visiontuner.model.architecture import Architecture
from visiontuner.model.bundled import TIMM_NAME, bundled_weights
from visiontuner.model.light_imports import import_timm
from visiontuner.model.weights import StateDict, download_weights, read_state_dict


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
    )


def build_bundled(image_size: int | None) -> Architecture:
    """EfficientNet-Lite0, whose weights are installed with a package."""
    network = build_timm(TIMM_NAME, image_size, Path())
    return replace(network, default_weights=bundled_weights)


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
