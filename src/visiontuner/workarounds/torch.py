"""Private names and settings of torch (2.14) and of the libraries on it, each with its gain."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# torchvision and timm without torch's compiler.
#
# Both import all of `torch._dynamo`, two seconds of every command that needs a backbone, for
# things that nobody here compiles: torchvision for a function of detection networks that says
# whether it could be compiled, timm to mark functions that a compiler should leave alone.


_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def import_torchvision() -> ModuleType:
    """The same as `import torchvision`; the compiler is imported when it is used."""
    return _import("torchvision")


def import_timm() -> ModuleType:
    """The same as `import timm`, but for marks that only a compiler reads."""
    import_torchvision()  # timm imports it too
    return _import("timm")


def _import(name: str) -> ModuleType:
    if name in sys.modules or _COMPILER[0] in sys.modules:
        return importlib.import_module(name)
    try:
        with _compiler_waits():
            return importlib.import_module(name)
    except (ImportError, AttributeError):  # another version needs more of the compiler
        for part in [part for part in sys.modules if part.partition(".")[0] == name]:
            del sys.modules[part]
        return importlib.import_module(name)


@contextmanager
def _compiler_waits() -> Iterator[None]:
    package, utils = (ModuleType(name) for name in _COMPILER)
    package.__path__ = []
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    disable = torch.compiler.disable
    sys.modules.update(zip(_COMPILER, (package, utils), strict=True))
    torch.compiler.disable = _leave_as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name in _COMPILER:
            del sys.modules[name]


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


def _leave_as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """`torch.compiler.disable` for code that is never compiled, as decorator with or without ()."""
    return function if function is not None else _leave_as_it_is


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions keep all 24 bits of float32, as on a CPU; nothing changes elsewhere.

    TF32 keeps 11 bits: answers would differ in the third digit from those of the packaged
    classifier, which runs on a CPU.
    """
    convolutions = torch.backends.cudnn
    before = convolutions.allow_tf32
    convolutions.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32 = before


def tensor_norms(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors)) if tensors else []
