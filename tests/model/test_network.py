from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from visiontuner.data.images import Preprocessing
from visiontuner.errors import BackboneError, ClassifierError, VisiontunerError
from visiontuner.experiment.schema import Training
from visiontuner.model.backbones import Backbone, load_backbone
from visiontuner.model.network import (
    Network,
    Train,
    build_network,
    find_stages,
    load_head,
    load_network,
    parameter_groups,
    save_network,
    trained_amount,
)
from visiontuner.model.weights import digest_weights, fit_state_dict, read_state_dict

CLASSES = ("ant", "bee", "cat")


def make_head(dim: int, num_classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.0), nn.Linear(dim, num_classes))


def make_network(
    backbone: Backbone,
    train: Train = "last_stage",
    *,
    num_classes: int = 3,
    freeze_batch_norm: bool = False,
) -> Network:
    return build_network(
        backbone,
        make_head(backbone.feature_dim, num_classes),
        train=train,
        freeze_batch_norm=freeze_batch_norm,
    )


def take_a_step(network: Network, settings: Training | None = None) -> None:
    settings = settings or Training()
    optimizer = torch.optim.SGD(parameter_groups(network, settings), lr=settings.learning_rate)
    network.train()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    functional.cross_entropy(network(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


def changes_of(network: Network, step: Callable[[Network], None]) -> set[str]:
    """Names of the tensors, statistics included, that a step changes."""
    before = copy.deepcopy(network.state_dict())
    step(network)
    after = network.state_dict()
    return {name for name in after if not torch.equal(before[name], after[name])}


def own_backbone(module: nn.Module, dim: int, size: int = 64) -> Backbone:
    """A backbone that no library has."""
    return Backbone(
        name="own",
        module=module.eval().requires_grad_(False),
        feature_dim=dim,
        preprocessing=Preprocessing(
            resize=size, size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"
        ),
        weights_digest=digest_weights(module),
    )


# which parameters are trained


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("resnet18", "layer4"),
        ("resnext50_32x4d", "layer4"),
        ("regnet_y_400mf", "trunk_output.block4"),
        # The stages of 1/32 of the input, and the convolution that ends the network.
        ("efficientnet_b0", "features.6 features.7 features.8"),
        ("efficientnet_lite0", "blocks.5 blocks.6 conv_head bn2"),
        ("mobilenet_v3_small", "features.9 features.10 features.11 features.12 classifier.0"),
        # Not the transition, which works at twice the resolution.
        ("densenet121", "features.denseblock4 features.norm5"),
        # The layers that halve the resolution open the stage.
        ("convnext_tiny", "features.6 features.7 classifier.0"),
        ("swin_t", "features.6 features.7 norm"),
        # Three of twelve blocks.
        (
            "vit_b_32",
            "encoder.layers.encoder_layer_9 encoder.layers.encoder_layer_10 "
            "encoder.layers.encoder_layer_11 encoder.ln",
        ),
        ("vgg11", "features.16 features.18 classifier.0 classifier.3"),
        ("squeezenet1_1", "features.9 features.10 features.11 features.12"),
        ("shufflenet_v2_x0_5", "stage4 conv5"),
        ("timm:resnet10t", "layer4"),
        ("timm:efficientnet_b0", "blocks.5 blocks.6 conv_head bn2"),
        ("timm:convnext_atto", "stages.3 head"),
        ("timm:vit_tiny_patch16_224", "blocks.9 blocks.10 blocks.11 norm"),
        ("timm:mixer_s32_224", "blocks.6 blocks.7 norm"),  # two of eight
    ],
)
def test_last_stage_of_every_family(name: str, trained: str, cache: Path) -> None:
    size = None if "mixer" in name else 64
    backbone = load_backbone(name, weights="none", image_size=size, cache=cache)
    network = make_network(backbone, "last_stage")
    parameters = dict(network.backbone.named_parameters())
    expected = {
        parameter
        for parameter in parameters
        if any(parameter.startswith(part + ".") for part in trained.split())
    }
    assert {name for name, p in parameters.items() if p.requires_grad} == expected
    assert all(any(name.startswith(f"{part}.") for name in expected) for part in trained.split())
    assert all(parameter.requires_grad for parameter in network.head.parameters())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class OwnIsotropic(nn.Module):
    """Patches, ten blocks in a ModuleList, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.table = nn.Parameter(torch.zeros(1, 16, 16))
        self.many = nn.ModuleList([Residual(16) for _ in range(10)])
        self.end = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.table
        for block in self.many:
            x = block(x)
        return self.end(x).mean(1)


def own_pyramid() -> nn.Sequential:
    """A wrapper round a trunk that pools: nothing at the top tells of stages."""
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(trunk, nn.Linear(8, 6))


def test_other_networks_follow_the_general_rule() -> None:
    pyramid = find_stages(own_pyramid().eval(), 64)
    assert pyramid is not None
    assert [layer.modules for layer in pyramid.layers] == [
        ("0.0",),
        ("0.1",),
        ("0.2", "0.3", "1"),
    ]
    assert pyramid.last_modules == ("0.2", "0.3", "1")
    isotropic = find_stages(OwnIsotropic().eval(), 64)
    assert isotropic is not None
    assert [layer.name for layer in isotropic.layers] == [
        "patches",
        *(f"many.{number}" for number in range(10)),
    ]
    assert isotropic.last_modules == ("many.7", "many.8", "many.9", "end")  # 10 / 4, rounded up
    assert isotropic.depth_of("end.weight") == isotropic.depth_of("many.9.inside.0.bias") == 1
    assert isotropic.depth_of("many.0.inside.0.bias") == 10
    assert isotropic.depth_of("table") == isotropic.depth_of("patches.weight") == 11


def test_looking_for_stages_leaves_the_network_as_it_was(resnet: Backbone) -> None:
    module = copy.deepcopy(resnet.module)
    assert find_stages(module, 64) is not None
    assert digest_weights(module) == resnet.weights_digest
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("train", ["last_stage", "all"])
def test_network_with_nothing_to_train_is_refused_in_one_line(train: Train) -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BackboneError, match=r"'own'.*model\.train") as error:
        make_network(own_backbone(module, 3), train)
    assert "\n" not in str(error.value)


def test_optimizer_without_parameters_is_refused(resnet: Backbone) -> None:
    network = make_network(resnet, "head").requires_grad_(False)
    with pytest.raises(BackboneError, match=r"Nothing of the network 'resnet18'"):
        parameter_groups(network, Training())


# training mode


@pytest.mark.parametrize(
    ("train", "moves"),
    [
        ("head", set()),
        ("last_stage", {"layer4"}),
        ("all", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_a_step_moves_what_is_trained_and_nothing_else(
    train: Train, moves: set[str], resnet: Backbone
) -> None:
    network = make_network(resnet, train)
    changed = changes_of(network, take_a_step)
    assert {name.split(".")[1] for name in changed if name.startswith("backbone.")} == moves
    assert {"head.1.weight", "head.1.bias"} <= changed
    statistics = [name for name in changed if "running" in name or "batches" in name]
    assert bool(statistics) == bool(moves)  # frozen parts' statistics never move
    assert resnet.weights_digest == digest_weights(resnet.module)  # the network is a copy


@pytest.mark.parametrize("train", ["last_stage", "all"])
def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_weights(
    train: Train, resnet: Backbone
) -> None:
    network = make_network(resnet, train, freeze_batch_norm=True)
    changed = changes_of(network, take_a_step)
    assert not any("running" in name or "batches" in name for name in changed)
    assert {"backbone.layer4.1.bn2.weight", "backbone.layer4.1.bn2.bias"} <= changed
    network.train()
    # One image is no trouble then, even where it ends as one position.
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_modes_can_be_changed_often(resnet: Backbone) -> None:
    network = make_network(resnet, "last_stage")
    for _ in range(2):
        assert not any(part.training for part in network.eval().modules())
        network.train()
        training = {name for name, part in network.named_modules() if part.training}
        assert {"", "head", "head.0", "backbone.layer4", "backbone.layer4.0.bn1"} <= training
        assert not any(name.startswith(("backbone.layer3", "backbone.bn1")) for name in training)
    twin = copy.deepcopy(network)  # as an average of the weights is made
    assert not twin.train().backbone.get_submodule("layer3").training


def test_a_network_with_helpers_in_training_gives_logits(cache: Path) -> None:
    backbone = load_backbone("googlenet", weights="none", image_size=64, cache=cache)
    network = make_network(backbone, "all").train()
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 3)


# learning rates


def test_head_comes_first_and_the_backbone_learns_slower(resnet: Backbone) -> None:
    network = make_network(resnet, "last_stage")
    settings = Training(learning_rate=0.01, backbone_learning_rate_factor=0.2, weight_decay=0.05)
    groups = parameter_groups(network, settings)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("head", 0.05),
        ("backbone", 0.05),
        ("backbone, no decay", 0.0),
    ]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.002, 0.002])
    head, decayed, spared = (group["params"] for group in groups)
    assert [id(p) for p in head] == [id(p) for p in network.head.parameters()]
    assert all(p.ndim == 4 for p in decayed)  # convolutions
    assert all(p.ndim == 1 for p in spared)  # batch norm
    given = [id(p) for group in groups for p in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for p in network.parameters() if p.requires_grad}


def test_head_alone_is_trained_as_on_features(resnet: Backbone) -> None:
    (group,) = parameter_groups(make_network(resnet, "head"), Training(weight_decay=0.3))
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.003, 0.3, 2)


def test_layers_learn_slower_the_further_they_are_from_the_head(resnet: Backbone) -> None:
    settings = Training(
        learning_rate=1.0, backbone_learning_rate_factor=0.5, layer_decay=0.1, weight_decay=0.2
    )
    groups = parameter_groups(make_network(resnet, "all"), settings)
    rates = {group["name"]: group["lr"] for group in groups if "no decay" not in group["name"]}
    assert rates == pytest.approx(
        {
            "head": 1.0,
            "layer4": 0.05,  # 0.5 x 0.1
            "layer3": 0.005,
            "layer2": 0.0005,
            "layer1": 0.00005,
            "conv1": 0.000005,
        }
    )
    assert all(group["lr"] == pytest.approx(rates[group["name"].split(",")[0]]) for group in groups)
    last = parameter_groups(make_network(resnet, "last_stage"), settings)
    assert [group["name"] for group in last] == ["head", "layer4", "layer4, no decay"]


def test_layer_decay_of_a_vit_is_that_of_timm(cache: Path) -> None:
    from timm import create_model
    from timm.optim import param_groups_layer_decay

    name = "vit_tiny_patch16_224"
    backbone = load_backbone(f"timm:{name}", weights="none", image_size=64, cache=cache)
    settings = Training(
        learning_rate=1.0, backbone_learning_rate_factor=1.0, layer_decay=0.75, weight_decay=0.2
    )
    network = make_network(backbone, "all")
    names = {id(p): name for name, p in network.backbone.named_parameters()}
    ours = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network, settings)
        if group["name"] != "head"
        for p in group["params"]
    }
    theirs = create_model(name, num_classes=3, img_size=64)
    their_names = {id(p): name for name, p in theirs.named_parameters()}
    expected = {
        their_names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            theirs,
            weight_decay=0.2,
            layer_decay=0.75,
            no_weight_decay_list=theirs.no_weight_decay(),
        )
        for p in group["params"]
    }
    assert len(ours) == 150
    for parameter, values in ours.items():
        if parameter.startswith("norm."):  # theirs learns as the head does, ours as the last block
            assert values == pytest.approx((0.75, 0.0))
        else:
            assert values == pytest.approx(expected[parameter]), parameter


# files


@pytest.fixture
def trained(resnet: Backbone) -> Network:
    network = make_network(resnet, "last_stage")
    take_a_step(network)
    return network


@pytest.fixture
def weights(trained: Network, tmp_path: Path) -> Path:
    path = tmp_path / "network.safetensors"
    save_network(trained, path, class_names=CLASSES)
    return path


def test_saved_network_is_the_same_after_loading(
    trained: Network, weights: Path, resnet: Backbone
) -> None:
    again = make_network(resnet, "all")
    load_network(again, weights, class_names=CLASSES)
    expected = trained.state_dict()
    assert list(again.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again.eval()(images), trained.eval()(images))
    assert trained_amount(weights) == "last_stage"
    assert [path.name for path in weights.parent.iterdir()] == ["network.safetensors"]
    assert weights.stat().st_mode & 0o444 == 0o444


def test_file_has_the_names_that_a_classifier_has(weights: Path, resnet: Backbone) -> None:
    tensors = load_file(weights)
    assert tensors["head.weight"].shape == (3, 512)
    assert tensors["head.bias"].shape == (3,)
    body = {name for name in tensors if not name.startswith("head.")}
    assert body == {f"backbone.{name}" for name in resnet.module.state_dict()}
    # And it is a backbone's weights too, as the error for other classes advises.
    state = fit_state_dict(
        read_state_dict(weights), resnet.module, head=("head", "fc"), name="resnet18"
    )
    assert torch.equal(state["conv1.weight"], tensors["backbone.conv1.weight"])


def test_weights_in_memory_formats_of_their_own_are_saved(resnet: Backbone, tmp_path: Path) -> None:
    network = make_network(resnet, "all").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_network(network, tmp_path / "network.safetensors")
    again = make_network(resnet, "all")
    load_network(again, tmp_path / "network.safetensors")
    assert torch.equal(again.head[1].weight, network.head[1].weight)
    assert digest_weights(again.backbone) == resnet.weights_digest


def test_training_begins_with_a_head_that_was_trained(resnet: Backbone, tmp_path: Path) -> None:
    weight, bias = torch.rand(3, 512), torch.rand(3)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    network = make_network(resnet)
    load_head(network, tmp_path / "head.safetensors")
    assert torch.equal(network.head[1].weight, weight)
    assert torch.equal(network.head[1].bias, bias)
    assert network.head[1].weight.requires_grad
    with pytest.raises(ClassifierError, match="for 3 classes, this data has 4"):
        load_head(make_network(resnet, num_classes=4), tmp_path / "head.safetensors")


def test_weights_that_are_not_what_was_written_are_refused(weights: Path, resnet: Backbone) -> None:
    content = weights.read_bytes()
    weights.write_bytes(content[:-4096] + bytes(4096))
    with pytest.raises(ClassifierError, match=r"network.safetensors are damaged.*Delete"):
        load_network(make_network(resnet, "last_stage"), weights)


def test_weights_of_another_architecture_are_refused(weights: Path, bundled: Backbone) -> None:
    network = make_network(bundled, "head")
    with pytest.raises(BackboneError, match="of backbone 'resnet18', not of 'efficientnet_lite0'"):
        load_network(network, weights)


def test_weights_of_the_same_names_and_other_shapes_are_refused(
    weights: Path, resnet: Backbone
) -> None:
    module = copy.deepcopy(resnet.module)
    module.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    network = make_network(replace(resnet, module=module), "head")
    with pytest.raises(BackboneError, match=r"conv1\.weight is \(64, 3, 7, 7\), not \(64, 3, 3, 3"):
        load_network(network, weights)


def _with(weights: Path, **tensors: Tensor) -> None:
    save_file(load_file(weights) | {k.replace("__", "."): t for k, t in tensors.items()}, weights)


@pytest.mark.parametrize(
    ("damage", "names", "message"),
    [
        (lambda _: None, ("ant", "bee", "dog"), "'cat' where this data has 'dog'"),
        (lambda _: None, ("bee", "ant", "cat"), "'ant' where this data has 'bee'"),
        (
            lambda path: _with(path, head__weight=torch.rand(5, 512), head__bias=torch.rand(5)),
            CLASSES,
            "for 5 classes, this data has 3.*model.weights",
        ),
        (
            lambda path: _with(path, head__weight=torch.rand(3, 8)),
            CLASSES,
            "the backbone it was trained on",
        ),
        (
            lambda path: _with(path, head__bias=torch.full((3,), torch.nan)),
            CLASSES,
            "not finite",
        ),
        (lambda path: path.write_bytes(b"junk"), CLASSES, "Cannot read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), CLASSES, "Cannot read"),
        (Path.unlink, CLASSES, "Cannot read"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    damage: Callable[[Path], None],
    names: tuple[str, ...],
    message: str,
    weights: Path,
    resnet: Backbone,
) -> None:
    network = make_network(resnet)
    damage(weights)
    before = digest_weights(network)
    with pytest.raises(ClassifierError, match=message) as error:
        load_network(network, weights, class_names=names)
    assert "\n" not in str(error.value)
    assert digest_weights(network) == before


def test_a_file_that_cannot_be_written_leaves_nothing(trained: Network, tmp_path: Path) -> None:
    with pytest.raises(VisiontunerError, match=r"Cannot write .*network\.safetensors") as error:
        save_network(trained, tmp_path / "gone" / "network.safetensors")
    assert "\n" not in str(error.value)
    (tmp_path / "network.safetensors").mkdir()  # nor can a folder be replaced
    with pytest.raises(VisiontunerError, match="Cannot write"):
        save_network(trained, tmp_path / "network.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors"]
