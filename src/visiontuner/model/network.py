"""A backbone with its head, trained in part or whole: its stages, its layers, its file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visiontuner.data.arrays import content_checksum
from visiontuner.errors import BackboneError, ClassifierError, VisiontunerError
from visiontuner.experiment.schema import Training

if TYPE_CHECKING:
    from visiontuner.model.backbones import Backbone


# The parts of a network from its input to its features, found by watching an image pass.
#
# A stage is all layers whose output has the same resolution (Lin et al. 2017, Feature Pyramid
# Networks, section 3, https://arxiv.org/abs/1612.03144); a layer that halves the resolution opens
# the next stage, as in ResNet. What follows the global pooling belongs to the last stage. Networks
# that keep one resolution (ViT, MLP-Mixer) are cut block by block, and their last stage is the
# last quarter of the blocks, as in ViTDet, which cuts them in four (Li et al. 2022, section 3,
# https://arxiv.org/abs/2203.16527).


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
    """The stages of a network without its head; None if no image passes, or nothing is learnt.

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
    """What each module took and gave, by its name; None if the network takes no image."""
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
        # What gives no image-like tensor counts as changing nothing.
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
    """Positions a side of the first tensor in a module's input or output, for one image."""
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


# A backbone with its head, trained in part or whole.


Train = Literal["head", "last_stage", "all"]

# Tables of positions are no weights of a layer: a decay towards 0 makes no answer simpler.
_POSITIONS = ("pos_embed", "position_embedding", "pos_embedding", "relative_position_bias_table")


class Network(nn.Module):
    """Images (B, 3, size, size) -> logits (B, num_classes).

    In training mode the parts that are not trained stay as in evaluation: their batch-norm
    statistics never move and nothing in them is dropped.

    Args:
        backbone: images -> features; its parameters need gradients where they are trained.
        head: `Dropout` and `Linear`.
        name: the backbone's.
        train: how much of it is trained.
        stages: the backbone's, from input to features.
        freeze_batch_norm: batch-norm statistics stay as they are in trained parts too; their
            weights are trained all the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Sequential,
        *,
        name: str,
        train: Train,
        stages: Stages,
        freeze_batch_norm: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.name = name
        self.trained = train
        self.stages = stages
        self.freeze_batch_norm = freeze_batch_norm

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float (B, num_classes), of normalised images (B, 3, size, size)."""
        logits: Tensor = self.head(self.backbone(images))  # features are (B, D)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the trained parts; the others stay in evaluation mode."""
        super().train(mode)
        if mode:
            for part in self._parts_at_rest():
                part.training = False
        return self

    def _parts_at_rest(self) -> Iterator[nn.Module]:
        learning = _trained_modules(self.trained, self.stages)
        for name, part in self.backbone.named_modules():
            is_frozen = learning is not None and not is_within(name, learning)
            if is_frozen or (self.freeze_batch_norm and isinstance(part, _BatchNorm)):
                yield part


def build_network(
    backbone: Backbone, head: nn.Sequential, *, train: Train, freeze_batch_norm: bool = False
) -> Network:
    """A network of its own: the backbone is copied, and left as it is.

    Args:
        head: `Dropout` and `Linear`, from `training.fit.linear_head`.
        train: `head`, `last_stage` (and the head) or `all`.

    Raises:
        BackboneError: with `last_stage` or `all` there is nothing in the backbone to train, or
            its stages cannot be told.
    """
    # Before the copy: a forward pass may leave things behind in a network.
    stages = _stages(backbone, train)
    module = copy.deepcopy(backbone.module)
    learning = _trained_modules(train, stages)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learning is None or is_within(name, learning))
    if train != "head" and not any(p.requires_grad for p in module.parameters()):
        raise BackboneError(
            f"Backbone {backbone.name!r} has nothing to train (model.train: {train}): no part of "
            "it holds weights. Choose another: `visiontuner backbones`."
        )
    return Network(
        module,
        head,
        name=backbone.name,
        train=train,
        stages=stages,
        freeze_batch_norm=freeze_batch_norm,
    )


def parameter_groups(network: Network, settings: Training) -> list[dict[str, Any]]:
    """What an optimizer takes: the trained parameters with their learning rates and decays.

    The head comes first, with `learning_rate` and `weight_decay`, as a head on features has them.
    The backbone follows from its end to its beginning with `learning_rate` x
    `backbone_learning_rate_factor` x `layer_decay` ** depth, where the layer next to the head has
    depth 1: with a factor of 1 the rates are BEiT's. Layers are blocks where a network keeps one
    resolution, else stages. Biases, weights of norms and tables of positions do not decay.

    Returns:
        Groups with "params", "lr", "weight_decay" and "name"; none is empty.

    Raises:
        BackboneError: nothing of the network is trained.

    Source: Clark et al. 2020, ELECTRA, section 3 and appendix B, https://arxiv.org/abs/2003.10555;
        Bao et al. 2021, BEiT, https://arxiv.org/abs/2106.08254.
    """
    rate = settings.learning_rate
    groups: dict[str, dict[str, Any]] = {}

    def add(name: str, parameter: nn.Parameter, *, lr: float, weight_decay: float) -> None:
        group = {"params": [], "lr": lr, "weight_decay": weight_decay, "name": name}
        groups.setdefault(name, group)["params"].append(parameter)

    for parameter in network.head.parameters():
        if parameter.requires_grad:
            add("head", parameter, lr=rate, weight_decay=settings.weight_decay)
    for depth, name, parameter in _by_depth(network):
        lr = rate * settings.backbone_learning_rate_factor
        group = "backbone"
        if settings.layer_decay is not None:
            lr *= settings.layer_decay**depth
            group = network.stages.layers[-depth].name
        if _decays(name, parameter, network.backbone):
            add(group, parameter, lr=lr, weight_decay=settings.weight_decay)
        else:
            add(f"{group}, no decay", parameter, lr=lr, weight_decay=0.0)
    if not groups:
        raise BackboneError(
            f"Nothing of the network {network.name!r} is trained; set model.train to head, "
            "last_stage or all."
        )
    return list(groups.values())


def _stages(backbone: Backbone, train: Train) -> Stages:
    if train == "head":
        return Stages(layers=(), last_stage=0)
    stages = find_stages(backbone.module, backbone.preprocessing.size)
    if stages is None and train == "last_stage":
        raise BackboneError(
            f"The stages of backbone {backbone.name!r} cannot be told apart; set model.train to "
            "all or head."
        )
    return stages or Stages(layers=(), last_stage=0)


def _trained_modules(train: Train, stages: Stages) -> tuple[str, ...] | None:
    """Names of the backbone's modules that are trained; None for all."""
    if train == "all":
        return None
    return stages.last_modules if train == "last_stage" else ()


def _by_depth(network: Network) -> Iterator[tuple[int, str, nn.Parameter]]:
    """(depth, name, parameter) of what is trained in the backbone, the end first."""
    trained = [
        (network.stages.depth_of(name), name, parameter)
        for name, parameter in network.backbone.named_parameters()
        if parameter.requires_grad
    ]
    yield from sorted(trained, key=lambda one: one[0])  # stable: in order within a layer


def _decays(name: str, parameter: Tensor, backbone: nn.Module) -> bool:
    is_vector = sum(side > 1 for side in parameter.shape) <= 1
    listed: Collection[str] = getattr(backbone, "no_weight_decay", tuple)()  # timm's say so
    return not (is_vector or name in listed or any(word in name for word in _POSITIONS))


# A network's weights on disk, as a classifier's `weights.safetensors` has them.
#
# Tensors are called `backbone.*`, `head.weight` (num_classes, D) and `head.bias` (num_classes,);
# the file says of which backbone they are, how much of it was trained, and for which classes.


_CHECKSUM = "checksum"  # in a file's header


def save_network(network: Network, path: Path, *, class_names: Sequence[str] | None = None) -> None:
    """Write a network's weights, whole or not at all.

    Args:
        class_names: in the order of the logits; kept in the file, and compared when it is loaded.

    Raises:
        VisiontunerError: the file cannot be written.
    """
    tensors = {f"backbone.{name}": t for name, t in network.backbone.state_dict().items()}
    tensors |= {f"head.{name}": t for name, t in network.head[1].state_dict().items()}
    write_tensors(
        tensors, path, backbone=network.name, train=network.trained, class_names=class_names
    )


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    backbone: str,
    train: Train,
    class_names: Sequence[str] | None,
) -> None:
    """Write tensors and what they are of as a safetensors file, whole or not at all.

    Raises:
        VisiontunerError: the file cannot be written.
    """
    about = {"backbone": backbone, "train": train}
    if class_names is not None:
        about["class_names"] = json.dumps(list(class_names), ensure_ascii=False)
    _write(tensors, path, about)


def save_head(layer: nn.Module, path: Path) -> None:
    """Write a head's linear layer, "weight" and "bias", whole or not at all.

    Raises:
        VisiontunerError: the file cannot be written.
    """
    _write(layer.state_dict(), path, None)


def _write(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None) -> None:
    # Clones: safetensors refuses tensors that share memory or are not contiguous.
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with whole_file(path) as temporary:
        save_file(own, temporary, metadata={**(about or {}), _CHECKSUM: _checksum_of(own)})
        temporary.chmod(0o644)  # safetensors makes it private; a server may be another


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a trial's file, which then takes its place: it is whole or not there.

    Raises:
        VisiontunerError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise VisiontunerError(f"Cannot write {path} ({reason}). Make room there.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """Of all values; a file of ours has it in its header."""
    return content_checksum(
        (name, tensor.reshape(-1).view(torch.uint8).numpy())
        for name, tensor in sorted(tensors.items())
    )


def load_network(network: Network, path: Path, *, class_names: Sequence[str] | None = None) -> None:
    """Fill a network with what `save_network` wrote, or with a classifier's weights.

    Args:
        class_names: the network's; compared with those that the file was trained for, which it
            holds itself or `classifier.json` beside it.

    Raises:
        BackboneError: the file is of another architecture.
        ClassifierError: it cannot be read, is for other classes, or holds values that are not
            finite.
    """
    tensors, about = read_tensors(path)
    head = {n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")}
    prefix = "backbone."
    body = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    _check_backbone(network, body, about.get("backbone"), path)
    _check_head(network, head, path)
    _check_classes(class_names, about, path)
    _check_finite(tensors, path)
    network.backbone.load_state_dict(body)
    network.head[1].load_state_dict(head)


def load_head(network: Network, path: Path) -> None:
    """Begin with a head that was trained on this backbone's features.

    Args:
        path: safetensors with "weight" (num_classes, D) and "bias" (num_classes,).

    Raises:
        ClassifierError: it cannot be read or does not fit.
    """
    tensors, _ = read_tensors(path)
    _check_head(network, tensors, path)
    _check_finite(tensors, path)
    network.head[1].load_state_dict(tensors)


def trained_amount(path: Path) -> Train:
    """How much of the network in a file of `save_network` was trained; "all" if it does not say.

    Raises:
        ClassifierError: it cannot be read.
    """
    said = _read_about(path).get("train")
    return cast(Train, said) if said in get_args(Train) else "all"


# checks


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, verified, and what it says of them.

    Raises:
        ClassifierError: it cannot be read, or holds other values than were written.
    """
    about = _read_about(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable_network(path, error) from None
    if _CHECKSUM in about and about[_CHECKSUM] != _checksum_of(tensors):
        raise ClassifierError(
            f"The weights {path} are damaged: they are not what was written. Delete that file; "
            "`visiontuner evaluate FOLDER` of its search trains the trial again."
        )
    return tensors, about


def _read_about(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unreadable_network(path, error) from None


def _unreadable_network(path: Path, error: Exception) -> ClassifierError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return ClassifierError(
        f"Cannot read the weights {path} ({reason}): it must be a .safetensors file that "
        "visiontuner wrote. Name another."
    )


def _check_backbone(
    network: Network, found: Mapping[str, Tensor], name: str | None, path: Path
) -> None:
    expected = network.backbone.state_dict()
    wrong = [f"no {key}" for key in expected if key not in found]
    wrong += [f"unknown {key}" for key in found if key not in expected]
    wrong += [
        f"{key} is {tuple(found[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        of = f"backbone {name!r}" if name not in (None, network.name) else "another backbone"
        raise BackboneError(
            f"The weights {path} are of {of}, not of {network.name!r} ({wrong[0]}{more}). "
            "Set model.backbone to the one they were trained with."
        )


def _check_head(network: Network, found: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(t.shape) for name, t in network.head[1].state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes == expected:
        return
    classes, dim = expected["weight"]
    got = shapes.get("weight", ())
    if len(got) == 2 and got[1] == dim and shapes.get("bias") == got[:1]:
        raise ClassifierError(
            f"The weights {path} are for {got[0]} classes, this data has {classes}. "
            f"{_OTHER_CLASSES}"
        )
    raise ClassifierError(
        f"The head in {path} holds {shapes}; {network.name} with {classes} classes needs "
        f"{expected}. Use it with the backbone it was trained on."
    )


_OTHER_CLASSES = "Start from their backbone with a new head: set model.weights to that file's path."


def _check_classes(class_names: Sequence[str] | None, about: Mapping[str, str], path: Path) -> None:
    known = _class_names(about, path)
    if class_names is None or known is None or known == list(class_names):
        return
    pairs = zip(known, class_names, strict=False)
    first = next((pair for pair in pairs if pair[0] != pair[1]), None)
    how = f"{first[0]!r} where this data has {first[1]!r}" if first else f"{len(known)} classes"
    raise ClassifierError(f"The weights {path} are for other classes: {how}. {_OTHER_CLASSES}")


def _class_names(about: Mapping[str, str], path: Path) -> list[str] | None:
    try:
        if "class_names" in about:
            return list(json.loads(about["class_names"]))
        text = (path.parent / "classifier.json").read_text(encoding="utf-8")
        return list(json.loads(text)["class_names"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ClassifierError(
            f"The weights {path} hold values that are not finite. Train with a smaller "
            "learning rate."
        )
