"""Which parts of a network are recorded: layers with weights, and activation functions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One module that is recorded.

    Attributes:
        name: of the module within the network; of a shared one the first.
        kind: its class.
        weight: what of its own parameters is recorded; None of an activation function, and where
            an earlier layer has the same one.
    """

    name: str
    kind: str
    module: nn.Module
    weight: nn.Parameter | None


def find_layers(network: nn.Module) -> tuple[list[Layer], list[str]]:
    """The layers of a network, each once, and a line on each weight that two of them share."""
    layers, notes = [], []
    owners: dict[int, str] = {}
    for name, module in network.named_modules():
        weight, kind = _own_weight(module), type(module).__name__
        if weight is None and not is_activation(module):
            continue
        if weight is not None:
            owner = owners.setdefault(id(weight), name)
            if owner != name:
                notes.append(f"{name} ({kind}): shares its weight with {owner}, recorded there")
                weight = None
        layers.append(Layer(name=name, kind=kind, module=module, weight=weight))
    return layers, notes


def is_activation(module: nn.Module) -> bool:
    """torch's activation functions, and those of networks that bring their own (timm's)."""
    home = type(module).__module__.rsplit(".", 1)[-1]
    return home.startswith("activation") and not any(module.children())


def unit_dimension(output: Tensor) -> int:
    """Where a layer's units are: channels of maps (B, C, H, W), else the last dimension."""
    return 1 if output.dim() == 4 else output.dim() - 1


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """Its `weight`; of a layer with another name for it the largest matrix.

    What a block has besides its layers, a factor for its output or a table of positions, is no
    weight: a factor that begins with 1e-6 changes a hundredfold in a step when all is well.
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.numel() > 0}
    for name in ("weight", "in_proj_weight"):
        if name in own:
            return own[name]
    if any(module.children()):
        return None
    matrices = [parameter for parameter in own.values() if _is_matrix(parameter)]
    return max(matrices, key=lambda parameter: parameter.numel(), default=None)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) > 1
