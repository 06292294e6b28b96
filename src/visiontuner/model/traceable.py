"""A network as torch writes it fastest: fewer operations, the same answers."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Of the largest feature; where convolutions and what follows fuse it is about 1e-6.
_SAME_WITHIN = 1e-4


def easily_traced(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy that torch writes as ONNX in two thirds of the time, with the same answers.

    - A batch normalisation after a convolution goes into the convolution's weights: a third of the
      operations. A network in which that does not give the same features keeps them.
    - ReLU6 and Hardtanh become what they are, `clamp`: torch takes each apart in symbols.

    Args:
        network: in eval mode.
        example: a picture that it takes, of noise at best, float32 (1, 3, H, W).
    """
    return _clamped(_fused(network, example) or copy.deepcopy(network))


class _Clamp(nn.Module):
    """The same as ReLU6 and Hardtanh."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.low, self.high)


def _clamped(network: nn.Module) -> nn.Module:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardtanh):  # and ReLU6
                setattr(module, name, _Clamp(child.min_val, child.max_val))
    return network


def _fused(network: nn.Module, example: Tensor) -> nn.Module | None:
    """A copy without the normalisations that can go; None if there are none, or they cannot."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return None
    fused = copy.deepcopy(network)
    with torch.no_grad():
        pairs, before = _convolutions_and_norms(fused, example)
        instead = {norm: _put_into(convolution, norm) for convolution, norm in pairs}
        for module in list(fused.modules()):
            for name, child in list(module.named_children()):
                if child in instead:
                    setattr(module, name, instead[child])
        difference, largest = (fused(example) - before).abs().max(), before.abs().max()
    # Of a network that gives NaN nothing is the same.
    return fused if float(difference) <= _SAME_WITHIN * float(largest) else None


def _convolutions_and_norms(
    network: nn.Module, example: Tensor
) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Tensor]:
    """Which normalisation gets what which convolution gave, each run once; the features too.

    What else gets it is not seen here: the answers tell.
    """
    calls: Counter[nn.Module] = Counter()
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors, so that no id comes twice
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, output
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(see) for m in network.modules() if isinstance(m, kinds)]
    features: Tensor = network(example)
    for hook in hooks:
        hook.remove()
    once = [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]
    return [pair for pair in once if all(map(_is_plain, pair))], features


def _is_plain(module: nn.Module) -> bool:
    """Whether its weights are its own, and its statistics fixed."""
    statistics = not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None
    return "weight" in module._parameters and statistics


def _put_into(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Module:
    """Change the convolution's weights; what stays of the normalisation, such as timm's act."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()
