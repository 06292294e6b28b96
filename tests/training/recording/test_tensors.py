"""What is recorded of a network, by hand and on networks that are not simple."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visiontuner.diagnostics import tensors as statistics
from visiontuner.diagnostics.history import TENSOR_STATISTICS, TensorRecord
from visiontuner.diagnostics.tensors import TensorRecorder, find_layers
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.callbacks import TrainingCallback
from visiontuner.training.loop import Fit

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def image_batches(samples: int = 48, *, batch_size: int = 16) -> FeatureBatches:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    images = torch.randn(samples, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return FeatureBatches(images, labels, batch_size=batch_size)


class Recording(TrainingCallback):
    """Only the tensors, as `Recorder` passes them on."""

    def __init__(self, network: nn.Module, **options) -> None:
        self.tensors = TensorRecorder(network, **{"every": 1, **options})
        self.step_begins = self.tensors.step_begins
        self.passes_begin = self.tensors.passes_begin
        self.gradients_ready = self.tensors.gradients_ready
        self.weights_moved = self.tensors.weights_moved
        self.step_ends = self.tensors.step_ends

    def spent_on(self, part) -> None:
        if part == "backward":
            self.tensors.piece_has_passed()


def train(
    network: nn.Module,
    *,
    callback: TrainingCallback | None = None,
    **settings,
) -> list[float]:
    """The losses of every step, and the weights at the end in one number."""
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, **settings}
    losses: list[float] = []
    groups = [{"params": [p for p in network.parameters() if p.requires_grad]}]
    training = Fit(
        network,
        image_batches(),
        image_batches(12),
        Training(**settings),
        num_classes=CLASSES,
        seed=3,
        parameter_groups=groups,
        callback=callback,
        on_step=lambda done: losses.append(float(done.loss)),
    )
    for result in training.epochs():
        losses += [result.metrics.validation_loss, result.metrics.gradient_norm]
    return [*losses, *(float(p.detach().sum()) for p in network.parameters())]


def recorded(network: nn.Module, **options) -> TensorRecord:
    recorder = {k: options.pop(k) for k in ("every", "most_steps") if k in options}
    callback = Recording(network, **recorder)
    train(network, callback=callback, **options)
    return callback.tensors.record()


def column(record: TensorRecord, statistic: str, layer: str) -> np.ndarray:
    return record.of(statistic)[:, record.layers.index(layer)]


# By hand


def test_every_number_of_one_step_by_hand():
    """One linear layer and a ReLU, one step of plain SGD at rate 0.5."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    weight = torch.tensor([[1.0, 0.0], [-1.0, -2.0]])
    with torch.no_grad():
        network[0].weight.copy_(weight)
    inputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    recorder = TensorRecorder(network, every=1)
    recorder.step_begins(1, inputs)
    recorder.passes_begin()
    out = network(inputs)  # linear: [[1, -5], [3, -3]]; ReLU: [[1, 0], [3, 0]]
    out.sum().backward()  # only the first unit learns: its gradient is the inputs' sum, [4, 2]
    recorder.gradients_ready()
    with torch.no_grad():
        network[0].weight -= 0.5 * network[0].weight.grad
    recorder.weights_moved()
    recorder.step_ends()
    record = recorder.record()
    assert record.layers == ("0", "1")
    assert record.kinds == ("Linear", "ReLU")
    assert set(record.values) == set(TENSOR_STATISTICS)
    linear = {name: record.of(name)[0, 0] for name in TENSOR_STATISTICS}
    relu = {name: record.of(name)[0, 1] for name in TENSOR_STATISTICS}
    assert linear == pytest.approx(
        {
            "weight_norm": math.sqrt(6),
            "weight_std": np.std([1, 0, -1, -2]),
            "weight_absmax": 2,
            "weight_zeros": 0.25,
            "weight_unchanged": 0.5,
            "gradient_norm": math.sqrt(20),
            "gradient_mean": 1.5,
            "gradient_absmax": 4,
            "gradient_zeros": 0.5,
            "gradient_nonfinite": 0,
            "update_norm": 0.5 * math.sqrt(20),
            "update_mean": 0.75,
            "update_absmax": 2,
            "update_ratio": 0.5 * math.sqrt(20) / math.sqrt(6),
            "activation_mean": -1,
            "activation_std": np.std([1, -5, 3, -3]),
            "activation_min": -5,
            "activation_max": 3,
            "activation_zeros": 0,
            "activation_saturated": math.nan,
            "activation_dead": math.nan,
            "activation_nonfinite": 0,
        },
        nan_ok=True,
    )
    assert relu["activation_zeros"] == 0.5
    assert relu["activation_dead"] == 0.5  # the second unit, for both samples
    assert math.isnan(relu["weight_norm"])
    assert math.isnan(relu["gradient_norm"])
    assert record.input_mean[0] == pytest.approx([1.5])
    assert (record.input_min[0], record.input_max[0]) == (0, 3)
    assert record.notes == ()


def network_of_kinds() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, CLASSES),
    )


def test_layers_are_those_with_weights_and_activations_in_the_order_they_ran():
    record = recorded(network_of_kinds())
    assert record.layers == ("0", "1", "2", "3", "4", "8")
    assert record.kinds == ("Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "Sigmoid", "Linear")
    assert record.steps.tolist() == [1, 2, 3, 4, 5, 6]  # 48 / 16 in each of two epochs


def test_an_in_place_activation_leaves_the_numbers_of_the_layer_before_it():
    record = recorded(network_of_kinds())
    assert (column(record, "activation_min", "1") < 0).all()
    assert (column(record, "activation_min", "2") == 0).all()


def test_what_enters_the_network_is_kept():
    record = recorded(network_of_kinds())
    first = next(image_batches().shuffled(torch.Generator().manual_seed(3)))[0]
    assert record.inputs.shape == (8, 3, 8, 8)
    assert record.inputs == pytest.approx(first[:8].numpy(), abs=0.01)
    assert record.input_mean.shape == (6, 3)
    assert record.input_mean[0] == pytest.approx(first.mean(dim=(0, 2, 3)).numpy(), abs=1e-5)
    assert record.input_std[0] == pytest.approx(
        first.std(dim=(0, 2, 3), correction=0).numpy(), abs=1e-5
    )
    assert record.input_max[0] == first.max()


@pytest.mark.parametrize(
    ("function", "flat"),
    [
        (nn.Sigmoid(), [-9.0, 9.0]),
        (nn.Tanh(), [-4.0, 4.0]),
        (nn.ReLU6(), [7.0, 8.0]),
        (nn.Hardsigmoid(), [-4.0, 4.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_saturated_is_the_share_in_the_flat_parts(function, flat):
    values = torch.tensor([[*flat, 0.5, 0.5]])
    recorder = TensorRecorder(nn.Sequential(function), every=1)
    recorder.step_begins(1, values)
    function(values)
    recorder.step_ends()
    assert recorder.record().of("activation_saturated")[0, 0] == 0.5


def test_means_and_shares_of_a_large_map_are_right_within_a_hundredth():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 64, 96, 96, generator=generator) + 2 * torch.rand(64, 1, 1)
    network = nn.Sequential(nn.ReLU())
    for layout in (torch.channels_last, torch.contiguous_format):
        recorder = TensorRecorder(network, every=1)
        given = maps.to(memory_format=layout)
        recorder.step_begins(1, given)
        out = network(given)
        recorder.step_ends()
        record = recorder.record()
        assert record.of("activation_mean")[0, 0] == pytest.approx(float(out.mean()), rel=0.01)
        assert record.of("activation_std")[0, 0] == pytest.approx(float(out.std()), rel=0.01)
        zeros = float((out == 0).float().mean())
        assert record.of("activation_zeros")[0, 0] == pytest.approx(zeros, abs=0.01)
        assert record.of("activation_max")[0, 0] == out.max()


def test_one_infinity_among_millions_is_found():
    maps = torch.zeros(4, 64, 96, 96)
    maps[3, 5, 7, 11] = math.inf
    network = nn.Sequential(nn.ReLU())
    recorder = TensorRecorder(network, every=1)
    recorder.step_begins(1, maps)
    network(maps)
    recorder.step_ends()
    share = recorder.record().of("activation_nonfinite")[0, 0]
    assert share == pytest.approx(1 / maps.numel())


def test_the_norm_of_an_update_is_the_whole_weights():
    """Of 2^18 values every fourth is looked at, and all move by 0.1."""
    before = torch.zeros(2**18)
    sample = statistics.evenly(before)
    moved = statistics.update_statistics(sample, statistics.evenly(before + 0.1), before.numel())
    named = dict(zip(statistics.CHANGE, moved.tolist(), strict=True))
    assert len(sample) == 2**16
    assert named["update_norm"] == pytest.approx(0.1 * 2**9, rel=1e-4)
    assert named["update_mean"] == pytest.approx(0.1, rel=1e-4)
    assert named["update_absmax"] == pytest.approx(0.1, rel=1e-4)


# A training that is watched is the training


class Twice(nn.Module):
    """One convolution for two maps, one layer called twice, one never, and a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.tied = nn.Conv2d(6, 6, 3, padding=1)
        self.tied.weight = self.again.weight
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.first(images))
        x = self.act(self.again(x)) + self.again(x)
        x = self.tied(x).mul_(self.scale)
        return self.head(x.mean(dim=(2, 3)))


class Frozen(nn.Module):
    """An encoder that is not trained, and attention with its own fast path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, CLASSES)
        for part in (self.patches, self.encoder):
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.encoder.train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens).mean(dim=1))


class Strange(nn.Module):
    """Layers whose outputs are a dictionary, nothing, sparse, and numbers without a fraction."""

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x)}

    class Silent(nn.Linear):
        def forward(self, x: Tensor) -> None:  # type: ignore[override]
            return None

    class Sparse(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to_sparse()

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) > 0).long()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pair = Strange.Pair(192, 8)
        self.silent = Strange.Silent(8, 8)
        self.sparse = Strange.Sparse(8, 8)
        self.counting = Strange.Counting(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pair(images.flatten(1))["out"]
        self.silent(x)
        x = x + self.sparse(x).to_dense() + self.counting(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (network_of_kinds, {}),
        (network_of_kinds, {"micro_batch_size": 5}),
        (network_of_kinds, {"ema_decay": 0.9, "gradient_clip": 0.1, "optimizer": "sgd"}),
        (network_of_kinds, {"precision": "bf16"}),
        (Twice, {}),
        (Frozen, {}),
        (Strange, {}),
    ],
    ids=["plain", "micro-batches", "average", "bf16", "shared", "frozen", "strange"],
)
def test_a_watched_training_gives_the_same_numbers_bit_for_bit(
    make: Callable[[], nn.Module], settings: dict[str, object]
):
    network = make()
    callback = Recording(network)
    assert train(network, callback=callback, **settings) == train(make(), **settings)
    record = callback.tensors.record()
    assert record.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert not any(module._forward_hooks for module in network.modules())


def test_a_layer_that_is_called_twice_counts_both_calls():
    record = recorded(Twice())
    # `act` sees the maps of `first` and those of `again`.
    assert record.layers.count("act") == 1
    both = column(record, "activation_max", "act")
    assert (both >= column(record, "activation_max", "first")).all()


def test_shared_and_unused_layers_are_named():
    record = recorded(Twice())
    assert record.notes == (
        "tied (Conv2d): shares its weight with again, recorded there",
        "never ran: unused",
    )
    assert np.isnan(column(record, "gradient_norm", "tied")).all()
    assert np.isfinite(column(record, "activation_mean", "tied")).all()
    assert np.isfinite(column(record, "weight_norm", "unused")).all()
    assert np.isnan(column(record, "gradient_norm", "unused")).all()
    assert record.layers[-1] == "unused"  # as they first ran, then what never did
    assert "" not in record.layers  # the network's own factor is no layer's weight


class Mixing(nn.Module):
    """A layer whose matrix is called otherwise, and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8))
        self.kernel = nn.Parameter(torch.eye(4))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))


def test_a_weight_is_a_matrix_whatever_its_name_and_a_factor_is_none():
    mixing = Mixing()
    layers, _ = find_layers(nn.Sequential(mixing, Scaled()))
    assert [(layer.kind, layer.weight is mixing.kernel) for layer in layers] == [("Mixing", True)]


def test_frozen_layers_have_no_gradients_and_do_not_count_as_unchanged():
    record = recorded(Frozen())
    for name in ("gradient_norm", "weight_unchanged", "update_ratio"):
        assert np.isnan(column(record, name, "patches")).all()
        assert np.isfinite(column(record, name, "head")).all()
    assert np.isfinite(column(record, "activation_mean", "patches")).all()


def test_a_layer_whose_output_cannot_be_recorded_is_named_and_the_others_are_recorded():
    record = recorded(Strange())
    told = " | ".join(record.notes)
    assert "silent (Silent): its output is not recorded, TypeError: NoneType" in told
    assert "sparse (Sparse): its output is not recorded" in told
    assert np.isfinite(column(record, "activation_mean", "pair")).all()
    assert np.isfinite(column(record, "gradient_norm", "sparse")).all()
    assert np.isfinite(column(record, "activation_mean", "head")).all()


def test_micro_batches_record_the_whole_batch():
    whole, parts = (
        recorded(network_without_norm(), **size) for size in ({}, {"micro_batch_size": 5})
    )
    for name in TENSOR_STATISTICS:
        np.testing.assert_allclose(
            parts.of(name), whole.of(name), rtol=2e-3, atol=1e-6, err_msg=name
        )


def network_without_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


class OutOfMemoryOnce(nn.Module):
    """What a GPU says once, in the middle of the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = network_without_norm()
        self.told = False

    def forward(self, images: Tensor) -> Tensor:
        answer = self.inside(images)
        if not self.told:
            self.told = True
            raise torch.OutOfMemoryError("out of memory")
        return answer


def test_a_step_that_is_repeated_in_pieces_is_recorded_once():
    once, plain = (
        recorded(OutOfMemoryOnce()),
        recorded(OutOfMemoryOnce().inside, micro_batch_size=8),
    )
    for name in ("activation_mean", "activation_std", "gradient_norm", "activation_dead"):
        np.testing.assert_allclose(once.of(name), plain.of(name), rtol=1e-4, err_msg=name)


# How much


def test_steps_between_are_not_recorded_and_leave_no_hook():
    network = network_of_kinds()
    hooks: list[int] = []
    network.register_forward_pre_hook(
        lambda module, _args: (
            hooks.append(len(module[0]._forward_hooks)) if module.training else None
        )
    )
    record = recorded(network, every=3, epochs=3)
    assert record.steps.tolist() == [1, 3, 6, 9]
    assert hooks == [1, 0, 1, 0, 0, 1, 0, 0, 1]


def test_a_full_record_keeps_every_second_and_goes_on_half_as_often():
    record = recorded(network_of_kinds(), every=2, most_steps=5, epochs=10)
    assert record.steps.tolist() == [1, 8, 16, 24]  # 30 steps; 2, then 4, then 8
    assert len(record.of("weight_norm")) == 4
