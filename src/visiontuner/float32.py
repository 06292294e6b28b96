"""float32 that is float32: on NVIDIA's GPUs torch lets convolutions round their inputs to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions keep all 24 bits of float32, as on a CPU; nothing changes elsewhere.

    TF32 keeps 11 bits: answers would differ in the third digit from those of the packaged
    classifier, which runs on a CPU.
    """
    convolutions = torch.backends.cudnn
    before = convolutions.allow_tf32
    convolutions.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32 = before
