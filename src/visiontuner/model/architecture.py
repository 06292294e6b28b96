"""A network whose head is cut off, before its weights: what every library's networks become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from visiontuner.data.images import Preprocessing
from visiontuner.model.weights import StateDict


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network without its head, with random weights.

    Args:
        module: (B, 3, size, size) -> (B, feature_dim).
        preprocessing: what turns a picture into its input.
        head: the top-level modules under which a state dict's head lies, `("fc",)`.
        default_weights: fetches the pretrained weights.
    """

    module: nn.Module
    preprocessing: Preprocessing
    head: tuple[str, ...]
    default_weights: Callable[[], StateDict]
