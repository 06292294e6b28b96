"""A network's weights on disk, as a classifier's `weights.safetensors` has them.

Tensors are called `backbone.*`, `head.weight` (num_classes, D) and `head.bias` (num_classes,); the
file says of which backbone they are, how much of it was trained, and for which classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visiontuner.data.arrays import content_checksum
from visiontuner.errors import BackboneError, ClassifierError, VisiontunerError
from visiontuner.model.network import Network, Train

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
        raise _unreadable(path, error) from None
    if _CHECKSUM in about and about[_CHECKSUM] != _checksum_of(tensors):
        raise ClassifierError(
            f"The weights {path} are damaged: they are not what was written. Delete that file; "
            "`visiontuner evaluate` on its search trains the trial again."
        )
    return tensors, about


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
