import math

import numpy as np
import pytest
import torch
from torch import nn

from visiontuner.errors import TrialFailed
from visiontuner.experiment.schema import Training
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import evaluate, fit, linear_head
from visiontuner.training.optimisation import make_optimizer, make_schedule

FEATURES, CLASSES = 6, 3
# How long an epoch took is the only thing that may differ.
CLOCK = ("epoch_seconds", "images_per_second")


def clusters(samples: int = 90, *, seed: int = 0, batch_size: int = 16) -> FeatureBatches:
    """Three clouds that a linear head can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    centres = 4 * torch.eye(CLASSES, FEATURES)
    features = centres[labels] + torch.randn(samples, FEATURES, generator=generator)
    return FeatureBatches(features, labels, batch_size=batch_size)


def run(settings: Training, *, seed: int = 7, train=None, head=None, **options):
    train = train or clusters(batch_size=settings.batch_size)
    head = head or linear_head(FEATURES, CLASSES, dropout=settings.dropout, seed=seed)
    validation = clusters(30, seed=1)
    return list(fit(head, train, validation, settings, num_classes=CLASSES, seed=seed, **options))


def numbers(results) -> list[dict[str, float]]:
    rows = [result.metrics.to_dict() for result in results]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_same_seed_same_numbers(optimizer):
    settings = Training(epochs=3, batch_size=16, optimizer=optimizer, dropout=0.5)
    assert numbers(run(settings)) == numbers(run(settings))
    assert numbers(run(settings)) != numbers(run(settings, seed=8))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_loss_falls_on_separable_data(optimizer):
    results = run(Training(epochs=15, batch_size=16, optimizer=optimizer, learning_rate=0.05))
    assert results[-1].metrics.train_loss < 0.3 * results[0].metrics.train_loss
    assert results[-1].metrics.validation_accuracy > 0.95
    assert [result.epoch for result in results] == list(range(1, 16))


def test_the_first_step_by_hand():
    """One batch, plain SGD, no decay: weights move by -lr times the softmax's gradient."""
    features = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    head = linear_head(2, 2, dropout=0.0, seed=0)
    with torch.no_grad():
        head[1].weight.zero_()
        head[1].bias.zero_()
    batches = FeatureBatches(torch.from_numpy(features), torch.tensor([0, 1]), batch_size=2)
    settings = Training(
        epochs=1,
        batch_size=2,
        optimizer="sgd",
        momentum=0,
        weight_decay=0,
        learning_rate=0.1,
        schedule="constant",
    )
    (result,) = fit(head, batches, batches, settings, num_classes=2, seed=0)
    # With zero weights every probability is 1/2: dL/dlogits = (p - one_hot) / 2 samples.
    d_logits = (np.full((2, 2), 0.5) - np.eye(2)) / 2
    d_weight, d_bias = d_logits.T @ features, d_logits.sum(axis=0)
    assert head[1].weight.detach().numpy() == pytest.approx(-0.1 * d_weight, abs=1e-7)
    assert head[1].bias.detach().numpy() == pytest.approx(-0.1 * d_bias, abs=1e-7)
    assert result.metrics.train_loss == pytest.approx(math.log(2))
    norm = math.sqrt(float((d_weight**2).sum() + (d_bias**2).sum()))
    assert result.metrics.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_weight_decay_spares_biases_and_norms(optimizer):
    """Without gradients only the decay moves a parameter: by learning rate x decay (AdamW)."""
    network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    settings = Training(
        optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, schedule="constant"
    )
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(network, settings).step()
    weight, *vectors = (p.detach() for p in network.parameters())
    assert all(torch.equal(now, then) for now, then in zip(vectors, before[1:], strict=True))
    assert not torch.equal(weight, before[0])
    if optimizer == "adamw":
        assert weight.numpy() == pytest.approx(0.95 * before[0].numpy())


def test_the_groups_of_a_network_keep_their_learning_rates():
    head, body = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        {"params": list(head.parameters()), "lr": 0.1, "name": "head"},
        {"params": [body.bias], "lr": 0.01, "weight_decay": 0.0, "name": "body, no decay"},
    ]
    optimizer = make_optimizer(nn.ModuleList([head, body]), Training(weight_decay=0.5), groups)
    made = [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert made == [
        ("head", 0.1, 0.5),
        ("head, no decay", 0.1, 0.0),
        ("body, no decay", 0.01, 0.0),
    ]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [
        id(head.weight),
        id(head.bias),
        id(body.bias),
    ]


def schedule_of(settings: Training, total_steps: int) -> list[float]:
    optimizer = make_optimizer(nn.Linear(1, 1), settings)
    schedule = make_schedule(optimizer, settings, total_steps=total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_by_hand():
    rates = schedule_of(Training(learning_rate=1.0, schedule="cosine"), 4)
    # (1 + cos(pi * step / 4)) / 2
    assert rates == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_warm_up_by_hand():
    settings = Training(learning_rate=1.0, schedule="constant", warmup_fraction=0.3)
    # 3 of 10 steps climb: 1/4, 2/4, 3/4.
    assert schedule_of(settings, 10) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_warm_up_then_cosine_starts_at_the_full_rate():
    settings = Training(learning_rate=0.4, schedule="cosine", warmup_fraction=0.5)
    # 2 of 4 steps climb: 1/3, 2/3; the cosine over the other two: 1, 1/2.
    assert schedule_of(settings, 4) == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.2])


def test_reported_learning_rate_is_the_optimizers_at_the_epochs_first_step():
    # 90 samples / 30 = 3 steps an epoch, 6 in all: the second epoch starts half way.
    results = run(Training(epochs=2, batch_size=30, learning_rate=0.2, schedule="cosine"))
    assert [r.metrics.learning_rate for r in results] == pytest.approx([0.2, 0.1])


def test_weights_shrink_by_weight_decay():
    """On zero features the weight has no gradient: AdamW leaves (1 - lr * decay) of it a step."""
    head = linear_head(FEATURES, CLASSES, dropout=0.0, seed=0)
    before = head[1].weight.detach().clone()
    batches = FeatureBatches(torch.zeros(8, FEATURES), torch.arange(8) % CLASSES, batch_size=4)
    settings = Training(
        epochs=1, batch_size=4, learning_rate=0.1, weight_decay=0.5, schedule="constant"
    )
    list(fit(head, batches, batches, settings, num_classes=CLASSES, seed=0))
    assert torch.allclose(head[1].weight, before * 0.95**2)


def test_without_a_falling_learning_rate_the_epoch_with_the_lowest_loss_is_kept():
    settings = Training(epochs=10, batch_size=16, schedule="constant", learning_rate=1.0)
    results = run(settings)
    losses = [r.metrics.validation_loss for r in results]
    expected = [all(v < earlier for earlier in losses[:i]) for i, v in enumerate(losses)]
    assert False in expected
    assert [r.is_kept for r in results] == expected


def test_where_the_learning_rate_falls_to_zero_the_last_epoch_is_kept():
    results = run(Training(epochs=10, batch_size=16, learning_rate=1.0))
    assert all(r.is_kept for r in results)
    assert [r.is_last for r in results] == [False] * 9 + [True]


def test_early_stop_ends_after_so_many_epochs_without_a_better_one():
    # Nothing is learnt at this rate, so only the first epoch is better than what was before.
    settings = Training(epochs=50, batch_size=16, learning_rate=1e-12, early_stop=3)
    results = run(settings)
    assert [r.is_kept for r in results] == [True, False, False, False]


def test_label_smoothing_raises_the_training_loss_and_leaves_the_validation_loss_plain():
    smooth, plain = (
        run(Training(epochs=1, batch_size=90, label_smoothing=s, learning_rate=1e-12))[0].metrics
        for s in (0.3, 0.0)
    )
    assert smooth.validation_loss == pytest.approx(plain.validation_loss)
    train, head = clusters(), linear_head(FEATURES, CLASSES, dropout=0.0, seed=7)
    log_p = torch.log_softmax(head(train.features), dim=1).detach()
    # 0.7 on the label and 0.3 spread over all three classes.
    target = 0.7 * torch.eye(CLASSES)[train.labels] + 0.1
    assert smooth.train_loss == pytest.approx(float(-(target * log_p).sum(dim=1).mean()), rel=1e-5)


def test_class_weights_give_a_rare_class_its_say():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(200) >= 190).long()  # 190 against 10
    features = torch.randn(200, FEATURES, generator=generator) + labels[:, None]
    train = FeatureBatches(features, labels, batch_size=50)
    recall = {}
    for weights in ("none", "balanced"):
        settings = Training(epochs=20, batch_size=50, learning_rate=0.02, class_weights=weights)
        head = linear_head(FEATURES, 2, dropout=0.0, seed=0)
        *_, last = fit(head, train, train, settings, num_classes=2, seed=0)
        recall[weights] = float((last.validation_logits[190:].argmax(dim=1) == 1).float().mean())
    assert recall["balanced"] > recall["none"]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_with_epoch_and_learning_rate(poison):
    train = clusters()
    train.features[5, 0] = poison
    with pytest.raises(TrialFailed, match=r"training loss is nan in epoch 1 .* rate 0\.003; try"):
        run(Training(epochs=2, batch_size=16), train=train)


def test_divergence_is_told_after_the_good_epochs():
    """Epochs before the bad one are yielded; the message names the bad one's rate."""
    settings = Training(
        epochs=400, batch_size=16, optimizer="sgd", learning_rate=1e36, schedule="constant"
    )
    with pytest.raises(TrialFailed, match=r"epoch \d+ at learning rate 1e\+36"):
        run(settings)


def test_step_losses_are_numbered_through_all_epochs():
    # 90 / 16 -> 6 steps an epoch: 2, 4, 6 and 8, 10, 12.
    results = run(Training(epochs=2, batch_size=16, log_every_steps=2))
    assert [s.step for r in results for s in r.step_losses] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(s.loss) for r in results for s in r.step_losses)
    assert run(Training(epochs=1, batch_size=16))[0].step_losses == ()


def test_validation_logits_are_those_of_the_yielded_epoch():
    head = linear_head(FEATURES, CLASSES, dropout=0.5, seed=7)
    validation = clusters(30, seed=1)
    for result in fit(
        head, clusters(), validation, Training(epochs=2, batch_size=16), num_classes=CLASSES, seed=7
    ):
        logits, scores = evaluate(head, validation)
        assert torch.equal(result.validation_logits, logits)
        assert result.metrics.validation_loss == scores.loss
        assert logits.shape == (30, CLASSES)


def test_every_sample_is_seen_once_an_epoch_in_another_order():
    batches = FeatureBatches(torch.arange(10.0)[:, None], torch.arange(10), batch_size=4)
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        seen = [(x, y) for x, y in batches.shuffled(generator)]
        assert [len(y) for _, y in seen] == [4, 4, 2]
        assert all(torch.equal(x[:, 0].long(), y) for x, y in seen)
        orders.append(torch.cat([y for _, y in seen]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]


def test_a_head_depends_on_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    first = linear_head(4, 2, dropout=0.0, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(first[1].weight, linear_head(4, 2, dropout=0.0, seed=1)[1].weight)
