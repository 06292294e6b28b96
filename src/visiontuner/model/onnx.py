"""Networks in ONNX: simplified, exported, and run by the fastest engine."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from visiontuner.data.arrays import Precision, available_cpus, commit_folder, find_damage
from visiontuner.errors import DiskError, ExportError, VisiontunerError
from visiontuner.io.files import disk_problem, locked, temporary_folder, write_cached_json
from visiontuner.model.backbones import Backbone
from visiontuner.model.classifier import FEATURE_MAP, FEATURES, open_on_cpu
from visiontuner.model.features import Engine, Features, Images
from visiontuner.workarounds.torch import full_float32

# A network as torch writes it fastest: fewer operations, the same answers.


# Of the largest feature; where convolutions and what follows fuse it is about 1e-6.
_SAME_WITHIN = 1e-4


def easily_traced(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy that torch writes as ONNX in two thirds of the time, with the same answers.

    - A batch normalisation after a convolution goes into the convolution's weights: a third of the
      operations. A network in which that does not give the same features keeps them.
    - ReLU6 and Hardtanh become what they are, `clamp`: torch takes each apart in symbols.

    Args:
        network: in eval mode.
        example: an image that it takes, of noise at best, float32 (1, 3, H, W).
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


# A backbone as one ONNX file without a trace of the machine that wrote it, cached by content.


_SCHEMA_VERSION = 3
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export_backbone(backbone: Backbone, *, cache: Path) -> Path:
    """The backbone as an ONNX file; written once for the same weights, size and torch version.

    A file that is not what was written, by its checksum, is written anew. Its input is `image`,
    float32 (B, 3, size, size), and its output `features`, float32 (B, feature_dim), for any B.

    Raises:
        ExportError: torch cannot write this network as ONNX.
    """
    target = cache / "exports" / _key(backbone) / "backbone.onnx"
    if find_damage(target.parent) is None:
        return target
    with locked(target.parent):
        if find_damage(target.parent) is not None:  # else another process has done it meanwhile
            target.parent.mkdir(exist_ok=True)
            with temporary_folder(target.parent) as folder:
                temporary = folder / "backbone.onnx"
                save_onnx(_exported(backbone, temporary), temporary)
                temporary.replace(target)
            commit_folder(target.parent, {"backbone": backbone.name}, [target.name])
    return target


def exported_once(backbone: Backbone) -> onnx.ModelProto:
    """The same as `export_backbone` writes, kept nowhere: a fine-tuned network is packaged once.

    Raises:
        ExportError: torch cannot write this network as ONNX.
    """
    with temporary_folder() as folder:
        return _exported(backbone, folder / "backbone.onnx")


# What only gives its input another shape.
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Identity")


def add_feature_map(model: onnx.ModelProto) -> None:
    """Make what is pooled to the features an output, `feature_map`, if they are a plain mean of it.

    Then features = feature_map.mean((2, 3)), float32 (B, D, height, width), and a linear head on
    them has an exact class activation map (Zhou et al. 2016, https://arxiv.org/abs/1512.04150).
    """
    graph = model.graph
    name = _find_pooled(graph)
    if name is None:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.value_info}
    sides = [side.dim_value for side in shapes.get(name, ())[1:]]
    if len(sides) != 3 or not all(sides):
        return
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [FEATURE_MAP if one == name else one for one in names]
    kept = [value for value in graph.value_info if value.name != name]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    kind = onnx.TensorProto.FLOAT
    graph.output.append(onnx.helper.make_tensor_value_info(FEATURE_MAP, kind, [batch, *sides]))


def _find_pooled(graph: onnx.GraphProto) -> str | None:
    """The tensor (B, D, height, width) whose mean over height and width is the features."""
    made_by = {name: node for node in graph.node for name in node.output}
    name = FEATURES
    while (node := made_by.get(name)) is not None:
        if node.op_type == "GlobalAveragePool" or (
            node.op_type == "ReduceMean" and _axes_of(node, graph) in ({2, 3}, {-1, -2})
        ):
            # One that the graph does not compute, the image itself, cannot be renamed.
            return node.input[0] if node.input[0] in made_by else None
        if node.op_type not in _RESHAPING:
            return None
        name = node.input[0]
    return None


def _axes_of(node: onnx.NodeProto, graph: onnx.GraphProto) -> set[int]:
    for attribute in node.attribute:  # until opset 17
        if attribute.name == "axes":
            return set(attribute.ints)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    return set() if axes is None else set(onnx.numpy_helper.to_array(axes).ravel().tolist())


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check a model and write it without what tells of the machine: paths, traces, docs.

    Raises:
        ExportError: the model breaks ONNX's rules.
        VisiontunerError: the disk is full.
    """
    _strip(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker, shape inference and protobuf have a class each
        raise ExportError(f"The ONNX model is not valid: {_one_line(error)}.") from None
    try:
        path.write_bytes(model.SerializeToString(deterministic=True))
    except OSError as error:
        raise VisiontunerError(f"Cannot write {path} ({error.strerror}). Make room.") from None


def _key(backbone: Backbone) -> str:
    text = json.dumps(
        [
            _SCHEMA_VERSION,
            backbone.name,
            backbone.weights_digest,
            backbone.preprocessing.size,
            torch.__version__,
            onnx.__version__,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _exported(backbone: Backbone, path: Path) -> onnx.ModelProto:
    _export(backbone, path)
    return _load_onnx(path, backbone)


def _export(backbone: Backbone, path: Path) -> None:
    size = backbone.preprocessing.size
    # Two images: torch.export takes a dimension of 1 for a constant.
    example = torch.zeros(2, 3, size, size)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with _quiet(), torch.inference_mode(False):
            torch.onnx.export(
                easily_traced(backbone.module, noise),
                (example,),
                str(path),
                dynamo=True,
                external_data=False,
                input_names=["image"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # the exporter's own classes are private and many
        if disk_problem(error) is not None:  # not the network's fault, which torch would run then
            raise DiskError(f"Cannot write {path} ({disk_problem(error)}). Make room.") from None
        raise ExportError(
            f"Backbone {backbone.name!r} cannot be written as ONNX: {_one_line(error)}. "
            "Choose another: `visiontuner backbones`."
        ) from None


def _load_onnx(path: Path, backbone: Backbone) -> onnx.ModelProto:
    model = onnx.load(path)
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    if not first.dim_param:
        raise ExportError(
            f"Backbone {backbone.name!r} exports for a fixed number of images only. "
            "Choose another: `visiontuner backbones`."
        )
    return model


def _strip(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    model.doc_string = ""
    for graph in _graphs(model.graph):
        del graph.metadata_props[:]
        graph.doc_string = ""
        for part in (*graph.node, *graph.value_info, *graph.input, *graph.output):
            del part.metadata_props[:]
            part.doc_string = ""
        for tensor in graph.initializer:
            del tensor.metadata_props[:]
            tensor.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:]
        function.doc_string = ""
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs by the page."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """The first line that says something, without a trace or a path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.replace(os.sep + os.sep, os.sep)[:160].rstrip(".")


# Runs a backbone in eval mode: torch on a GPU, ONNX Runtime on a CPU, torch where that fails.


# Largest difference between ONNX Runtime and torch, as a share of the largest feature.
RELATIVE_TOLERANCE = 1e-4

# Each holds what the layers of a call hand on: 100 MB for a large network.
_MOST_LANES = 16


def make_engine(
    backbone: Backbone, *, precision: Precision, cache: Path, threads: int | None = None
) -> Engine:
    """The fastest engine that answers as torch does on this machine.

    ONNX Runtime is chosen on a CPU in fp32 after it has been compared with torch once; where the
    network does not export or answers differently, torch runs it and `description` says so.

    Args:
        cache: where the exported network is kept.
        threads: CPU threads; default: the cores that this process may use.
    """
    threads = threads or available_cpus()
    if torch.cuda.is_available():
        return TorchEngine(backbone, precision=precision, device="cuda", threads=threads)
    if precision == "bf16":
        return TorchEngine(backbone, precision=precision, device="cpu", threads=threads)
    try:
        path = export_backbone(backbone, cache=cache)
        engine = OnnxEngine(path, threads=threads)
        _check_against_torch(engine, backbone, path)
    except ExportError as error:
        reason = str(error).split(". Choose another")[0]
        return TorchEngine(
            backbone, precision=precision, device="cpu", threads=threads, because=reason
        )
    return engine


class OnnxEngine:
    """An exported backbone in ONNX Runtime on the CPU, in fp32."""

    # A core with images of its own waits for no other, and what a layer hands on stays in its
    # cache: on 2 cores, 2 images for each, 250 images/s where both cores with 4 images give
    # 225 and with 8 220 (EfficientNet-Lite0); 360, 300 and 305 (MobileNetV3); 46, 45 and 45
    # (ResNet-50).
    batch_size = 2

    def __init__(self, path: Path, *, threads: int) -> None:
        self.description = f"ONNX Runtime fp32 on {threads} CPU thread{'s' * (threads > 1)}"
        self.lanes = min(threads, _MOST_LANES)
        self._session = _open_session(path, threads // self.lanes)

    def features(self, images: Images) -> Features:
        (features,) = self._session.run(["features"], {"image": images})
        return np.asarray(features, dtype=np.float32)


class TorchEngine:
    """A backbone in torch, channels last; bf16 by autocast."""

    lanes = 1

    def __init__(
        self,
        backbone: Backbone,
        *,
        precision: Precision,
        device: Literal["cpu", "cuda"],
        threads: int,
        because: str = "",
    ) -> None:
        place = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
        self.description = f"torch {precision} on {place}" + (f" ({because})" if because else "")
        self._device = torch.device(device)
        self.batch_size = 64 if device == "cuda" else 16
        self._bf16 = precision == "bf16"
        self._threads = threads
        # A copy: the backbone itself stays on the CPU, where it is exported and compared.
        module = copy.deepcopy(backbone.module) if device == "cuda" else backbone.module
        self._module = module.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: Images) -> Features:
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        batch = torch.from_numpy(images).to(
            self._device, memory_format=torch.channels_last, non_blocking=True
        )
        with (
            torch.inference_mode(),
            full_float32(),
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16),
        ):
            features: torch.Tensor = self._module(batch)  # (B, D)
        return features.float().cpu().numpy()


def _open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    try:
        return open_on_cpu(path, threads)
    except Exception as error:  # onnxruntime's classes share no base
        raise ExportError(
            f"ONNX Runtime does not open the exported network ({type(error).__name__})"
        ) from None


def _check_against_torch(engine: OnnxEngine, backbone: Backbone, path: Path) -> None:
    """Compare once per exported file; the result is kept beside it."""
    note = path.with_suffix(f".checked-{onnxruntime.__version__}.json")
    try:
        difference = float(json.loads(note.read_text())["relative_difference"])
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged
        difference = _difference(engine, backbone)
        write_cached_json(note, {"relative_difference": difference})
    if not difference <= RELATIVE_TOLERANCE:  # NaN too
        raise ExportError(
            f"ONNX Runtime differs from torch by {difference:.1e}, more than {RELATIVE_TOLERANCE:g}"
        )


def _difference(engine: OnnxEngine, backbone: Backbone) -> float:
    size = backbone.preprocessing.size
    # Three images, not the two of the export: a batch size that was frozen shows.
    images = np.random.default_rng(0).standard_normal((3, 3, size, size), dtype=np.float32)
    with torch.inference_mode():
        expected = backbone.module(torch.from_numpy(images)).numpy()
    got = engine.features(images)
    return float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-12))
