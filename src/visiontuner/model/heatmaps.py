"""Which parts of an image decided: exact class activation maps, from the artifact itself.

For a network whose features are the mean of a map the logit of a class is the mean, over the map's
places, of weight @ map plus the bias: each place's part of it is that product. Such networks have
the output `feature_map`. Only of the answer's own class is the map worth a look.

Source: Zhou et al. 2016, https://arxiv.org/abs/1512.04150.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from visiontuner.errors import ClassifierError
from visiontuner.model.classifier import FEATURE_MAP, LOGITS, WEIGHTS, Classifier

# How much of the colour covers the image where the map is highest.
_OPACITY = 0.65


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """What an image's places add to the logit of a class.

    Args:
        label: the class, an index into the classifier's names.
        logit: float, the mean of `values` plus the class's bias.
        values: float32, shape (height, width), of the network's own resolution.
    """

    label: int
    logit: float
    values: NDArray[np.float32]

    def resized(self, size: int) -> NDArray[np.float32]:
        """What speaks for the class, float32, shape (size, size), in [0, 1]; 0 where it is against.

        All 0 where nothing speaks for it.
        """
        positive = np.maximum(self.values, 0)
        image = Image.fromarray(positive).resize((size, size), Image.Resampling.BICUBIC)
        large: NDArray[np.float32] = np.maximum(np.asarray(image, dtype=np.float32), 0)
        highest = np.float32(large.max())
        if highest > 0:
            large /= highest
        return large

    def over(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image with red to yellow where the class was seen.

        Args:
            pixels: uint8, shape (size, size, 3), as the network saw them.
        """
        heat = self.resized(len(pixels))[..., None]
        grey = pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
        base = 0.5 * pixels + 0.5 * grey
        colour = np.concatenate([np.full_like(heat, 255), 255 * heat, np.zeros_like(heat)], axis=2)
        share = _OPACITY * np.sqrt(heat)
        mixed: NDArray[np.uint8] = np.round((1 - share) * base + share * colour).astype(np.uint8)
        return mixed


class Explainer:
    """Heat maps of a classifier's answers.

    Raises:
        ClassifierError: its network has no map that its features are the mean of, or its weights
            cannot be read.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        if FEATURE_MAP not in classifier.output_names:
            raise ClassifierError(
                f"{classifier.folder} has no heat maps: they need a network that ends in a plain "
                "mean over its last map (ResNet, EfficientNet, DenseNet and others), with "
                "model.views: 1, packaged by this version."
            )

    @cached_property
    def _head(self) -> NDArray[np.float32]:
        """The head's weights, float32, shape (num_classes, D)."""
        path = self.classifier.folder / WEIGHTS
        try:
            weights: NDArray[np.float32] = load_file(path)["head.weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ClassifierError(
                f"{path} is damaged ({type(error).__name__}). Package the classifier again."
            ) from None
        return weights

    def explain(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None = None
    ) -> list[HeatMap]:
        """Where each image's answer comes from.

        Args:
            pixels: uint8, shape (B, size, size, 3), as `images.read_pixels` gives them.
            labels: int64, shape (B,), the classes to ask for; the most probable ones if None.
        """
        logits, maps = self.classifier.outputs(pixels, [LOGITS, FEATURE_MAP])
        chosen = logits.argmax(axis=1) if labels is None else labels
        values = np.einsum("bd,bdhw->bhw", self._head[chosen], maps)
        return [
            HeatMap(label=int(label), logit=float(logits[row, label]), values=values[row])
            for row, label in enumerate(chosen)
        ]
