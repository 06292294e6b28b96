import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from visiontuner.errors import CheckpointError, TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from visiontuner.training.loop import Fit, linear_head

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3
CLOCK = ("epoch_seconds", "images_per_second")
MADE_FOR = {"backbone": "resnet18", "class_names": ["daisy", "rose", "tulip"]}


def batches(samples: int, *, seed: int, features: bool) -> FeatureBatches:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    shape = (samples, 6) if features else (samples, 3, 8, 8)
    inputs = torch.randn(shape, generator=generator) + labels.reshape(-1, *[1] * (len(shape) - 1))
    return FeatureBatches(inputs, labels, batch_size=8)


def small_network(classes: int = CLASSES, *, width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(width, classes),
    )


def start(settings: Training, *, features: bool = False, network=None) -> Fit:
    if network is None:
        network = linear_head(6, CLASSES, dropout=0.3, seed=0) if features else small_network()
    return Fit(
        network,
        batches(33, seed=0, features=features),
        batches(12, seed=1, features=features),
        settings,
        num_classes=CLASSES,
        seed=3,
    )


def numbers(result) -> dict[str, object]:
    metrics = {k: v for k, v in result.metrics.to_dict().items() if k not in CLOCK}
    logits = result.validation_logits.tolist()
    return metrics | {"epoch": result.epoch, "is_kept": result.is_kept, "logits": logits}


# A state and its file


def test_a_state_comes_back_as_it_was(tmp_path):
    channels_last = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    state = {
        "tensors": {"a": channels_last, "b": torch.tensor(7), "bytes": torch.arange(3).byte()},
        "views": [shared[:3], shared[3:], shared],
        "optimizer": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "betas": (0.9, 0.999),
        "nested": [None, True, [1, 2.5, "ü"], ()],
        "limits": (math.inf, -math.inf, 0.1 + 0.2),
        "none": None,
    }
    save_checkpoint(tmp_path / "new" / "folder", state)
    back = load_checkpoint(tmp_path / "new" / "folder")
    assert list(back) == list(state)
    assert torch.equal(back["tensors"]["a"], channels_last)
    assert back["tensors"]["b"].shape == ()
    assert back["tensors"]["bytes"].dtype == torch.uint8
    assert [v.tolist() for v in back["views"]] == [[0, 1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert back["optimizer"] == {0: {"step": torch.tensor(3.0)}, 1: {}}
    for name in ("betas", "nested", "limits", "none"):
        assert back[name] == state[name]
        assert type(back[name]) is type(state[name])
    back["tensors"]["bytes"][0] = 9  # its own memory, not the file's
    assert load_checkpoint(tmp_path / "new" / "folder")["tensors"]["bytes"][0] == 0


def test_a_state_of_anything_else_is_refused(tmp_path):
    with pytest.raises(TypeError, match="/head is a Linear"):
        save_checkpoint(tmp_path, {"head": nn.Linear(1, 1)})
    assert not list(tmp_path.iterdir())


def test_a_new_checkpoint_replaces_the_old_one_in_one_move(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1})
    with (tmp_path / CHECKPOINT_FILE).open("rb") as old:
        save_checkpoint(tmp_path, {"epoch": 2})
        assert len(old.read()) > 0  # the old file was not written over
    assert load_checkpoint(tmp_path)["epoch"] == 2
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_what_a_killed_write_leaves_is_ignored(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1})
    whole = (tmp_path / CHECKPOINT_FILE).read_bytes()
    (tmp_path / CHECKPOINT_FILE).with_suffix(".part").write_bytes(whole[: len(whole) // 2])
    assert load_checkpoint(tmp_path)["epoch"] == 1
    save_checkpoint(tmp_path, {"epoch": 2})
    assert load_checkpoint(tmp_path)["epoch"] == 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_one_clear_line(tmp_path, share):
    save_checkpoint(tmp_path, {"weights": torch.randn(50), "epoch": 3})
    file = tmp_path / CHECKPOINT_FILE
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged .*delete it"):
        load_checkpoint(tmp_path)


def test_values_that_are_not_what_was_written_are_one_clear_line(tmp_path):
    save_checkpoint(tmp_path, {"weights": torch.randn(50), "epoch": 3})
    file = tmp_path / CHECKPOINT_FILE
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    with pytest.raises(CheckpointError, match=r"damaged \(it is not what was written\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"format": "pt"},
        {"visiontuner_checkpoint": "99", "state": "{}", "made_for": "{}"},
        {"visiontuner_checkpoint": "1", "state": "[1, 2", "made_for": "{}"},
        {"visiontuner_checkpoint": "1", "state": '{"tensor": "gone"}', "made_for": "{}"},
        {"visiontuner_checkpoint": "1", "made_for": "{}"},
    ],
)
def test_a_file_of_something_else_is_one_clear_line(tmp_path, header):
    save_file({"weight": torch.zeros(2)}, tmp_path / CHECKPOINT_FILE, header)
    with pytest.raises(CheckpointError, match="delete it to begin anew") as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint"):
        load_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_written_fails_the_trial(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrialFailed, match="Cannot write the checkpoint") as raised:
        save_checkpoint(tmp_path / "file" / "below", {"epoch": 1})
    assert "\n" not in str(raised.value)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1})
    # Every write to it fails with "No space left on device".
    (tmp_path / CHECKPOINT_FILE).with_suffix(".part").symlink_to("/dev/full")
    with pytest.raises(TrialFailed, match="make room or choose another folder"):
        save_checkpoint(tmp_path, {"epoch": 2, "weights": torch.zeros(100_000)})
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


# What it was made for


def test_the_same_description_is_accepted(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1}, made_for=MADE_FOR)
    assert load_checkpoint(tmp_path, made_for=dict(MADE_FOR))["epoch"] == 1
    as_tuples = MADE_FOR | {"class_names": tuple(MADE_FOR["class_names"])}
    assert load_checkpoint(tmp_path, made_for=as_tuples)["epoch"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet50"}, "made with backbone resnet18, this training has resnet50"),
        ({"class_names": ["rose", "daisy", "tulip"]}, r"class_names \['daisy', .* has \['rose'"),
        ({"class_names": ["daisy"]}, r"class_names .* has \['daisy'\]"),
        ({"image_size": 96}, "image_size none, this training has 96"),
    ],
)
def test_another_architecture_or_class_list_is_one_clear_line(tmp_path, change, message):
    save_checkpoint(tmp_path, {"epoch": 1}, made_for=MADE_FOR)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(tmp_path, made_for=MADE_FOR | change)
    assert "\n" not in str(raised.value)


def test_a_long_class_list_is_not_printed_whole(tmp_path):
    save_checkpoint(tmp_path, {}, made_for={"class_names": [f"breed {i}" for i in range(133)]})
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, made_for={"class_names": ["one"]})
    assert len(str(raised.value)) < 300


# A training that goes on


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_training_that_goes_on_gives_the_same_numbers(tmp_path, features, optimizer, ema_decay):
    settings = Training(
        epochs=4,
        batch_size=8,
        optimizer=optimizer,
        learning_rate=0.02,
        warmup_fraction=0.2,
        gradient_clip=0.8,
        ema_decay=ema_decay,
        log_every_steps=2,
    )
    whole = list(start(settings, features=features).epochs())
    for expected in whole:
        training = start(settings, features=features)
        if expected.epoch > 1:
            training.load_state_dict(load_checkpoint(tmp_path))
        torch.rand(5)  # a new process has drawn other numbers
        result = next(training.epochs())
        assert numbers(result) == numbers(expected)
        assert result.step_losses == expected.step_losses
        save_checkpoint(tmp_path, training.state_dict())
    last = start(settings, features=features)
    last.load_state_dict(load_checkpoint(tmp_path))
    assert last.finished
    assert list(last.epochs()) == []


def test_a_training_whose_biases_decayed_goes_on_as_it_began(tmp_path, monkeypatch):
    """All parameters were in one group."""
    settings = Training(epochs=4, batch_size=8, learning_rate=0.02, weight_decay=0.5)

    def in_one_group(network, settings, _groups):
        rate, decay = settings.learning_rate, settings.weight_decay
        return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay, fused=True)

    with monkeypatch.context() as patch:
        patch.setattr("visiontuner.training.loop.make_optimizer", in_one_group)
        before = start(settings)
        epochs = before.epochs()
        next(epochs)
        save_checkpoint(tmp_path, before.state_dict())
        expected = [numbers(result)["logits"] for result in epochs]
    training = start(settings)
    training.load_state_dict(load_checkpoint(tmp_path))
    assert len(training.state_dict()["optimizer"]["param_groups"]) == 2
    assert [numbers(result)["logits"] for result in training.epochs()] == expected
    assert expected != [numbers(result)["logits"] for result in start(settings).epochs()][1:]


def test_a_state_of_before_the_first_epoch_begins_at_the_beginning(tmp_path):
    settings = Training(epochs=1, batch_size=8)
    save_checkpoint(tmp_path, start(settings).state_dict())
    training = start(settings)
    training.load_state_dict(load_checkpoint(tmp_path))
    assert numbers(next(training.epochs())) == numbers(next(start(settings).epochs()))


def test_moments_are_laid_out_as_their_weights(tmp_path):
    """Fused optimizers read them in the weights' order; torch keeps that of what it loads."""
    settings = Training(epochs=2, batch_size=8)
    first = start(settings)
    next(first.epochs())
    save_checkpoint(tmp_path, first.state_dict())
    second = start(settings)
    second.load_state_dict(load_checkpoint(tmp_path))
    moments = second.state_dict()["optimizer"]["state"]
    # The optimizer has matrices first: biases and norms are a group of their own.
    weights = sorted(second.network.parameters(), key=lambda parameter: parameter.ndim == 1)
    assert weights[0].stride() == (27, 1, 9, 3)  # channels last
    for number, weight in enumerate(weights):
        assert moments[number]["exp_avg"].stride() == weight.stride()


def test_the_early_stop_remembers(tmp_path):
    # Nothing is learnt at this rate: only the first epoch is better than what was before.
    settings = Training(epochs=50, batch_size=8, learning_rate=1e-12, early_stop=3)
    training, epochs = start(settings, features=True), 0
    while not training.finished:
        result = next(training.epochs())
        epochs += 1
        assert result.is_kept == (epochs == 1)
        save_checkpoint(tmp_path, training.state_dict())
        training = start(settings, features=True)
        training.load_state_dict(load_checkpoint(tmp_path))
    assert epochs == 4


def test_the_micro_batch_that_fitted_is_remembered(tmp_path):
    class Memory(nn.Identity):
        def forward(self, inputs):
            if self.training and len(inputs) > 4:
                torch.empty(1 << 50, dtype=torch.uint8)
            return inputs

    settings = Training(epochs=2, batch_size=8)
    first = start(settings, network=nn.Sequential(Memory(), small_network()))
    assert next(first.epochs()).notes == (
        "out of memory in training at 8 images, going on with 4 at a time",
    )
    save_checkpoint(tmp_path, first.state_dict())
    second = start(settings, network=nn.Sequential(Memory(), small_network()))
    second.load_state_dict(load_checkpoint(tmp_path))
    assert next(second.epochs()).notes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 9}, r"training\.epochs 3, this training has 9"),
        ({"optimizer": "sgd"}, r"training\.optimizer adamw, this training has sgd"),
        ({"ema_decay": 0.9}, r"training\.ema_decay none, this training has 0\.9"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    save_checkpoint(tmp_path, start(Training(epochs=3, batch_size=8)).state_dict())
    training = start(Training(**{"epochs": 3, "batch_size": 8, **change}))
    with pytest.raises(CheckpointError, match=message):
        training.load_state_dict(load_checkpoint(tmp_path))


def test_what_leaves_the_numbers_alone_may_change(tmp_path):
    whole = start(Training(epochs=3, batch_size=8))
    epochs = whole.epochs()
    next(epochs)
    save_checkpoint(tmp_path, whole.state_dict())
    training = start(Training(epochs=3, batch_size=8, workers=2, log_every_steps=1))
    training.load_state_dict(load_checkpoint(tmp_path))
    assert [numbers(r) for r in training.epochs()] == [numbers(r) for r in epochs]


@pytest.mark.parametrize(
    ("network", "classes", "message"),
    [
        (small_network(width=7), 3, r"another network: 0\.weight is 6 x 3 x 3 x 3 there and 7 x"),
        (small_network(5), 5, "made with num_classes 3, this training has 5"),
        (nn.Sequential(small_network()), 3, r"another network: it lacks 0\.0\.weight"),
        (small_network()[:4], 3, r"another network: it holds 6\.weight"),
    ],
)
def test_another_network_is_refused_and_left_as_it_was(tmp_path, network, classes, message):
    settings = Training(epochs=3, batch_size=8)
    save_checkpoint(tmp_path, start(settings).state_dict())
    data = batches(33, seed=0, features=False)
    training = Fit(network, data, data, settings, num_classes=classes, seed=3)
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(CheckpointError, match=message):
        training.load_state_dict(load_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_other_trained_parts_are_refused(tmp_path):
    settings = Training(epochs=3, batch_size=8)
    save_checkpoint(tmp_path, start(settings).state_dict())
    network = small_network()
    network[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match="other parts of the network"):
        start(settings, network=network).load_state_dict(load_checkpoint(tmp_path))


def test_a_checkpoint_can_be_moved_with_its_folder(tmp_path):
    save_checkpoint(tmp_path / "a", {"epoch": 4})
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b")["epoch"] == 4
