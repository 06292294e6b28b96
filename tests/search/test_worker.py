"""What every trial does in its worker, and the seconds of imports that it leaves out."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from visiontuner.diagnostics.history import Recording
from visiontuner.experiment.schema import Experiment
from visiontuner.search.plan import TrialTask
from visiontuner.search.trial import after_epoch, recorded, to_report
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import Fit

_TRIAL = """
import sys
import torch
from visiontuner.experiment.schema import Training
from visiontuner.search.trial import prepare_worker
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import fit, linear_head

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


def test_what_was_not_recorded_is_one_finding(tmp_path):
    network = nn.Sequential(nn.Linear(8, 3))
    network.add_module("idle", nn.Identity())
    network[1].unused = nn.Linear(4, 4)
    experiment = Experiment.parse({"name": "x", "training": {"record_every_steps": 1}})
    task = TrialTask(experiment=experiment, search_folder=tmp_path, threads=1)
    samples = FeatureBatches(torch.randn(9, 8), torch.arange(9) % 3, batch_size=3)
    settings = experiment.training.model_copy(update={"epochs": 1})
    with recorded(task, tmp_path, network, began=time.perf_counter()) as recorder:
        training = Fit(
            network, samples, samples, settings, num_classes=3, seed=1, callback=recorder
        )
        (result,) = training.epochs()
        (finding,) = after_epoch(result, recorder, task).findings
    assert (finding.rule, finding.severity, finding.step) == ("recording_incomplete", "info", 1)
    assert finding.evidence == "not recorded: never ran: idle.unused"
    assert to_report(result)["findings"] == []


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"search": {"scheduler": "none"}}, [1, 18]),
        ({"search": {"scheduler": "asha"}}, [1, 2, 6, 18]),
        (
            {"search": {"scheduler": "none"}, "rules": {"stop_on": ["unchanged_tensor"]}},
            range(1, 19),
        ),
    ],
)
def test_what_is_recorded_is_on_the_disk_before_a_trial_may_be_stopped(tmp_path, settings, written):
    training = {"epochs": 18, "batch_size": 3, "record_every_steps": 1}
    experiment = Experiment.parse({"name": "x", "training": training, **settings})
    task = TrialTask(experiment=experiment, search_folder=tmp_path, threads=1)
    network = nn.Linear(8, 3)
    samples = FeatureBatches(torch.randn(9, 8), torch.arange(9) % 3, batch_size=3)
    file = tmp_path / "recording.npz"
    seen = []
    with recorded(task, tmp_path, network, began=time.perf_counter()) as recorder:
        training = Fit(
            network, samples, samples, experiment.training, num_classes=3, seed=1, callback=recorder
        )
        for result in training.epochs():
            after_epoch(result, recorder, task)
            if file.exists():
                seen.append(result.epoch)
                assert Recording.load(file).steps.steps[-1] == 3 * result.epoch
                file.unlink()
    assert seen == list(written)
