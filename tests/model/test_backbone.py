from __future__ import annotations

from pathlib import Path

import pytest
import requests
import timm
import torch
import torchvision
from safetensors.torch import save_file

from visiontuner.errors import BackboneError
from visiontuner.model.backbones import (
    Backbone,
    bundled_weights,
    list_backbones,
    load_backbone,
    timm_key,
)
from visiontuner.model.catalogue import RECOMMENDED, installed_weights


@pytest.mark.parametrize(
    ("name", "feature_dim"),
    [
        ("resnet18", 512),
        ("mobilenet_v3_small", 1024),
        ("efficientnet_b0", 1280),
        ("convnext_tiny", 768),
        ("vit_b_32", 768),
        ("swin_t", 768),
        ("densenet121", 1024),
        ("regnet_y_400mf", 440),
        ("squeezenet1_1", 512),
        ("shufflenet_v2_x0_5", 1024),
        ("timm:resnet10t", 512),
        ("timm:vit_tiny_patch16_224", 192),
    ],
)
def test_every_family_gives_one_vector_an_image(name: str, feature_dim: int, cache: Path) -> None:
    backbone = load_backbone(name, weights="none", image_size=64, cache=cache)
    with torch.inference_mode():
        features = backbone.module(torch.rand(3, 3, 64, 64))
    assert features.shape == (3, feature_dim)
    assert backbone.feature_dim == feature_dim
    assert backbone.preprocessing.size == 64
    assert not any(part.training for part in backbone.module.modules())
    assert not any(weight.requires_grad for weight in backbone.module.parameters())


def test_preprocessing_is_that_of_the_published_weights(cache: Path) -> None:
    preprocessing = load_backbone("resnet50", weights="none", cache=cache).preprocessing
    assert (preprocessing.resize, preprocessing.size) == (232, 224)
    assert preprocessing.mean == (0.485, 0.456, 0.406)
    assert preprocessing.std == (0.229, 0.224, 0.225)
    assert preprocessing.interpolation == "bilinear"


def test_bundled_backbone_uses_the_normalisation_its_weights_need(bundled: Backbone) -> None:
    preprocessing = bundled.preprocessing
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert (preprocessing.resize, preprocessing.size) == (256, 224)  # 224 / 0.875
    assert preprocessing.interpolation == "bicubic"
    assert bundled.feature_dim == 1280


_STAGES = {
    "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
}


@pytest.mark.parametrize("name", _STAGES)
def test_bundled_weights_fill_timms_network_exactly(name: str) -> None:
    network = timm.create_model(f"tf_{name}", pretrained=False)
    state = bundled_weights(name)
    network.load_state_dict(state, strict=True)
    original = torch.load(str(installed_weights(name)), weights_only=True)
    # One to one, and in the order in which both networks run their layers.
    assert list(state) == list(network.state_dict())
    renamed = {timm_key(key, _STAGES[name]): value for key, value in original.items()}
    assert all(torch.equal(state[key], value) for key, value in renamed.items())
    (known,) = [network for network in RECOMMENDED if network.name == name]
    assert known.parameters == sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "resize"), [("efficientnet_lite1", 240, 272), ("efficientnet_lite2", 260, 292)]
)
def test_larger_bundled_backbones_use_their_own_input_size(
    name: str, size: int, resize: int, cache: Path
) -> None:
    backbone = load_backbone(name, cache=cache)
    preprocessing = backbone.preprocessing
    assert (preprocessing.resize, preprocessing.size) == (resize, size)
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert backbone.feature_dim == 1280


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.3._bn0.weight", "blocks.2.0.bn1.weight"),
        ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
        ("_bn1.running_mean", "bn2.running_mean"),
        ("_fc.bias", "classifier.bias"),
    ],
)
def test_bundled_keys_are_renamed(key: str, expected: str) -> None:
    assert timm_key(key, _STAGES["efficientnet_lite0"]) == expected


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(cache: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone("mobilenet_v3_small", weights="none", cache=cache)
    assert torch.equal(torch.rand(3), expected)
    second = load_backbone("mobilenet_v3_small", weights="none", cache=cache)
    assert first.weights_digest == second.weights_digest


def _resnet_state(num_classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(torchvision.models.resnet18(num_classes=num_classes).state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_with_another_head_is_taken(
    suffix: str, prefix: str, tmp_path: Path, cache: Path
) -> None:
    state = _resnet_state(num_classes=7)
    path = tmp_path / f"weights{suffix}"
    renamed = {prefix + key: value for key, value in state.items()}
    if suffix == ".pth":
        torch.save({"state_dict": renamed, "epoch": 3}, path)
    else:
        save_file(renamed, path)
    backbone = load_backbone("resnet18", weights=str(path), image_size=64, cache=cache)
    assert torch.equal(backbone.module.conv1.weight, state["conv1.weight"])


def test_reference_network_gives_the_same_features(tmp_path: Path, cache: Path) -> None:
    state = _resnet_state(num_classes=7)
    torch.save(state, tmp_path / "w.pth")
    reference = torchvision.models.resnet18(num_classes=7).eval()
    reference.load_state_dict(state)
    reference.fc = torch.nn.Identity()
    backbone = load_backbone(
        "resnet18", weights=str(tmp_path / "w.pth"), image_size=64, cache=cache
    )
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(backbone.module(images), reference(images))


def test_vit_positions_are_interpolated_to_another_size(tmp_path: Path, cache: Path) -> None:
    network = torchvision.models.VisionTransformer(
        image_size=224, patch_size=32, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072
    )
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    backbone = load_backbone(
        "vit_b_32", weights=str(tmp_path / "vit.pth"), image_size=64, cache=cache
    )
    # 2 x 2 patches and the class token.
    assert backbone.module.state_dict()["encoder.pos_embedding"].shape == (1, 5, 768)


def test_weights_of_another_network_name_what_differs(tmp_path: Path, cache: Path) -> None:
    torch.save(torchvision.models.resnet34(num_classes=2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"do not fit 'resnet18': unknown layer1\.2\.conv1"):
        load_backbone("resnet18", weights=str(tmp_path / "w.pth"), cache=cache)


def test_weights_of_another_shape_name_both(tmp_path: Path, cache: Path) -> None:
    state = _resnet_state(2) | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        BackboneError, match=r"conv1\.weight is 64x1x7x7, expected 64x3x7x7"
    ) as error:
        load_backbone("resnet18", weights=str(tmp_path / "w.pth"), cache=cache)
    assert "\n" not in str(error.value)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code in a weights file was run",)


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04junk", "trap", "empty"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_weights_are_refused_without_running_code(
    content: bytes | str, suffix: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / f"w{suffix}"
    if isinstance(content, str):
        torch.save({"fc.weight": _Trap()} if content == "trap" else {}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(BackboneError, match="Cannot read the weights"):
        load_backbone("resnet18", weights=str(path), cache=cache)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["/no/such/file.pth", "ftp://host/w.pth", "best"])
def test_weights_that_are_nowhere_name_the_choices(weights: str, cache: Path) -> None:
    with pytest.raises(BackboneError, match="must be default, none"):
        load_backbone("resnet18", weights=weights, cache=cache)


@pytest.mark.parametrize("name", ["resnet50", "timm:resnet10t", "mnasnet1_0"])
def test_without_a_network_the_message_names_the_offline_choice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_args: object, **_kwargs: object) -> None:
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(BackboneError, match=r"efficientnet_lite0.*`weights: PATH`") as error:
        load_backbone(name, cache=tmp_path)
    assert "\n" not in str(error.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class _Response:
    def __init__(self, blocks: list[bytes], breaks: bool) -> None:
        self.blocks, self.breaks = blocks, breaks

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *_args: object) -> None: ...

    def raise_for_status(self) -> None: ...

    def iter_content(self, _size: int):
        yield from self.blocks
        if self.breaks:
            raise requests.ConnectionError("reset")


def test_download_is_kept_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(_resnet_state(4), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    calls = []

    def get(url: str, **_kwargs: object) -> _Response:
        calls.append(url)
        return _Response([content[:1000], content[1000:]], breaks=False)

    monkeypatch.setattr(requests, "get", get)
    url = "https://example.org/w.pth?download=1"
    for _ in range(2):
        load_backbone("resnet18", weights=url, image_size=64, cache=tmp_path / "cache")
    assert calls == [url]
    (kept,) = (tmp_path / "cache").rglob("w.pth")
    kept.write_bytes(content[:-2000].ljust(len(content), b"\0"))  # damaged since
    load_backbone("resnet18", weights=url, image_size=64, cache=tmp_path / "cache")
    assert calls == [url, url]
    assert kept.read_bytes() == content
    (kept.parent / "meta.json").unlink()  # as an earlier version left it
    load_backbone("resnet18", weights=url, image_size=64, cache=tmp_path / "cache")
    assert calls == [url, url]
    assert (kept.parent / "meta.json").is_file()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(BackboneError, match="SHA-256"):  # not torchvision's resnet18-f37072fd.pth
        load_backbone("resnet18", cache=tmp_path / "other")


def test_broken_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "get", lambda *_a, **_k: _Response([b"half"], breaks=True))
    with pytest.raises(BackboneError, match="no connection"):
        load_backbone("resnet18", weights="https://example.org/w.pth", cache=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet19", "resnet18"), ("timm:resnet19", "timm:resnet18")]
)
def test_unknown_backbone_names_its_neighbours(name: str, nearest: str, cache: Path) -> None:
    with pytest.raises(BackboneError, match=f"Unknown backbone '{name}'. Nearest: {nearest}"):
        load_backbone(name, cache=cache)


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 100), ("vgg11", 16)])
def test_impossible_image_size_is_refused(name: str, size: int, cache: Path) -> None:
    with pytest.raises(BackboneError, match=f"cannot be used at image size {size}"):
        load_backbone(name, weights="none", image_size=size, cache=cache)


def test_list_names_all_sources() -> None:
    infos = list_backbones()
    assert [info.name for info in infos[:3]] == list(_STAGES)
    assert {info.source for info in infos} == {"bundled", "torchvision", "timm"}
    (resnet50,) = [info for info in infos if info.name == "resnet50"]
    assert (resnet50.parameters, resnet50.image_size) == (25_557_032, 224)
    assert all("RESNET18" in info.name.upper() for info in list_backbones("ResNet18"))
