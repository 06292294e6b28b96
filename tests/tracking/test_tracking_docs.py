import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visiontuner.diagnostics.history import Recording, StepRecord, SystemRecord
from visiontuner.diagnostics.rules import RECORDED_RULES
from visiontuner.diagnostics.system import SystemSampler
from visiontuner.experiment.schema import SEARCHABLE
from visiontuner.journal import read_events
from visiontuner.serving.promotion import DECISION_TAG, REASON_TAG
from visiontuner.serving.registry import QUANTIZED_FROM_TAG
from visiontuner.tracking.figures.recording import EXPLAINS, points_of
from visiontuner.tracking.run_plans import SearchPlan, TrialPlan
from visiontuner.tracking.writer import (
    EVALUATION_DIGEST,
    MISSING_ARTIFACTS,
    TEST_LOOKS,
    Evaluation,
    metrics,
    version_tags,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "tracking.md"


@pytest.fixture
def described() -> set[str]:
    return set(re.findall(r"`([A-Za-z0-9_./]+)`", DOCUMENT.read_text(encoding="utf-8")))


@pytest.fixture
def plan(new_search: Callable[..., Any]) -> SearchPlan:
    """A search that makes the writer use every name it has."""
    search = new_search()
    search.begin()
    search.append("finding", rule="imbalance", severity="warning", evidence="", advice="")
    search.trial(1, reason="asha")
    search.start(2)
    search.epoch(2, 1, step_losses=[(5, 0.7)])
    search.end(2, state="failed", error="loss is NaN")
    search.append(
        "finding", trial_id="t0001", attempt=1, rule="r", severity="info", evidence="", advice=""
    )
    configuration = {"learning_rate": 0.001, "batch_size": 32}
    stage = {"stage": "network", "starts_from": "t0001"}
    search.append(
        "trial_started", trial_id="t0003", attempt=1, configuration=configuration, **stage
    )
    search.finish()
    return SearchPlan.of(read_events(search.folder).events)


def test_every_metric_is_described(plan: SearchPlan, described: set[str]) -> None:
    points = [*plan.points, *(p for trial in plan.trials.values() for p in trial.points)]
    assert {point.key for point in points} <= described


def test_every_metric_of_a_recording_is_described(tmp_path: Path, described: set[str]) -> None:
    sampler = SystemSampler(tmp_path, torch.device("cpu"))
    sampler.close()
    sampled = sampler.record()
    gpu = ("utilization_percentage", "memory_usage_percentage", "memory_usage_megabytes")
    values = {f"gpu_0_{name}": sampled.times.astype(np.float32) for name in gpu}
    steps = StepRecord(
        steps=np.array([1]),
        seconds=np.ones((1, 6), np.float32),
        images=np.array([8]),
        startup_seconds=1.0,
        device="cpu",
        workers=0,
    )
    system = SystemRecord(times=sampled.times, values={**sampled.values, **values})
    points = points_of(Recording(steps=steps, system=system), time=1000, epoch=2)
    names = {point.key for point in points}
    assert names <= described
    powers = {"system/gpu_0_power_usage_watts", "system/gpu_0_power_usage_percentage"}
    assert {name for name in described if name.startswith("system/")} <= names | powers
    assert {p.step for p in points if not p.key.startswith("system/")} == {2}


def test_every_rule_on_a_recording_has_a_figure_that_explains_it() -> None:
    assert set(RECORDED_RULES) <= set(EXPLAINS)


def test_every_tag_is_described(plan: SearchPlan, described: set[str]) -> None:
    tags = set(plan.tags()).union(*(trial.tags() for trial in plan.trials.values()))
    assert tags <= described
    # And nothing is described that nobody writes.
    elsewhere = {"visiontuner.best_run_id", "visiontuner.classifier_digest"}
    elsewhere |= {"visiontuner.choice"}  # once there is one
    elsewhere |= {"visiontuner.from"}  # of one that began with another
    elsewhere |= {"visiontuner.drift", "visiontuner.drift_of"}  # of a check of drift
    elsewhere |= {"visiontuner.job", "visiontuner.instances"}  # of a training job
    elsewhere |= {QUANTIZED_FROM_TAG}  # of a version in int8
    elsewhere |= {DECISION_TAG, REASON_TAG, TEST_LOOKS, EVALUATION_DIGEST, MISSING_ARTIFACTS}
    elsewhere |= set(version_tags(evaluation()))
    assert {n for n in described if n.startswith("visiontuner.")} == tags | elsewhere


def test_every_metric_of_an_evaluation_is_described(described: set[str]) -> None:
    names = {re.sub("_(low|high)$", "", name) for name in metrics(evaluation())}
    assert names == {n for n in described if n.startswith("test_")} | {
        "temperature",
        "confidence_threshold",
    }


def evaluation() -> Evaluation:
    """One with everything that an evaluation can say."""
    interval = {"value": 0.9, "low": 0.8, "high": 1.0}
    names = ("accuracy", "top5_accuracy", "macro_f1", "nll", "nll_uncalibrated")
    report = {
        "temperature": 1.1,
        "num_images": 10,
        "test_set": "d",
        "metrics": dict.fromkeys((*names, "ece", "ece_uncalibrated"), interval),
        "threshold": {"value": 0.5, "precision": interval, "coverage": interval},
    }
    return Evaluation(
        folder=Path(), digest="d", trial_id="t", classifier_digest="c", looks=1, report=report
    )


def test_every_parameter_is_described(described: set[str]) -> None:
    assert set(SEARCHABLE) <= described


def test_the_experiments_parameters_have_a_dot(plan: SearchPlan) -> None:
    assert all("." in name for name in plan.params())
    assert {"training.epochs", "experiment.seed", "model.backbone"} <= set(plan.params())


def test_long_texts_fit_into_mlflow() -> None:
    trial = TrialPlan(search_id="s", trial_id="t", configuration={"x": "y" * 9000}, started=0)
    assert len(trial.params()["x"]) == 6000
