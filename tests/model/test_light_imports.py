"""torchvision and timm as they are, without torch's compiler until somebody asks for it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys, torch
{first}
from visiontuner.workarounds.torch import import_timm, import_torchvision
torchvision, timm = import_torchvision(), import_timm()
print("torch._dynamo" in sys.modules)
assert sys.modules["torchvision"] is torchvision and sys.modules["timm"] is timm
network = timm.create_model("resnet10t", pretrained=False, num_classes=3).eval()
assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)
import torch._dynamo
from torchvision.ops.roi_align import is_compile_supported
from torch._dynamo.utils import is_compile_supported as original
assert is_compile_supported("cpu") == original("cpu")
assert torch.compiler.disable(len).__name__ and torch.compiler.disable is not None
assert torch.compiler.disable.__module__ == "torch.compiler"
"""


def run(first: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(first=first)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_compiler_waits_until_it_is_asked_for() -> None:
    assert run("") == "False"


def test_a_compiler_that_is_there_already_stays() -> None:
    assert run("import torch._dynamo") == "True"
