"""The learning rate range test: its arithmetic, its suggestion, and the command."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from visiontuner.cli.main import main
from visiontuner.cli.search import sparkline
from visiontuner.errors import SearchInterrupted, TrialFailed
from visiontuner.experiment.schema import Experiment, Range, Training, default_space
from visiontuner.training.batches import FeatureBatches
from visiontuner.training.loop import linear_head
from visiontuner.training.lr_range import STOP_AT, geometric, range_test, smooth, suggest
from visiontuner.workflow.lr_find import find_learning_rate


def clusters(samples: int = 300, batch_size: int = 32) -> FeatureBatches:
    """Three overlapping clouds: a large learning rate makes the loss grow."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 3
    features = 2 * torch.eye(3, 6)[labels] + torch.randn(samples, 6, generator=generator)
    return FeatureBatches(features, labels, batch_size=batch_size)


def run(settings: Training, **options: Any):
    head = linear_head(6, 3, dropout=settings.dropout, seed=7)
    train = clusters(batch_size=settings.batch_size)
    return range_test(head, train, settings, num_classes=3, seed=7, **options)


def test_the_mean_is_corrected_for_its_start():
    # 0.9 * 0 + 0.1 * 2 = 0.2; divided by 1 - 0.9: 2. Then (0.18 + 0.4) / (1 - 0.81) = 3.0526.
    assert smooth([2.0, 4.0]) == pytest.approx([2.0, 3.0526315])


def test_learning_rates_grow_by_one_factor():
    assert geometric(1e-4, 1.0, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_the_suggestion_of_a_curve_by_hand():
    # Flat, then a fall from 2 to 1 over four steps, then up.
    rates = geometric(1e-5, 1e-1, 9)
    losses = [2.0, 2.0, 2.0, 1.9, 1.5, 1.1, 1.0, 3.0, 9.0]
    found = suggest(rates, losses)
    # A tenth of the fall is done at 1.9, nine tenths at 1.1; it falls most around 1.5.
    assert (found.low, found.learning_rate, found.high) == (
        pytest.approx(rates[3], rel=0.05),
        pytest.approx(rates[4], rel=0.05),
        pytest.approx(rates[5], rel=0.05),
    )


@pytest.mark.parametrize(
    "losses", [[1.0] * 30, [1.0, 1.5, 2.0] * 10, [1.0 + 0.1 * i for i in range(30)]]
)
def test_a_loss_that_never_falls_suggests_nothing(losses):
    assert suggest(geometric(1e-6, 1, 30), smooth(losses)) is None


def test_it_ends_when_the_loss_is_four_times_its_best():
    found = run(Training(optimizer="sgd", momentum=0.0, batch_size=32), high=1e4, steps=100)
    assert found.stopped
    assert len(found.losses) == len(found.learning_rates) == len(found.smoothed) < 100
    assert found.smoothed[-1] > STOP_AT * min(found.smoothed)
    assert all(
        loss <= STOP_AT * min(found.smoothed[: i + 1]) for i, loss in enumerate(found.smoothed[:-1])
    )
    assert found.suggestion.low < found.suggestion.learning_rate < found.suggestion.high


def test_training_in_the_suggested_range_learns_and_above_it_does_not():
    settings = Training(optimizer="sgd", momentum=0.0, batch_size=32)
    found = run(settings, high=1e4, steps=100).suggestion

    def loss_after_an_epoch(rate: float) -> float:
        fixed = run(settings, low=rate, high=rate * 1.0001, steps=20)
        return fixed.losses[-1]

    good = loss_after_an_epoch(found.learning_rate)
    assert good < loss_after_an_epoch(found.low / 100)
    assert good < loss_after_an_epoch(found.high * 1000)


@pytest.mark.parametrize(("batch_size", "seen"), [(1, {1}), (299, {299, 1})])
def test_batches_are_those_of_a_training(batch_size, seen):
    head, sizes = linear_head(6, 3, dropout=0.0, seed=7), set()
    head.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    train = clusters(batch_size=batch_size)
    range_test(head, train, Training(batch_size=batch_size), num_classes=3, seed=7, steps=20)
    assert sizes == seen


def test_a_last_image_alone_joins_the_batch_before_it_where_it_would_fail():
    network, sizes = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), set()
    network.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    train = clusters(batch_size=299)
    range_test(network, train, Training(batch_size=299), num_classes=3, seed=7, steps=20)
    assert sizes == {300}


def test_memory_that_ran_out_is_told():
    head = linear_head(6, 3, dropout=0.0, seed=7)

    def run_out(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    head.register_forward_pre_hook(run_out)
    found = range_test(head, clusters(), Training(batch_size=32), num_classes=3, seed=7, steps=20)
    assert found.notes == ("out of memory in training at 32 images, going on with 16 at a time",)


def test_memory_that_no_smaller_pieces_save_is_one_line(monkeypatch):
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.SGD, "step", run_out)
    with pytest.raises(TrialFailed, match="Out of memory at batch size 32 outside"):
        run(Training(optimizer="sgd", batch_size=32), steps=20)


def test_a_groups_own_rate_keeps_its_ratio():
    head = linear_head(6, 3, dropout=0.0, seed=7)
    groups = [
        {"params": [head[1].weight], "lr": 0.0003, "name": "slow"},
        {"params": [head[1].bias], "lr": 0.003, "name": "head"},
    ]
    before = head[1].weight.detach().clone(), head[1].bias.detach().clone()
    settings = Training(optimizer="adam", learning_rate=0.003, weight_decay=0.0)
    steps = []
    range_test(
        head, clusters(), settings, num_classes=3, seed=7, low=1e-4, high=1.0001e-4, steps=20,
        parameter_groups=groups, on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps[0][:2] == (1, pytest.approx(1e-4))
    # Adam's steps are about as long as the learning rate: 20 of 1e-4, and a tenth of it.
    after = head[1].weight.detach(), head[1].bias.detach()
    moved = [float((b - a).abs().max()) for a, b in zip(before, after, strict=True)]
    assert moved[1] == pytest.approx(20e-4, rel=0.5)
    assert moved[0] == pytest.approx(20e-5, rel=0.5)


def test_a_loss_that_is_not_finite_from_the_start_is_one_line():
    features = torch.full((40, 6), math.nan)
    train = FeatureBatches(features, torch.zeros(40, dtype=torch.int64), batch_size=8)
    with pytest.raises(TrialFailed, match="not finite before the first step"):
        range_test(nn.Linear(6, 3), train, Training(), num_classes=3, seed=7)


def test_a_sparkline_shows_high_and_low_and_cuts_what_explodes():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, 1.0, 1e9]) == "█▁█"
    assert len(sparkline([1.0] * 200)) == 60


# The command


@pytest.fixture
def experiment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shared_cache: Path,
    images: Path,
    small_search: dict[str, Any],
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))

    def write(**model: Any) -> str:
        raw = json.loads(json.dumps(small_search)) | {"data": {"source": str(images)}}
        raw["model"] |= model
        Path("experiment.yaml").write_text(yaml.safe_dump(raw))
        return "experiment.yaml"

    return write


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["lr-find", *arguments])


def test_the_command_draws_a_curve_and_prints_a_space_to_copy(experiment):
    result = call("--experiment", experiment(), "--output", "curve", "--steps", "60")
    assert result.exit_code == 0, result.stderr
    assert re.search("[▁▂▃▄▅▆▇█]{20,}", result.stdout)
    (override,) = re.findall(r"--set '(.*)'", result.stdout)
    space = Experiment.load("experiment.yaml", [override]).search.space["learning_rate"]
    numbers = json.loads(Path("curve/range_test.json").read_text())
    assert space == Range(
        low=numbers["suggestion"]["low"], high=numbers["suggestion"]["high"], scale="log"
    )
    with Image.open("curve/range_test.png") as figure:
        assert figure.width > 500
    assert not Path("mlflow.db").exists()


def test_what_is_printed_to_copy_leaves_the_rest_of_the_default_space_as_it_is(experiment):
    raw = yaml.safe_load(Path(experiment()).read_text())
    del raw["search"]["space"]
    Path("experiment.yaml").write_text(yaml.safe_dump(raw))
    result = call("--experiment", "experiment.yaml", "--output", "curve", "--steps", "60")
    assert result.exit_code == 0, result.stderr
    overrides = re.findall(r"--set '([^']*)'", result.stdout)
    space = Experiment.load("experiment.yaml", overrides).search.space
    assert list(space) == ["learning_rate", "batch_size"]
    assert space["learning_rate"] != default_space()["learning_rate"]
    assert space["batch_size"] == default_space()["batch_size"]


def test_a_stop_says_how_far_it_came_and_that_nothing_is_kept(experiment):
    def stop(step, *_):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted, match=r"^Stopped at step 6 of 60; nothing is kept\.$"):
        find_learning_rate(
            Experiment.load(experiment()), output=Path("curve"), steps=60, on_step=stop
        )
    assert not Path("curve").exists()


def test_the_command_takes_a_network_on_images(experiment):
    file = experiment(train="last_stage")
    result = call("--experiment", file, "--output", "curve", "--steps", "20", "--high", "0.1")
    assert result.exit_code == 0, result.stderr
    assert "the last stage of resnet18" in result.stdout
    numbers = json.loads(Path("curve/range_test.json").read_text())
    assert 0 < len(numbers["losses"]) <= 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--low", "1", "--high", "0.1"], "--low must be > 0 and < --high"),
        (["--low", "zero"], "--low takes a number"),
        (["--steps", "3"], "--steps must be >= 20"),
        (["--steps", "20.5"], "--steps takes a whole number"),
        (["--output", "."], "already exists"),
        (["--set", "training.lr=1"], "unknown key training.lr"),
    ],
)
def test_a_mistake_is_one_line(experiment, arguments, told):
    result = call("--experiment", experiment(), *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert told in line
