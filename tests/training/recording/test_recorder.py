"""The recorder: its file, what a resumed training makes of it, and what goes wrong."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visiontuner.diagnostics.history import Recording
from visiontuner.diagnostics.recorder import Recorder
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.callbacks import TrainingCallback, TrainingCallbacks
from visiontuner.training.loop import Fit

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, EPOCHS = 3, 4


def image_batches(samples: int = 24) -> FeatureBatches:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    images = torch.randn(samples, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return FeatureBatches(images, labels, batch_size=8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )


def training_of(net: nn.Module, callback: TrainingCallback | None) -> Fit:
    settings = Training(epochs=EPOCHS, batch_size=8, learning_rate=0.05)
    return Fit(
        net,
        image_batches(),
        image_batches(6),
        settings,
        num_classes=CLASSES,
        seed=3,
        callback=callback,
    )


def recorder_of(folder: Path, net: nn.Module, *, every_steps: int = 1) -> Recorder:
    return Recorder(folder, net, every_steps=every_steps, began=time.perf_counter())


def train(folder: Path, *, epochs: int = EPOCHS, state=None, every_steps: int = 1):
    """So many epochs, from a state on if there is one; the state after them and the numbers."""
    net = network()
    recorder = recorder_of(folder, net, every_steps=every_steps)
    training = training_of(net, recorder)
    if state is not None:
        training.load_state_dict(state)
    losses = []
    for _, result in zip(range(epochs), training.epochs(), strict=False):
        losses.append(result.metrics.train_loss)
    recorder.close()
    return training.state_dict(), losses


def test_a_training_leaves_one_file_with_all_three_records(tmp_path):
    train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recording.npz"]
    recording = Recording.load(tmp_path / "recording.npz")
    assert recording.tensors.steps.tolist() == list(range(1, 13))  # 24 / 8 in each of 4 epochs
    assert recording.steps.steps.tolist() == list(range(1, 13))
    assert len(recording.system.times) >= 2
    assert recording.about["steps_per_epoch"] == 3
    assert recording.about["every_steps"] == 1
    assert recording.about["evaluation_seconds"] > 0


def test_a_resumed_training_goes_on_with_its_file(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(whole)
    state, _ = train(parts, epochs=2)
    train(parts, state=state)
    one, two = (Recording.load(folder / "recording.npz") for folder in (whole, parts))
    assert two.tensors.steps.tolist() == one.tensors.steps.tolist()
    assert two.tensors.layers == one.tensors.layers
    for name, values in one.tensors.values.items():
        np.testing.assert_array_equal(two.tensors.of(name), values, err_msg=name)
    np.testing.assert_array_equal(two.tensors.inputs, one.tensors.inputs)
    assert two.steps.steps.tolist() == one.steps.steps.tolist()
    assert (np.diff(two.system.times) > 0).all()


def test_what_was_recorded_after_the_checkpoint_is_dropped(tmp_path):
    state, _ = train(tmp_path, epochs=1)
    state = {**state, "network": {k: v.clone() for k, v in state["network"].items()}}
    kept = training_of(network(), None)
    kept.load_state_dict(state)
    # The process that is killed came further than its last checkpoint.
    train(tmp_path, epochs=3, state=kept.state_dict())
    net = network()
    recorder = recorder_of(tmp_path, net)
    recorder.epoch_begins(2, 3)
    recording = recorder.recording()
    recorder.close()
    assert recording.tensors.steps.tolist() == [1, 2, 3]
    assert recording.steps.steps.tolist() == [1, 2, 3]


def test_a_resumed_training_may_be_recorded_more_often(tmp_path):
    state, _ = train(tmp_path, epochs=2, every_steps=6)
    train(tmp_path, state=state, every_steps=2)
    recording = Recording.load(tmp_path / "recording.npz")
    assert recording.tensors.steps.tolist() == [1, 6, 8, 10, 12]


def test_a_training_that_begins_anew_begins_a_new_file(tmp_path):
    train(tmp_path)
    train(tmp_path, epochs=1)
    recording = Recording.load(tmp_path / "recording.npz")
    assert recording.tensors.steps.tolist() == [1, 2, 3]


def test_a_damaged_file_costs_only_what_was_in_it(tmp_path):
    state, _ = train(tmp_path, epochs=2)
    (tmp_path / "recording.npz").write_bytes(b"torn")
    train(tmp_path, state=state)
    recording = Recording.load(tmp_path / "recording.npz")
    assert recording.tensors.steps.tolist() == [7, 8, 9, 10, 11, 12]


def test_a_disk_that_takes_nothing_does_not_end_a_training(tmp_path):
    (tmp_path / "recording.npz.part").mkdir()  # in the way of every writing
    _, losses = train(tmp_path)
    assert len(losses) == EPOCHS
    assert not (tmp_path / "recording.npz").exists()


def test_a_recorder_that_fails_ends_itself_and_not_the_training(tmp_path):
    class Broken(Recorder):
        """What no step's recording foresees: its own clock fails in the third step."""

        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            self.left = 3
            begin = self._steps.step_begins

            def fail(step: int, count: int) -> None:
                if step == 3:
                    raise ZeroDivisionError("clock")
                begin(step, count)

            self._steps.step_begins = fail

    net = network()
    broken = Broken(tmp_path, net, every_steps=1, began=time.perf_counter())
    losses = [result.metrics.train_loss for result in training_of(net, broken).epochs()]
    broken.close()
    plain = [result.metrics.train_loss for result in training_of(network(), None).epochs()]
    assert losses == plain
    recording = Recording.load(tmp_path / "recording.npz")
    assert recording.tensors.steps.tolist() == [1, 2]
    assert recording.about["problem"] == "recording ended, ZeroDivisionError: clock"
    assert not any(module._forward_hooks for module in net.modules())


def test_what_is_written_in_between_is_not_written_every_time(tmp_path):
    net = network()
    recorder = recorder_of(tmp_path, net)
    training = training_of(net, recorder)
    next(training.epochs())
    file = tmp_path / "recording.npz"
    recorder.save()
    file.unlink()  # the first time it is there whatever follows
    recorder.save()
    assert not file.exists()
    recorder.save(now=True)
    assert file.exists()
    recorder.close()


def test_a_head_on_features_can_be_recorded(tmp_path):
    features = FeatureBatches(torch.randn(24, 5), torch.arange(24) % CLASSES, batch_size=8)
    head = nn.Sequential(nn.Dropout(0.0), nn.Linear(5, CLASSES))
    recorder = recorder_of(tmp_path, head)
    settings = Training(epochs=1, batch_size=8)
    training = Fit(
        head, features, features, settings, num_classes=CLASSES, seed=3, callback=recorder
    )
    list(training.epochs())
    recorder.close()
    record = Recording.load(tmp_path / "recording.npz").tensors
    assert record.layers == ("1",)
    assert record.input_mean.shape == (3, 1)
    assert record.inputs.size == 0


def test_several_can_watch():
    class Counting(TrainingCallback):
        def __init__(self) -> None:
            self.told: list[str] = []

        def epoch_begins(self, epoch: int, steps_per_epoch: int) -> None:
            self.told.append(f"epoch {epoch}")

        def spent_on(self, part) -> None:
            self.told.append(part)

        def step_begins(self, step: int, inputs: Tensor) -> None:
            self.told.append(f"step {step}")

        def passes_begin(self) -> None:
            self.told.append("passes")

        def gradients_ready(self) -> None:
            self.told.append("gradients")

        def weights_moved(self) -> None:
            self.told.append("moved")

        def step_ends(self) -> None:
            self.told.append("end")

        def epoch_ends(self) -> None:
            self.told.append("evaluated")

    first, second = Counting(), Counting()
    next(training_of(network(), TrainingCallbacks([first, second])).epochs())
    assert first.told == second.told
    step = ["data", "step 1", "passes", "forward", "backward", "gradients", "optimizer", "moved"]
    assert first.told[:11] == ["epoch 1", *step, "reporting", "end"]
    assert first.told[-1] == "evaluated"
