"""What a worker leaves out: seconds of imports that no trial needs."""

import subprocess
import sys

_TRIAL = """
import sys
import torch
from visiontuner.experiment import Training
from visiontuner.search.worker import prepare_worker
from visiontuner.training.fit import FeatureBatches, fit, linear_head

if sys.argv[1] == "prepared":
    prepare_worker(1)
torch.set_num_threads(1)
torch.manual_seed(3)
samples = FeatureBatches(torch.randn(90, 8), torch.randint(0, 3, (90,)), batch_size=32)
for optimizer in ("adamw", "adam", "sgd"):
    head = linear_head(8, 3, dropout=0.1, seed=1)
    settings = Training(epochs=3, optimizer=optimizer, weight_decay=0.1)
    for result in fit(head, samples, samples, settings, num_classes=3, seed=7):
        print(optimizer, result.metrics.train_loss, result.metrics.validation_loss)
print("torch._dynamo" in sys.modules, file=sys.stderr)
"""


def test_a_head_trains_without_torchs_compiler_and_gives_the_same_numbers():
    plain, prepared = (
        subprocess.run(
            [sys.executable, "-c", _TRIAL, how], capture_output=True, text=True, check=True
        )
        for how in ("plain", "prepared")
    )
    assert prepared.stderr.strip() == "False"
    assert plain.stderr.strip() == "True", "torch no longer needs this: take it out"
    assert prepared.stdout == plain.stdout
    assert len(plain.stdout.splitlines()) == 9
