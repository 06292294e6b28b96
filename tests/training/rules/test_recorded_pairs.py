"""Each rule on a recording has one that fires it and one nearby that does not."""

from typing import Any

import numpy as np
import pytest

from visiontuner.journal import Finding
from visiontuner.training.recording.records import Recording, TensorRecord
from visiontuner.training.rules import (
    LASTING_RECORDED,
    RECORDED_RULES,
    RULES,
    STOPPING_RULES,
    TrainingHistory,
    diagnose_recording,
)

LAYERS = {"first": "Conv2d", "norm": "BatchNorm2d", "relu": "ReLU", "head": "Linear"}
STEPS = (1, 50, 100, 150)
HEALTHY = {
    "weight_norm": 10.0,
    "weight_std": 0.05,
    "weight_absmax": 0.3,
    "weight_zeros": 0.0,
    "weight_unchanged": 0.01,
    "gradient_norm": 0.1,
    "gradient_mean": 1e-4,
    "gradient_absmax": 0.02,
    "gradient_zeros": 0.0,
    "gradient_nonfinite": 0.0,
    "update_ratio": 1e-3,
    "activation_mean": 0.1,
    "activation_std": 1.0,
    "activation_min": -3.0,
    "activation_max": 3.0,
    "activation_zeros": 0.4,
    "activation_saturated": np.nan,
    "activation_dead": np.nan,
    "activation_nonfinite": 0.0,
}


def tensors(
    changes: dict[tuple[str, str], Any] | None = None, *, layers: dict[str, str] = LAYERS,
    steps: tuple[int, ...] = STEPS, **rest: Any,
) -> TrainingHistory:  # fmt: skip
    """A healthy recording but for `changes`: by (layer, statistic) a value, or one a step."""
    values = {}
    for name, usual in HEALTHY.items():
        table = np.full((len(steps), len(layers)), usual, np.float32)
        if not name.startswith("activation"):
            table[:, [kind == "ReLU" for kind in layers.values()]] = np.nan
        values[name] = table
    for (layer, statistic), value in (changes or {}).items():
        values[statistic][:, list(layers).index(layer)] = value
    record = TensorRecord(
        steps=np.array(steps),
        layers=tuple(layers),
        kinds=tuple(layers.values()),
        values=values,
        **{
            "input_mean": np.zeros((len(steps), 3), np.float32),
            "input_std": np.ones((len(steps), 3), np.float32),
            "input_min": np.full(len(steps), -2.1, np.float32),
            "input_max": np.full(len(steps), 2.6, np.float32),
            "inputs": np.zeros((4, 3, 8, 8), np.float16),
            **rest,
        },
    )
    about = {"steps_per_epoch": 50, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return TrainingHistory(recording=Recording(tensors=record, about=about))


PAIRS: dict[str, tuple[str, TrainingHistory, TrainingHistory]] = {
    "exploding_tensor: activation": (
        "error",
        tensors({("head", "activation_nonfinite"): [0, 0, 0.5, 1]}),
        tensors({("head", "activation_max"): 1e30}),
    ),
    "exploding_tensor: gradient": (
        "error",
        tensors({("first", "gradient_nonfinite"): [0, 0, 0, 1e-6]}),
        tensors({("first", "gradient_nonfinite"): np.nan}),
    ),
}


def found(case: str, of: TrainingHistory) -> Finding | None:
    return RULES[case.split(":")[0]](of)


@pytest.mark.parametrize("case", PAIRS)
def test_a_rule_fires(case: str) -> None:
    severity, fires, _ = PAIRS[case]
    finding = found(case, fires)
    assert finding is not None
    assert (finding.rule, finding.severity) == (case.split(":")[0], severity)
    assert finding.evidence
    assert finding.advice.endswith(".")
    assert "\n" not in finding.evidence + finding.advice


@pytest.mark.parametrize("case", PAIRS)
def test_a_rule_is_silent_nearby(case: str) -> None:
    assert found(case, PAIRS[case][2]) is None


def test_every_rule_has_a_pair() -> None:
    assert {case.split(":")[0] for case in PAIRS} == set(RECORDED_RULES)


def test_the_evidence_names_layer_and_step_and_the_finding_the_epoch() -> None:
    finding = RULES["exploding_tensor"](PAIRS["exploding_tensor: activation"][1])
    assert finding is not None
    assert "head (Linear) at step 100" in finding.evidence
    assert finding.step == 2


def test_a_healthy_recording_has_no_finding() -> None:
    assert diagnose_recording(tensors(), RECORDED_RULES) == []


@pytest.mark.parametrize("rule", RECORDED_RULES)
@pytest.mark.parametrize(
    "odd",
    [
        TrainingHistory(recording=Recording()),
        tensors(steps=()),
        tensors(layers={}),
        tensors(steps=(7,)),
    ],
    ids=["nothing", "no steps", "no layers", "one step"],
)
def test_no_rule_fails_on_an_odd_recording(rule: str, odd: TrainingHistory) -> None:
    assert RULES[rule](odd) is None


def test_only_rules_on_recordings_are_asked_of_one() -> None:
    broken = PAIRS["exploding_tensor: gradient"][1]
    assert [f.rule for f in diagnose_recording(broken)] == ["exploding_tensor"]
    assert diagnose_recording(broken, ["overfit"]) == []
    assert set(LASTING_RECORDED) <= set(STOPPING_RULES) & set(RECORDED_RULES)
