"""The training loop on images: what it does beyond heads on features."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from visiontuner.errors import ExperimentError, TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import Fit, evaluate, fit, total_weight, training_loss
from visiontuner.training.metrics import balanced_class_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3
CLOCK = ("epoch_seconds", "images_per_second")


def image_batches(samples: int = 64, *, batch_size: int = 64, seed: int = 0) -> FeatureBatches:
    """Noise, a little brighter from class to class; any tensor's rows make batches."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) ** 2 % CLASSES  # 0 and 1 only: two of three classes, unevenly
    images = torch.randn(samples, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return FeatureBatches(images, labels, batch_size=batch_size)


class MixedBatches(FeatureBatches):
    """The same images with shares of two classes for labels."""

    def shuffled(self, generator):
        for inputs, labels in super().shuffled(generator):
            one_hot = nn.functional.one_hot(labels, CLASSES).float()
            yield inputs, 0.7 * one_hot + 0.3 * one_hot.flip(0)


def network(*, norm: bool = False, size: int = 3, dropout: float = 0.0, seed: int = 0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, size, stride=2, padding=size // 2, bias=not norm),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),  # over 1 x 1 maps
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(6, CLASSES),
    )


def options(**settings) -> Training:
    return Training(**{"epochs": 1, "batch_size": 64, "learning_rate": 0.01, **settings})


def train(net, batches, settings, *, validation=None, **more):
    validation = validation or image_batches(12, seed=1)
    return list(fit(net, batches, validation, settings, num_classes=CLASSES, seed=3, **more))


def losses(net, batches, settings) -> list[float]:
    seen = []
    run = Fit(
        net,
        batches,
        image_batches(12, seed=1),
        settings,
        num_classes=CLASSES,
        seed=3,
        on_step=lambda done: seen.append(float(done.loss)),
    )
    list(run.epochs())
    return seen


def weights_of(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# Micro-batches


@pytest.mark.parametrize("kind", [FeatureBatches, MixedBatches])
@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_a_batch_of_64_as_4_times_16_is_the_batch_of_64(kind, class_weights):
    data = image_batches(640)
    data = kind(data.features, data.labels, batch_size=64)
    whole, parts = (
        losses(
            network(),
            data,
            options(
                micro_batch_size=size,
                class_weights=class_weights,
                label_smoothing=0.1,
                gradient_clip=0.5,
                learning_rate=0.05,
            ),
        )
        for size in (None, 16)
    )
    assert len(whole) == 10
    assert whole[-1] != pytest.approx(whole[0], rel=0.01)  # something was learnt
    assert parts == pytest.approx(whole, rel=1e-5)


def test_micro_batches_leave_the_metrics_as_they_are():
    whole, parts = (
        train(network(), image_batches(100), options(epochs=2, micro_batch_size=size))[-1]
        for size in (None, 7)
    )
    assert parts.metrics.train_accuracy == whole.metrics.train_accuracy
    assert parts.metrics.gradient_norm == pytest.approx(whole.metrics.gradient_norm, rel=1e-4)
    assert parts.metrics.validation_loss == pytest.approx(whole.metrics.validation_loss, rel=1e-5)


class Memory(nn.Module):
    """Runs out of it, as torch does on this machine, with more than so many images."""

    def __init__(self, *, training: int = 1 << 30, evaluation: int = 1 << 30):
        super().__init__()
        self.limit = {True: training, False: evaluation}
        self.seen = []

    def forward(self, inputs):
        if len(inputs) > self.limit[self.training]:
            torch.empty(1 << 50, dtype=torch.uint8)
        self.seen.append((self.training, len(inputs)))
        return inputs


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step():
    net = nn.Sequential(Memory(training=20), network())
    first, second = train(net, image_batches(128), options(epochs=2))
    assert first.notes == (
        "out of memory in training at 64 images, going on with 32 at a time",
        "out of memory in training at 32 images, going on with 16 at a time",
    )
    assert second.notes == ()
    assert [n for training, n in net[0].seen if training] == [16] * 16
    reference = network()
    train(reference, image_batches(128), options(epochs=2, micro_batch_size=16))
    assert torch.equal(weights_of(net), weights_of(reference))


def test_out_of_memory_in_evaluation_halves_its_pieces():
    net = nn.Sequential(Memory(evaluation=5), network())
    (result,) = train(net, image_batches(64), options(), validation=image_batches(12, seed=1))
    assert result.notes == (
        "out of memory in evaluation at 12 images, going on with 6 at a time",
        "out of memory in evaluation at 6 images, going on with 3 at a time",
    )
    assert [n for training, n in net[0].seen if not training] == [3] * 4
    net[0].limit[False] = 100
    assert torch.allclose(evaluate(net, image_batches(12, seed=1))[0], result.validation_logits)


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_one_image_too_large_fails_the_trial(where):
    net = nn.Sequential(Memory(**{where: 0}), network())
    with pytest.raises(TrialFailed, match=f"Out of memory in {where} with one image at a time;"):
        train(net, image_batches(), options())


def test_out_of_memory_elsewhere_fails_the_trial_with_the_batch_size():
    class Loader(FeatureBatches):
        def shuffled(self, generator):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    data = image_batches()
    with pytest.raises(TrialFailed, match="Out of memory at batch size 64"):
        train(network(), Loader(data.features, data.labels, batch_size=64), options())


def test_another_error_in_the_network_is_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="Given groups=1"):
        train(nn.Sequential(nn.Conv2d(5, 2, 1)), image_batches(), options())


# Batch normalisation


def sizes_seen(net, samples: int, **settings) -> list[int]:
    sizes = []
    net.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None
    )
    train(net, image_batches(samples, batch_size=8), options(batch_size=8, **settings))
    return sizes


def test_a_last_batch_of_one_image_joins_the_one_before():
    assert sizes_seen(network(norm=True), 33) == [8, 8, 8, 9]
    assert sizes_seen(network(norm=True), 34) == [8, 8, 8, 8, 2]
    assert sizes_seen(network(norm=True), 33, micro_batch_size=4) == [4] * 6 + [3] * 3


def test_a_last_batch_of_one_image_stays_where_nothing_normalises():
    assert sizes_seen(network(), 33) == [8, 8, 8, 8, 1]


def test_frozen_batch_normalisation_takes_one_image():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            for layer in self:
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
            return self

    assert sizes_seen(Frozen(*network(norm=True)), 33) == [8, 8, 8, 8, 1]


def test_the_schedule_counts_the_steps_that_are_made():
    # 33 images by 8 with the last one joined: 4 steps, so a cosine has 1/4 of its way to go.
    rates = []
    net = network(norm=True)
    run = Fit(
        net,
        image_batches(33, batch_size=8),
        image_batches(12),
        options(batch_size=8, learning_rate=1e-3),
        num_classes=CLASSES,
        seed=0,
        on_step=lambda done: rates.append((done.step, done.steps_per_epoch)),
    )
    list(run.epochs())
    assert rates == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # Of weights, and of biases and norms.
    assert run.state_dict()["schedule"]["_last_lr"] == pytest.approx([0, 0])


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 8, "micro_batch_size": 1}])
def test_one_image_at_a_time_with_batch_normalisation_says_what_to_change(settings):
    data = image_batches(16, batch_size=settings["batch_size"])
    with pytest.raises(TrialFailed, match=r"one image at a time; use .*freeze_batch_norm"):
        train(network(norm=True), data, options(**settings))


# Averaged weights


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_averaged_weights_by_hand(decay):
    net, trail = network(norm=True), []
    run = Fit(
        net,
        image_batches(60, batch_size=10),
        image_batches(12, seed=1),
        options(batch_size=10, ema_decay=decay, learning_rate=0.05),
        num_classes=CLASSES,
        seed=0,
        on_step=lambda _done: trail.append(weights_of(net)),
    )
    (result,) = run.epochs()
    average = trail[0]
    for n, weights in enumerate(trail[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        average = kept * average + (1 - kept) * weights
    assert len(trail) == 6
    assert torch.allclose(weights_of(result.network), average, atol=1e-6)
    assert not torch.allclose(weights_of(net), average, atol=1e-3)
    for mine, averaged in zip(net.buffers(), result.network.buffers(), strict=True):
        assert torch.equal(mine, averaged)
    assert not result.network.training


def test_what_is_evaluated_is_the_average():
    net = network(norm=True)
    for result in fit(
        net,
        image_batches(60, batch_size=10),
        image_batches(12, seed=1),
        options(epochs=2, batch_size=10, ema_decay=0.9, learning_rate=0.1),
        num_classes=CLASSES,
        seed=0,
    ):
        logits, scores = evaluate(result.network, image_batches(12, seed=1))
        assert torch.equal(logits, result.validation_logits)
        assert scores.loss == result.metrics.validation_loss
        assert not torch.allclose(evaluate(net, image_batches(12, seed=1))[0], logits)


def test_without_averaging_the_result_holds_the_network_itself():
    net = network()
    (result,) = train(net, image_batches(), options())
    assert result.network is net


# Gradients, learning rates, precision


def test_clipping_by_hand():
    data = image_batches(32, batch_size=32)
    settings = {"batch_size": 32, "optimizer": "sgd", "momentum": 0, "weight_decay": 0}
    settings |= {"learning_rate": 0.1, "schedule": "constant"}
    free, clipped = network(), network()
    (plain,) = train(free, data, options(**settings))
    norm = plain.metrics.gradient_norm
    (result,) = train(clipped, data, options(**settings, gradient_clip=norm / 4))
    assert result.metrics.gradient_norm == norm  # what it was before clipping
    start = weights_of(network())
    moved, moved_clipped = weights_of(free) - start, weights_of(clipped) - start
    assert torch.allclose(moved_clipped, moved / 4, atol=1e-6)
    assert float(moved_clipped.norm()) == pytest.approx(0.1 * norm / 4, rel=1e-3)


def test_a_clip_that_is_not_reached_changes_nothing():
    free, clipped = network(), network()
    train(free, image_batches(), options(epochs=3))
    train(clipped, image_batches(), options(epochs=3, gradient_clip=1e6))
    assert torch.equal(weights_of(free), weights_of(clipped))


def test_every_parameter_group_follows_the_schedule_from_its_own_rate():
    net = network()
    rates = []
    groups = [
        {"name": "backbone", "params": list(net[0].parameters()), "lr": 0.02},
        {"name": "head", "params": list(net[7].parameters()), "lr": 0.2, "weight_decay": 0.0},
    ]
    run = Fit(
        net,
        image_batches(128),
        image_batches(12),
        options(epochs=2, learning_rate=0.2, warmup_fraction=0.25),
        num_classes=CLASSES,
        seed=0,
        parameter_groups=groups,
        on_step=lambda _done: rates.append(run.state_dict()["schedule"]["_last_lr"]),
    )
    results = list(run.epochs())
    # 4 steps, the first at half the rate, then a cosine over the other three.
    after_step = [1, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2, 0]
    # The backbone's biases and norms are a group of their own.
    assert rates == [pytest.approx([0.02 * f, 0.02 * f, 0.2 * f], abs=1e-12) for f in after_step]
    assert [r.metrics.learning_rate for r in results] == pytest.approx([0.1, 0.15])


def test_only_what_is_in_a_group_moves():
    net = network()
    before = copy.deepcopy(net)
    net[0].requires_grad_(False)
    train(net, image_batches(), options(), parameter_groups=[{"params": list(net[7].parameters())}])
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[7].weight, before[7].weight)


def test_nothing_to_train_is_said_before_the_first_epoch():
    with pytest.raises(ExperimentError, match=r"Nothing of this network is trained; set model"):
        train(network().requires_grad_(False), image_batches(), options())


def test_bf16_is_for_training_and_evaluation_stays_in_float32():
    net, seen = network(), []
    net[0].register_forward_hook(lambda _m, _i, out: seen.append((net.training, out.dtype)))
    (result,) = train(net, image_batches(), options(precision="bf16"))
    assert seen == [(True, torch.bfloat16), (False, torch.float32)]
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert result.validation_logits.dtype == torch.float32
    plain = train(network(), image_batches(), options())[0]
    assert result.metrics.train_loss == pytest.approx(plain.metrics.train_loss, rel=0.02)
    assert result.metrics.train_loss != plain.metrics.train_loss


def test_evaluation_keeps_all_bits_of_float32_where_a_gpu_would_round():
    net, seen = network(), []
    before = torch.backends.cudnn.allow_tf32
    net[0].register_forward_hook(
        lambda *_: seen.append((net.training, torch.backends.cudnn.allow_tf32))
    )
    train(net, image_batches(), options())
    assert seen == [(True, before), (False, False)]
    assert torch.backends.cudnn.allow_tf32 == before


def test_bf16_leaves_a_head_on_features_alone():
    data = FeatureBatches(torch.randn(64, 5), torch.arange(64) % CLASSES, batch_size=16)
    heads = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        heads.append(nn.Linear(5, CLASSES))
        train(heads[-1], data, options(batch_size=16, precision=precision), validation=data)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_images_go_through_the_network_channels_last():
    net, formats = network(), []
    net[0].register_forward_pre_hook(
        lambda module, inputs: formats.append(
            all(
                t.is_contiguous(memory_format=torch.channels_last)
                for t in (inputs[0], module.weight)
            )
        )
    )
    train(net, image_batches(), options())
    assert formats == [True, True]


# Labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_label_that_is_all_one_class_counts_the_same_either_way(weighted, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, CLASSES, generator=generator)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    weights = balanced_class_weights(labels, CLASSES) if weighted else None
    shares = nn.functional.one_hot(labels, CLASSES).float()
    plain = training_loss(logits, labels, weights, smoothing)
    assert float(training_loss(logits, shares, weights, smoothing)) == pytest.approx(float(plain))
    assert float(total_weight(shares, weights)) == float(total_weight(labels, weights))


def test_mixed_labels_with_class_weights_by_hand():
    # Equal logits: every class has log-probability -ln 3, whatever the weights.
    weights = torch.tensor([1.0, 2.0, 4.0])
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    assert float(total_weight(shares, weights)) == pytest.approx(1.5 + 3.5)
    loss = training_loss(torch.zeros(2, 3), shares, weights, 0.0)
    assert float(loss) == pytest.approx(math.log(3))


def test_accuracy_on_mixed_labels_is_against_the_larger_share():
    data = image_batches(64)
    mixed = MixedBatches(data.features, data.labels, batch_size=64)
    # The same rate of nothing for both: the first step's accuracy is that of the same network.
    plain, soft = (train(network(), d, options(learning_rate=1e-12))[0] for d in (data, mixed))
    assert soft.metrics.train_accuracy == plain.metrics.train_accuracy
    assert 0 < plain.metrics.train_accuracy < 1
    assert soft.metrics.train_loss != plain.metrics.train_loss


# The loop


def test_on_step_is_told_every_step():
    done = []
    run = Fit(
        network(),
        image_batches(150),
        image_batches(12),
        options(epochs=2, log_every_steps=1),
        num_classes=CLASSES,
        seed=0,
        on_step=done.append,
    )
    results = list(run.epochs())
    assert [(d.epoch, d.step, d.steps_per_epoch) for d in done] == [
        (epoch, 3 * epoch - 3 + step, 3) for epoch, step in itertools.product((1, 2), (1, 2, 3))
    ]
    steps = [step for result in results for step in result.step_losses]
    assert [(d.step, float(d.loss)) for d in done] == steps


def test_random_numbers_drawn_between_epochs_change_nothing():
    def numbers(between):
        rows = []
        for result in fit(
            network(dropout=0.5),
            image_batches(),
            image_batches(12, seed=1),
            options(epochs=3, batch_size=16),
            num_classes=CLASSES,
            seed=5,
        ):
            metrics = result.metrics.to_dict()
            rows.append({name: metrics[name] for name in metrics if name not in CLOCK})
            between()
        return rows

    assert numbers(lambda: None) == numbers(lambda: torch.rand(7))


def test_a_batch_larger_than_the_data_set_is_the_data_set():
    (result,) = train(network(norm=True), image_batches(10), options(batch_size=500))
    assert math.isfinite(result.metrics.train_loss)
