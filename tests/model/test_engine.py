from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from visiontuner.errors import ExportError
from visiontuner.model import onnx as engine_module
from visiontuner.model.backbones import Backbone
from visiontuner.model.onnx import OnnxEngine, TorchEngine, _key, export_backbone, make_engine


def _images(count: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, size, size), dtype=np.float32)


def _expected(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return backbone.module(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_runtime_equals_torch_at_any_batch_size(
    count: int, resnet: Backbone, cache: Path
) -> None:
    engine = make_engine(resnet, precision="fp32", cache=cache, threads=1)
    assert isinstance(engine, OnnxEngine)
    assert engine.description == "ONNX Runtime fp32 on 1 CPU thread"
    images = _images(count)
    features = engine.features(images)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, _expected(resnet, images), rtol=1e-4, atol=1e-5)


def test_export_is_cached_and_tells_nothing_about_the_machine(
    resnet: Backbone, cache: Path, capfd: pytest.CaptureFixture
) -> None:
    path = export_backbone(resnet, cache=cache)
    written = path.stat().st_mtime_ns
    assert export_backbone(resnet, cache=cache) == path
    assert path.stat().st_mtime_ns == written
    content = path.read_bytes()
    for trace in (b"site-packages", b".py", str(Path.cwd()).encode(), str(cache).encode()):
        assert trace not in content
    onnx.checker.check_model(onnx.load(path))
    assert list(path.parent.glob(".export-*")) == []
    assert capfd.readouterr() == ("", "")


def test_other_weights_are_another_export(resnet: Backbone, cache: Path) -> None:
    path = export_backbone(resnet, cache=cache)
    other = replace(resnet, weights_digest="0" * 64)
    assert path.parent.name == _key(resnet) != _key(other)
    smaller = replace(resnet, preprocessing=resnet.preprocessing.with_size(96))
    assert _key(smaller) != path.parent.name


def test_export_that_is_not_what_was_written_is_written_anew(
    resnet: Backbone, cache: Path, tmp_path: Path
) -> None:
    folder = export_backbone(resnet, cache=cache).parent
    copy = Path(shutil.copytree(folder, tmp_path / "exports" / folder.name)) / "backbone.onnx"
    content = copy.read_bytes()
    copy.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    assert export_backbone(resnet, cache=tmp_path) == copy
    images = _images(2)
    engine = make_engine(resnet, precision="fp32", cache=tmp_path, threads=1)
    assert isinstance(engine, OnnxEngine)
    np.testing.assert_allclose(
        engine.features(images), _expected(resnet, images), rtol=1e-3, atol=1e-4
    )


def test_network_that_does_not_export_runs_in_torch_and_says_so(
    resnet: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("unsupported operator\n  many lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    odd = replace(resnet, weights_digest="1" * 64)
    engine = make_engine(odd, precision="fp32", cache=cache, threads=1)
    assert isinstance(engine, TorchEngine)
    assert engine.description == (
        "torch fp32 on the CPU (Backbone 'resnet18' cannot be written as ONNX: "
        "unsupported operator)"
    )
    with pytest.raises(ExportError, match="unsupported operator"):
        export_backbone(odd, cache=cache)
    assert not list((cache / "exports" / _key(odd)).iterdir())
    images = _images(3)
    np.testing.assert_allclose(engine.features(images), _expected(odd, images), rtol=1e-4)


def test_export_that_answers_differently_is_not_used(
    resnet: Backbone, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy.onnx"
    path.write_bytes(export_backbone(resnet, cache=cache).read_bytes())
    monkeypatch.setattr(engine_module, "export_backbone", lambda *_a, **_k: path)
    shifted = replace(resnet, module=torch.nn.Sequential(resnet.module, torch.nn.Softplus()))
    engine = make_engine(shifted, precision="fp32", cache=tmp_path, threads=1)
    assert isinstance(engine, TorchEngine)
    assert "differs from torch" in engine.description


def test_bf16_runs_in_torch_and_stays_close(resnet: Backbone, cache: Path) -> None:
    engine = make_engine(resnet, precision="bf16", cache=cache, threads=1)
    assert engine.description == "torch bf16 on the CPU"
    images = _images(2)
    got, expected = engine.features(images), _expected(resnet, images)
    assert got.dtype == np.float32
    cosine = (
        (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert cosine.min() > 0.999


def test_export_writes_bounded_activations_as_torch_computes_them(
    resnet: Backbone, cache: Path
) -> None:
    class Bounded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.ReLU6(), torch.nn.Sequential(torch.nn.Hardtanh(-0.5, 0.25))
            )

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layers(images * 9).mean(dim=(2, 3))

    module = Bounded().eval()
    bounded = replace(resnet, module=module, weights_digest="bounded")
    path = export_backbone(bounded, cache=cache)
    images = _images(3)
    got = OnnxEngine(path, threads=1).features(images)
    np.testing.assert_allclose(got, _expected(bounded, images), atol=1e-6)
    assert type(module.layers[0]) is torch.nn.ReLU6  # it is trained as it was


@pytest.mark.parametrize(("threads", "lanes"), [(1, 1), (2, 2), (16, 16), (24, 16), (64, 16)])
def test_an_engine_takes_a_call_a_core_up_to_sixteen(
    resnet: Backbone, cache: Path, threads: int, lanes: int
) -> None:
    engine = OnnxEngine(export_backbone(resnet, cache=cache), threads=threads)
    assert engine.lanes == lanes
    assert f"on {threads} CPU thread" in engine.description
