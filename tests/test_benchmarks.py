"""The measurements can be found and called. What they measure is no test."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from visiontuner.experiment.schema import Training

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = (
    "quickstart",
    "search_time",
    "floor",
    "mlflow_writing",
    "memory",
    "scale",
    "kills",
    "resume",
    "outage",
    "two_hosts",
    "storage",
    "rules",
    "tensor_rules",
    "recording",
    "compare",
    "serving",
    "serving_load",
    "loader",
    "gpu",
    "interval_coverage",
    "promotion",
    "choice",
    "suspects",
    "odd_images",
    "tables",
    "novelty",
    "heat_maps",
    "leaks",
    "networks",
    "suggest",
    "drift",
    "fine_tune",
    "peer",
)
# Programs that the measurements start, and what they share.
PARTS = (
    "run",
    "measuring",
    "network_pass",
    "empty_search",
    "failing_trainings",
    "plain_trainings",
    "writer_on_or_off",
    "trials_on_features",
    "peer_pattern",
    "plain_answers",
    "request_parts",
    "heads_together",
)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import run

    yield run
    for name in set(sys.modules) - before:  # `memory` and `run` are common names
        if name in (*NAMES, *PARTS):
            del sys.modules[name]


def test_every_module_is_a_listed_benchmark_or_a_part_of_one(runner: ModuleType) -> None:
    assert runner.BENCHMARKS == NAMES
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, *PARTS}


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_measures_and_its_targets(runner: ModuleType, name: str) -> None:
    module = runner.load(name)
    assert runner.first_line(module).endswith((".", "?"))
    assert module.TARGETS
    assert all(module.TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_small_settings_are_settings_of_the_measurement(runner: ModuleType, name: str) -> None:
    module = runner.load(name)
    parameters = inspect.signature(module.measure).parameters
    assert set(module.SMALL) <= set(parameters)
    assert all(p.default is not p.empty for p in parameters.values())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_says_what_it_is_for(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert source.startswith('"""')


def test_list_names_all_without_measuring() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--list"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        *("search_time", "tensor_rules", "choice", "suspects", "odd_images", "leaks"),
        *("suggest", "drift", "peer"),
    ],
)
def test_without_photographs_a_benchmark_says_what_it_needs(
    runner: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VISIONTUNER_PHOTOS", raising=False)
    skipped = sys.modules["measuring"].Skipped
    with pytest.raises(skipped, match="set VISIONTUNER_PHOTOS"):
        runner.load(name).measure()


def test_the_gpus_benchmark_needs_one_and_can_be_tried_without(runner: ModuleType) -> None:
    gpu = runner.load("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(sys.modules["measuring"].Skipped, match="no GPU"):
            gpu.measure()
    in_memory, from_files = gpu.measure(**{**gpu.SMALL, "files": 8})["rows"]
    assert "images/s" in in_memory["result"]
    assert "images/s" in from_files["result"]


def test_heads_trained_side_by_side_are_those_of_the_training_loop(runner: ModuleType) -> None:
    together = runner.load("heads_together")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    features = torch.randn(90, 16, generator=generator) + labels[:, None]
    points = together.Points(features=features, labels=labels)
    train, validation = points.rows(np.arange(70)), points.rows(np.arange(70, 90))
    settings = [
        Training(epochs=4, learning_rate=rate, batch_size=size)
        for rate, size in [(0.003, 32), (0.1, 32), (0.01, 64), (0.02, 128), (0.05, 256)]
    ]
    trained = together.train_heads(train, validation, settings, num_classes=3, seed=5)
    places = range(len(settings))
    difference = together.largest_difference(
        trained, train, validation, settings, places, num_classes=3, seed=5
    )
    assert difference < 1e-5
    best = trained.best.logits(validation.features).argmax(dim=2) == validation.labels
    assert best.double().mean(dim=1).numpy() == pytest.approx(trained.accuracy.max(axis=1))


def test_a_paired_gain_is_bounded_by_students_t(runner: ModuleType) -> None:
    choice = runner.load("choice")
    differences = np.array([0.01, 0.02, 0.03, 0.06])
    bound = ttest_1samp(differences, 0).confidence_interval(0.90).low
    gain = choice.Gain.of(differences)
    assert (gain.mean, gain.bound) == pytest.approx((0.03, bound))


def test_table_shows_targets_results_and_failures(runner: ModuleType) -> None:
    row = {"what": "a search", "target": "under 90 s", "result": "20.0 s", "met": True}
    missed = {**row, "result": "100.0 s", "met": False}
    outcomes = {
        "quickstart": {"rows": [row, missed]},
        "peer": {"rows": [], "skipped": "needs photographs"},
        "outage": {"rows": [], "failed": "RuntimeError: a | b\nc"},
    }
    assert runner.table(outcomes).splitlines()[2:] == [
        "| quickstart | a search | under 90 s | 20.0 s | yes |",
        "| quickstart | a search | under 90 s | 100.0 s | **no** |",
        "| peer | skipped: needs photographs | | | |",
        "| outage | failed: RuntimeError: a / b c | | | |",
    ]
