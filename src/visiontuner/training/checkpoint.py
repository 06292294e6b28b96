"""A training's state on disk: one file, whole or not there, and no pickle.

`checkpoint.safetensors` holds the tensors; the numbers, the text and what belongs where are JSON in
its header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from visiontuner.data.arrays import content_checksum
from visiontuner.errors import CheckpointError, TrialFailed
from visiontuner.training.state import require_same

CHECKPOINT_FILE = "checkpoint.safetensors"
_VERSION = "1"


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], *, made_for: Mapping[str, Any] | None = None
) -> Path:
    """Write a state and replace the one that was there; a kill at any time leaves one of the two.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, text and None, as
            `Fit.state_dict` gives.
        made_for: what `load_checkpoint` has to be asked for, values as in JSON:
            `{"backbone": "resnet18", "class_names": [...]}`.

    Raises:
        TrialFailed: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(dict(state), "", tensors)
    header = {
        "visiontuner_checkpoint": _VERSION,
        "state": json.dumps(structure),
        "made_for": json.dumps(dict(made_for or {})),
        "checksum": _checksum_of(tensors),
    }
    path = folder / CHECKPOINT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, save(tensors, header))
    except OSError as error:
        raise TrialFailed(
            f"Cannot write the checkpoint {path}: {error.strerror}; make room or "
            "choose another folder, and go on from the checkpoint before it."
        ) from None
    return path


def load_checkpoint(folder: Path, *, made_for: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state as it was saved, its tensors on the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or it was made for something else than
            `made_for`; the message names the first difference.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint ({CHECKPOINT_FILE}).")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # A copy: what is opened is a view of the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        version = header.get("visiontuner_checkpoint")
        if version == _VERSION:
            saved_for, structure = json.loads(header["made_for"]), json.loads(header["state"])
            state: dict[str, Any] = _decode(structure, tensors)
            if header.get("checksum", "") not in ("", _checksum_of(tensors)):
                raise ValueError("it is not what was written")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({' '.join(str(error).split())}); delete it to "
            "begin anew."
        ) from None
    if version != _VERSION:
        raise CheckpointError(
            f"{path} is no checkpoint that this version reads (it says {version!r}, not "
            f"{_VERSION!r}); delete it to begin anew."
        )
    if made_for is not None:
        require_same(saved_for, json.loads(json.dumps(dict(made_for))))
    return state


def _replace(path: Path, content: bytes) -> None:
    # Not safetensors' save_file: killed, it leaves a file under another name each time.
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; tensors go to `tensors` under the name of their place."""
    if isinstance(value, Tensor):
        tensors[name] = _dense(value)
        return {"tensor": name}
    if isinstance(value, Mapping):
        # As pairs: the keys of an optimizer's state are numbers, and JSON has text for keys only.
        return {
            "pairs": [[key, _encode(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "pairs":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _checksum_of(tensors: Mapping[str, Tensor]) -> str:
    return content_checksum(
        (name, tensor.reshape(-1).view(torch.uint8).numpy())
        for name, tensor in sorted(tensors.items())
    )


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and of its own: safetensors takes no two tensors of one storage."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
