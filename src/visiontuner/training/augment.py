"""Random changes to training images, with torchvision's transforms (v2)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visiontuner.data.images import Preprocessing, crop_pixels
from visiontuner.experiment.schema import Augmentation
from visiontuner.workarounds.torch import import_torchvision

# Inception's limits (Szegedy et al. 2015), as in torchvision's own recipes.
_ASPECT_RATIOS = (3 / 4, 4 / 3)


class Augmenter:
    """A training image -> network input, changed at random as its seed says.

    In this order: a random crop (or evaluation's, with `crop_scale` 1), a flip, a policy's changes
    of colour and shape, an erased rectangle. The same image and seed always give the same pixels.

    Sources: random crops, Szegedy et al. 2015, https://arxiv.org/abs/1409.4842; RandAugment, Cubuk
    et al. 2019, https://arxiv.org/abs/1909.13719; TrivialAugment, Müller and Hutter 2021,
    https://arxiv.org/abs/2103.10158; random erasing, Zhong et al. 2017,
    https://arxiv.org/abs/1708.04896.
    """

    def __init__(self, augmentation: Augmentation, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._crops = augmentation.crop_scale < 1
        v2 = _transforms()
        self._random_crop = v2.RandomResizedCrop(
            preprocessing.size, scale=(augmentation.crop_scale, 1.0), ratio=_ASPECT_RATIOS
        )
        self._filter = Image.Resampling[preprocessing.interpolation.upper()]
        # What moves in from outside, or is erased, is the mean colour: 0 for the network.
        colour = [round(255 * value) for value in preprocessing.mean]
        self._flip = v2.RandomHorizontalFlip(augmentation.flip)
        self._policy = _policy(augmentation.policy, colour)
        self._erase = v2.RandomErasing(augmentation.erasing, value=colour)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """uint8, shape (3, S, S), from an image of any size in mode RGB.

        A JPEG that was opened but not decoded yet is decoded only as large as its crop needs.
        """
        with _seeded(seed):
            if self._crops:
                image = self._crop(image)
            else:
                image = Image.fromarray(crop_pixels(image, self.preprocessing))
            image = self._flip(image)
            if self._policy is not None:
                image = self._policy(image)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, S, S)
            erased: Tensor = self._erase(pixels)
        return erased

    def _crop(self, image: Image.Image) -> Image.Image:
        box = self._random_crop.make_params([image])
        width, height, size = image.width, image.height, self.preprocessing.size
        # JPEG decodes to a half, a quarter or an eighth: never below what the crop becomes.
        image.draft("RGB", (width * size // box["width"], height * size // box["height"]))
        across, down = image.width / width, image.height / height
        left, top = box["left"] * across, box["top"] * down
        return image.resize(
            (size, size),
            self._filter,
            box=(
                left,
                top,
                min(left + box["width"] * across, image.width),
                min(top + box["height"] * down, image.height),
            ),
        )


def mix(
    images: Tensor,
    labels: Tensor,
    augmentation: Augmentation,
    *,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Blend each image of a batch with another one, MixUp or CutMix; with both, either in turn.

    Args:
        images: float32, shape (B, 3, S, S).
        labels: int64, shape (B,).
        generator: on the CPU.

    Returns:
        The blended images and the classes' shares in them, float32, shape (B, num_classes).

    Sources: Zhang et al. 2017, https://arxiv.org/abs/1710.09412; Yun et al. 2019,
    https://arxiv.org/abs/1905.04899.
    """
    v2 = _transforms()
    kinds: list[Any] = []
    if augmentation.mixup > 0:
        kinds.append(v2.MixUp(alpha=augmentation.mixup, num_classes=num_classes))
    if augmentation.cutmix > 0:
        kinds.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=num_classes))
    if not kinds:
        raise ValueError("mixup or cutmix must be > 0 to mix images")
    which = int(torch.randint(len(kinds), (), generator=generator))
    with _seeded(int(torch.randint(2**31, (), generator=generator))):
        mixed: tuple[Tensor, Tensor] = kinds[which](images, labels)
    return mixed


def _transforms() -> ModuleType:
    """torchvision's transforms, imported where they are used: a head on features needs none."""
    import_torchvision()
    return importlib.import_module("torchvision.transforms.v2")


def _policy(name: str, colour: list[int]) -> Any:
    if name == "none":
        return None
    v2 = _transforms()
    kind = v2.RandAugment if name == "randaugment" else v2.TrivialAugmentWide
    return kind(interpolation=v2.InterpolationMode.BILINEAR, fill=colour)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchvision draws from torch's global generator on the CPU: lend it, then give it back.

    `torch.manual_seed` would also seed the GPU's, which dropout draws from.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
