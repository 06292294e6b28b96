"""One pass over the pictures a network has not seen."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from visiontuner import interrupts
from visiontuner.float32 import full_float32
from visiontuner.training.batches import Batches
from visiontuner.training.metrics import Scores, score
from visiontuner.training.micro_batches import MicroBatches


def evaluate(
    network: nn.Module, batches: Batches, micro_batches: MicroBatches | None = None
) -> tuple[Tensor, Scores]:
    """Logits (num_samples, num_classes) on the CPU, in order, and their scores.

    Always in float32, whatever the training's precision: as the packaged classifier answers.

    Raises:
        TrialFailed: one picture does not fit into memory.
    """
    network.eval()
    pieces = micro_batches or MicroBatches(None, where="evaluation")
    with torch.inference_mode(), full_float32():
        logits = torch.cat(
            [
                pieces.run(len(inputs), functools.partial(_answer, network, inputs))
                for inputs in batches.in_order()
            ]
        )
        scores = score(logits, batches.labels.to(logits.device))
    return logits.cpu(), scores


def _answer(network: nn.Module, inputs: Tensor, sizes: list[int]) -> Tensor:
    interrupts.check()
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if len(sizes) == 1:
        return network(inputs).float()  # type: ignore[no-any-return]
    return torch.cat([network(part).float() for part in torch.split(inputs, sizes)])
