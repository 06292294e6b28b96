"""State dicts of pretrained networks: downloaded, read without pickles, fitted, identified."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import requests
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontuner import interrupts
from visiontuner.data.arrays import commit_folder, find_damage, has_checksums
from visiontuner.errors import BackboneError, WeightsAway
from visiontuner.io.files import file_digest, locked, temporary_folder
from visiontuner.text import without_secrets

StateDict = OrderedDict[str, Tensor]

OFFLINE_ADVICE = (
    "Use `backbone: efficientnet_lite0` (or lite1, lite2), whose weights are installed, or "
    "`weights: PATH` of a state dict."
)
# What wrappers put before every key: DataParallel, torch.compile, and our own artifact.
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")
_NESTED_IN = ("state_dict", "model", "model_state_dict")
_CONNECT_SECONDS, _READ_SECONDS = 5, 30


def read_weights(source: str, *, cache: Path) -> StateDict:
    """A state dict from a path, an https:// URL or an s3://BUCKET/KEY.

    Args:
        source: a `.pth`, `.pt` or `.safetensors` file, here, on a web server or on S3. Checkpoints
            that hold a `state_dict` or `model` are unwrapped.
        cache: where a download is kept.

    Raises:
        BackboneError: it cannot be found, downloaded or read, or holds more than tensors.
        DataError: S3 does not have or give it.
        ServingError: S3 cannot be reached.
    """
    if source.startswith("s3://"):
        return read_state_dict(_from_s3(source, cache))
    if source.startswith("https://"):
        return read_state_dict(download_weights(source, cache=cache))
    if "://" in source:
        raise BackboneError(
            f"Cannot read weights from {source!r}: it must be default, none, a path, "
            "s3://BUCKET/KEY or an https:// URL. Download the file and give its path."
        )
    path = Path(source).expanduser()
    if not path.is_file():
        raise BackboneError(
            f"There is no weights file {source!r}: it must be default, none, the path of a state "
            "dict (.pth, .pt, .safetensors) or an https:// URL."
        )
    return read_state_dict(path)


def _from_s3(uri: str, cache: Path) -> Path:
    """The file, which comes again only when it changed on S3."""
    from visiontuner.io.s3 import download_file

    folder = cache / "weights" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    with locked(folder):
        return download_file(uri, folder, memory=folder / ".memory.json")


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a `.safetensors`, `.pth` or `.pt` file by name; no code in it is run.

    Raises:
        BackboneError: the file is damaged, or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return OrderedDict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # weights_only raises pickle's own class, which we do not import
        raise _unreadable(path, error) from None
    return _tensors_in(content, path)


def download_weights(url: str, *, cache: Path, sha256_prefix: str = "", token: str = "") -> Path:
    """Download a file once; a broken download leaves nothing behind.

    A copy that is not what came, by its checksum, is downloaded again. One of an earlier version,
    without a checksum, gets one: a machine may be offline by now.

    Args:
        sha256_prefix: the first hex digits that the content's SHA-256 must have.
        token: sent as a bearer token, where the host asks for one.

    Raises:
        WeightsAway: no connection, another status than 200, or another content than promised.
    """
    folder = cache / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]
    target = folder / (url.split("?")[0].rsplit("/", 1)[-1] or "weights")
    if target.is_file():
        if has_checksums(folder):
            if find_damage(folder) is None:
                return target
        elif file_digest(target).startswith(sha256_prefix):
            commit_folder(folder, {}, [target.name])
            return target
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(folder) as place:
            temporary = place / target.name
            with temporary.open("wb") as file:
                digest = _download(url, file.write, token)
            if not digest.startswith(sha256_prefix):
                raise WeightsAway(
                    f"{without_secrets(url)} arrived with SHA-256 {digest[:12]}…, expected "
                    f"{sha256_prefix}…. Try again, or download it another way and use "
                    "`weights: PATH`."
                )
            temporary.replace(target)
        commit_folder(folder, {}, [target.name])
    except (requests.RequestException, OSError) as error:
        raise WeightsAway(
            f"Cannot download the weights {without_secrets(url)} ({_reason(error)}). "
            f"{OFFLINE_ADVICE}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty one goes
    return target


def fit_state_dict(
    state: Mapping[str, Tensor], module: nn.Module, *, head: Sequence[str], name: str
) -> StateDict:
    """The part of a state dict that a network without its head takes with `strict=True`.

    Wrappers' prefixes are cut off and whatever lies under the head is dropped.

    Args:
        head: the top-level modules that hold the removed head, `("fc",)`.
        name: the backbone's, for the message.

    Raises:
        BackboneError: keys or shapes differ outside of the head; the first of them are named.
    """
    expected = module.state_dict()
    state = _without_prefix(state, expected)
    fitted = OrderedDict((key, value) for key, value in state.items() if key in expected)
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):  # old files lack it, and eval mode ignores it
            fitted.setdefault(key, value)
    extra = [k for k in state if k not in expected and k.split(".")[0] not in head]
    problems = (
        [f"missing {key}" for key in expected if key not in fitted]
        + [f"unknown {key}" for key in extra]
        + [
            f"{key} is {_shape(fitted[key])}, expected {_shape(value)}"
            for key, value in expected.items()
            if key in fitted and fitted[key].shape != value.shape
        ]
    )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BackboneError(
            f"These weights do not fit {name!r}: {'; '.join(problems[:3])}{more}. "
            "Name the backbone they were trained with."
        )
    # Some modules (mnasnet) read the version that the file was written with.
    fitted._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    return fitted


def digest_weights(module: nn.Module) -> str:
    """SHA-256 (hex) over the names, types, shapes and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue  # a counter of the training; it changes no answer
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _download(url: str, write: Callable[[bytes], object], token: str) -> str:
    """Stream a URL into `write`; the content's SHA-256."""
    digest = hashlib.sha256()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = (_CONNECT_SECONDS, _READ_SECONDS)
    with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
        response.raise_for_status()
        for block in response.iter_content(1 << 20):
            interrupts.check()
            digest.update(block)
            write(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(getattr(error, "strerror", None) or type(error).__name__)


def _unreadable(path: Path, error: Exception) -> BackboneError:
    return BackboneError(
        f"Cannot read the weights {path} ({type(error).__name__}): it must be a .safetensors file "
        "or a torch file that holds tensors only. Save `model.state_dict()` and name that file."
    )


def _tensors_in(content: object, path: Path) -> StateDict:
    for key in _NESTED_IN:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise _unreadable(path, TypeError())
    tensors = OrderedDict((str(k), v) for k, v in content.items() if isinstance(v, Tensor))
    if not tensors:
        raise _unreadable(path, TypeError())
    tensors._metadata = getattr(content, "_metadata", {})  # type: ignore[attr-defined]
    return tensors


def _without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> StateDict:
    metadata = getattr(state, "_metadata", {})
    for prefix in _PREFIXES:
        inside = OrderedDict(
            (k[len(prefix) :], v) for k, v in state.items() if k.startswith(prefix)
        )
        if any(key in expected for key in inside) and not any(key in expected for key in state):
            state = inside
            metadata = {k.removeprefix(prefix): v for k, v in metadata.items()}
    result: StateDict = OrderedDict(state)
    result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a single number"
