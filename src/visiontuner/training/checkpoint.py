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

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from visiontuner.data.arrays import content_checksum
from visiontuner.errors import CheckpointError, TrialFailed
from visiontuner.experiment.schema import Training

# What a training's state must agree with before it goes on, and how it is put back.


_CHECKPOINT_ADVICE = "; go on with what it was made with, or begin anew without it."
# These leave a training's numbers as they are, or answer to this machine.
_CHANGEABLE_SETTINGS = {
    "workers",
    "micro_batch_size",
    "log_every_steps",
    "record_every_steps",
    "refit",
}


def identity_of(settings: Training, *, seed: int, num_classes: int) -> dict[str, Any]:
    """What determines a training besides its network and its images."""
    kept = settings.model_dump(mode="json", exclude=_CHANGEABLE_SETTINGS)
    return {"num_classes": num_classes, "seed": seed} | {
        f"training.{name}": value for name, value in kept.items()
    }


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Two descriptions, name by name.

    Raises:
        CheckpointError: they differ; the message has the first name and both values.
    """
    for name in [*current, *(name for name in saved if name not in current)]:
        before, now = saved.get(name), current.get(name)
        if before != now:
            raise CheckpointError(
                f"The checkpoint was made with {name} {_short(before)}, this training has "
                f"{_short(now)}{_CHECKPOINT_ADVICE}"
            )


def require_fitting(saved: Mapping[str, Tensor], network: nn.Module) -> None:
    """The weights of a checkpoint against those of a network, by name and shape.

    Raises:
        CheckpointError: they are of another network.
    """
    current = network.state_dict()
    missing = [name for name in current if name not in saved]
    unknown = [name for name in saved if name not in current]
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}"
        raise CheckpointError(
            f"The checkpoint is of another network: it {which}{_CHECKPOINT_ADVICE}"
        )
    for name, tensor in current.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"The checkpoint is of another network: {name} is {_sizes(saved[name])} there and "
                f"{_sizes(tensor)} here{_CHECKPOINT_ADVICE}"
            )


def regrouped(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, network: nn.Module
) -> dict[str, Any]:
    """A training's state with today's parameter groups.

    Biases and weights of norms once were in one group with what decays. Such a training goes on as
    it began: the groups that its group has become keep its weight decay.
    """
    schedule = state["schedule"]
    position = {id(parameter): i for i, parameter in enumerate(network.parameters())}
    left, groups, became = list(optimizer.param_groups), [], []
    for group in state["optimizer"]["param_groups"]:
        parts = [left.pop(0)] if left else []
        if parts and left and len(parts[0]["params"]) < len(group["params"]):
            parts.append(left.pop(0))
        parameters = [p for part in parts for p in part["params"]]
        if len(parts) > 1:
            parameters.sort(key=lambda p: position[id(p)])
        if len(parameters) != len(group["params"]):
            return dict(state)  # of other parts of the network
        numbers = {id(p): n for p, n in zip(parameters, group["params"], strict=True)}
        groups += [{**group, "params": [numbers[id(p)] for p in part["params"]]} for part in parts]
        became.append(len(parts))
    listed = {name: values for name, values in schedule.items() if isinstance(values, list)}
    repeated = {name: np.repeat(values, became).tolist() for name, values in listed.items()}
    return {
        **state,
        "optimizer": {**state["optimizer"], "param_groups": groups},
        "schedule": {**schedule, **repeated},
    }


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer's state back, laid out in memory as its parameters are.

    torch keeps the layout of what it is given, and its fused optimizers read the moments of
    channels-last weights in the weights' own order.

    Raises:
        CheckpointError: the parameter groups are others.
    """
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"The checkpoint is of a training of other parts of the network "
            f"({error}){_CHECKPOINT_ADVICE}"
        ) from None
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The global generators that a training on `device` draws from (dropout, mixing)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sizes(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


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
