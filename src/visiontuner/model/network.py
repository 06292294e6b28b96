"""A backbone with its head, trainable in part or whole; saved as a classifier's weights are."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visiontuner.errors import BackboneError, ClassifierError, VisiontunerError
from visiontuner.experiment import Training
from visiontuner.model.stages import Stages, find_stages, is_within
from visiontuner.model.weights import digest_weights

if TYPE_CHECKING:
    from visiontuner.model.backbone import Backbone

Train = Literal["head", "last_stage", "all"]

# Tables of positions are no weights of a layer: a decay towards 0 makes no answer simpler.
_POSITIONS = ("pos_embed", "position_embedding", "pos_embedding", "relative_position_bias_table")


class Network(nn.Module):
    """Pictures (B, 3, size, size) -> logits (B, num_classes).

    In training mode the parts that are not trained stay as in evaluation: their batch-norm
    statistics never move and nothing in them is dropped.

    Args:
        backbone: pictures -> features; its parameters need gradients where they are trained.
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
        """Logits, float (B, num_classes), of normalised pictures (B, 3, size, size)."""
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


# files


def save_network(network: Network, path: Path, *, class_names: Sequence[str] | None = None) -> None:
    """Write the weights as a classifier's `weights.safetensors` has them; whole or not at all.

    Tensors are called `backbone.*`, `head.weight` (num_classes, D) and `head.bias` (num_classes,).

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
    # Clones: safetensors refuses tensors that share memory or are not contiguous.
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(own, temporary, metadata=about)
        temporary.chmod(0o644)  # safetensors makes it private; a server may be another
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise VisiontunerError(f"Cannot write {path} ({reason}). Make room there.") from None
    finally:
        temporary.unlink(missing_ok=True)


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
    tensors, about = _read(path)
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
    tensors, _ = _read(path)
    _check_head(network, tensors, path)
    _check_finite(tensors, path)
    network.head[1].load_state_dict(tensors)


def trained_amount(path: Path) -> Train:
    """How much of the network in a file of `save_network` was trained; "all" if it does not say.

    Raises:
        ClassifierError: it cannot be read.
    """
    said = _read_about(path).get("train")
    return said if said in ("head", "last_stage") else "all"  # type: ignore[return-value]


def tuned_backbone(backbone: Backbone, network: Network) -> Backbone:
    """A network's backbone as one that gives features; `backbone` says how pictures are read."""
    module = copy.deepcopy(network.backbone).cpu().eval().requires_grad_(False)
    return replace(backbone, module=module, weights_digest=digest_weights(module))


# parts


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


# checks


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    about = _read_about(path)
    try:
        return load_file(path), about
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _read_about(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ClassifierError:
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
