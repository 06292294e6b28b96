"""A backbone with its head, trained in part or whole."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visiontuner.errors import BackboneError
from visiontuner.experiment import Training
from visiontuner.model.stages import Stages, find_stages, is_within

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
