"""The parts of a network from its input to its features, found by watching a picture pass.

A stage is all layers whose output has the same resolution (Lin et al. 2017, Feature Pyramid
Networks, section 3, https://arxiv.org/abs/1612.03144); a layer that halves the resolution opens the
next stage, as in ResNet. What follows the global pooling belongs to the last stage. Networks that
keep one resolution (ViT, MLP-Mixer) are cut block by block, and their last stage is the last
quarter of the blocks, as in ViTDet, which cuts them in four (Li et al. 2022, section 3,
https://arxiv.org/abs/2203.16527).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

# Resolutions are compared by ratio: 14 patches a side and a class token are √197 ≈ 14.04.
_HALVED = math.sqrt(2)  # between 1, the same, and 2, halved
_HALVED_TWICE = math.sqrt(8)  # between 2 and 4
# Every network that ends in 1/32 of its input still has 7 x 7 positions then.
_PROBE_SIZE = 224
_MOST = 0.9  # of the parameters in one stage: the network has no stages
_FEWEST_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A stage, or a block of a network without stages.

    Args:
        name: its first module's, `layer4`.
        modules: names of its modules, in the order of the forward pass; those inside them are
            part of it too.
    """

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A network from input to features.

    Args:
        layers: never empty.
        last_stage: the index of the layer with which the last stage begins.
    """

    layers: tuple[Layer, ...]
    last_stage: int

    @property
    def last_modules(self) -> tuple[str, ...]:
        """The modules of the last stage."""
        return tuple(chain.from_iterable(layer.modules for layer in self.layers[self.last_stage :]))

    def depth_of(self, parameter: str) -> int:
        """How many layers lie from a parameter to the head: 1 in the last layer.

        Parameters outside of all layers (a class token, position embeddings) count as the first's.
        """
        for index, layer in enumerate(self.layers):
            if is_within(parameter, layer.modules):
                return len(self.layers) - index
        return len(self.layers)


def is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter is one of these modules, or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def find_stages(module: nn.Module, size: int) -> Stages | None:
    """The stages of a network without its head; None if no picture passes, or nothing is learnt.

    Args:
        module: in eval mode, on the CPU; maps (B, 3, size, size) to (B, D).
    """
    calls = _watch(module, size)
    if calls is None:
        return None
    tree = _Tree(module, calls)
    units = list(tree.units("", tree.holds_stages))
    if not units:
        return None
    groups = _by_resolution(units, calls)
    blocks = tree.blocks_of(groups[-1])
    if not blocks or tree.parameters(groups[-1]) < _MOST * tree.parameters(units):
        layers = tuple(Layer(name=group[0], modules=tuple(group)) for group in groups)
        return Stages(layers=layers, last_stage=len(layers) - 1)
    before = list(chain.from_iterable(groups[:-1]))
    inside = [
        unit
        for unit in tree.units("", lambda name: tree.holds_stages(name) or _holds_any(name, blocks))
        if unit not in before
    ]
    layers = _by_block(before, inside, blocks)
    return Stages(layers=layers, last_stage=len(layers) - math.ceil(len(blocks) / 4))


@dataclass(frozen=True)
class _Call:
    """A module's pass: when it began, and positions a side that it took and gave."""

    order: int
    side_in: float
    side_out: float


class _Tree:
    """A module's parts that take part in the forward pass and have something to learn."""

    def __init__(self, module: nn.Module, calls: dict[str, _Call]) -> None:
        self._modules = dict(module.named_modules())
        self.calls = calls
        self._sizes = {
            name: sum(p.numel() for p in part.parameters()) for name, part in self._modules.items()
        }

    def parts(self, name: str) -> list[str]:
        """The outermost modules inside `name` that are called, in the order of their calls.

        Lists (`nn.ModuleList`) are never called themselves: their elements count.
        """
        return sorted(self._parts(name), key=lambda part: self.calls[part].order)

    def _parts(self, name: str) -> Iterator[str]:
        for child, _ in self._modules[name].named_children():
            path = f"{name}.{child}" if name else child
            if self._sizes.get(path, 0) == 0:  # absent: the same module under a second name
                continue
            if path in self.calls:
                yield path
            else:
                yield from self._parts(path)

    def parameters(self, names: Sequence[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def units(self, name: str, descends: Callable[[str], bool]) -> Iterator[str]:
        """The parts of `name` in order; those into which one descends, by their own parts."""
        for part in self.parts(name):
            if descends(part):
                yield from self.units(part, descends)
            else:
                yield part

    def holds_stages(self, name: str) -> bool:
        """Whether a module is more than one stage, or ends one instead of beginning one."""
        call, parts = self.calls[name], self.parts(name)
        # Where it ends in global pooling, the resolution before.
        sides = [self.calls[part].side_out for part in parts if self.calls[part].side_out > 1]
        side_out = min([call.side_out] if call.side_out > 1 else sides, default=call.side_in)
        shrinks = call.side_in / side_out
        if not parts or shrinks <= _HALVED:
            return False
        if shrinks > _HALVED_TWICE:
            return True
        # A strided block may begin at the old resolution (a bottleneck's first convolution), but
        # what does most of its work there (DenseNet's transition) ends the stage before.
        above = [p for p in parts if self.calls[p].side_out > _HALVED * side_out]
        return self.parameters(above) > self.parameters(parts) / 2

    def blocks_of(self, units: Sequence[str]) -> list[str]:
        """The largest run of blocks of the same kind, side by side inside these units."""
        best: list[str] = []
        inside = [name for name in self._modules if is_within(name, units)]
        for name in {*inside, *(_parent(name) for name in units)}:
            of_class: dict[type, list[str]] = {}
            for part in self.parts(name):
                if is_within(part, units) and self.parts(part):
                    of_class.setdefault(type(self._modules[part]), []).append(part)
            for blocks in of_class.values():
                enough = len(blocks) >= _FEWEST_BLOCKS
                if enough and self.parameters(blocks) > self.parameters(best):
                    best = blocks
        return best


def _by_resolution(units: Sequence[str], calls: dict[str, _Call]) -> list[list[str]]:
    """Units in groups; a group begins where the resolution falls, but for global pooling."""
    groups: list[list[str]] = [[]]
    side = calls[units[0]].side_out
    for unit in units:
        out = calls[unit].side_out
        if 1 < out < side / _HALVED:
            groups.append([])
            side = out
        groups[-1].append(unit)
    return groups


def _by_block(
    before: Sequence[str], units: Sequence[str], blocks: Sequence[str]
) -> tuple[Layer, ...]:
    """What comes before the blocks, then each block; the last with what follows it."""
    groups: list[list[str]] = [list(before)]
    for unit in units:
        if unit in blocks:
            groups.append([])
        groups[-1].append(unit)
    return tuple(Layer(name=group[0], modules=tuple(group)) for group in groups if group)


def _holds_any(name: str, blocks: Sequence[str]) -> bool:
    return any(block.startswith(name + ".") for block in blocks)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


# watching


def _watch(module: nn.Module, size: int) -> dict[str, _Call] | None:
    """What each module took and gave, by its name; None if the network takes no picture."""
    for side in (max(size, _PROBE_SIZE), size):
        try:
            return _watched(module, side)
        except Exception:  # any network may refuse a size, in its own way
            continue
    return None


def _watched(module: nn.Module, size: int) -> dict[str, _Call]:
    begun: dict[str, tuple[int, float | None]] = {}
    calls: dict[str, _Call] = {}

    def before(name: str, _: nn.Module, *inputs: object) -> None:
        begun.setdefault(name, (len(begun), _side(inputs)))

    def after(name: str, _: nn.Module, *inputs_and_output: object) -> None:
        order, side_in = begun[name]
        side_out = _side(inputs_and_output[-1])
        # What gives no picture-like tensor counts as changing nothing.
        side_in = side_in or side_out or 1.0
        calls[name] = _Call(order, side_in, side_out or side_in)

    hooks = []
    for name, part in module.named_modules():
        hooks += [
            part.register_forward_pre_hook(partial(before, name), with_kwargs=True),
            part.register_forward_hook(partial(after, name)),
        ]
    try:
        with torch.no_grad():
            module(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _side(value: object) -> float | None:
    """Positions a side of the first tensor in a module's input or output, for one picture."""
    tensor = _first_tensor(value)
    if tensor is None or not 2 <= tensor.ndim <= 4:
        return None
    shape = tensor.shape
    if tensor.ndim == 2:  # (1, C)
        positions = 1
    elif tensor.ndim == 3:  # (1, N, C)
        positions = shape[1]
    elif shape[2] == shape[3]:  # (1, C, H, W)
        positions = shape[2] * shape[3]
    else:  # (1, H, W, C)
        positions = shape[1] * shape[2]
    return math.sqrt(shape[0] * positions)  # windows lie where the batch does


def _first_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    return None
