"""A backbone as one ONNX file without a trace of the machine that wrote it, cached by content."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from visiontuner.data.arrays import commit_folder, find_damage
from visiontuner.data.files import disk_problem, locked, temporary_folder
from visiontuner.errors import DiskError, ExportError, VisiontunerError
from visiontuner.model.backbone import Backbone
from visiontuner.model.traceable import easily_traced

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
    # Two pictures: torch.export takes a dimension of 1 for a constant.
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
            f"Backbone {backbone.name!r} exports for a fixed number of pictures only. "
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
