"""Each rule on a recording has one that fires it and one nearby that does not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from visiontuner.diagnostics.history import (
    STEP_PARTS,
    Curve,
    Recording,
    StepRecord,
    SystemRecord,
    TensorRecord,
    TrainingHistory,
)
from visiontuner.diagnostics.rules import (
    LASTING_RECORDED,
    RECORDED_RULES,
    RULES,
    diagnose_recording,
)
from visiontuner.diagnostics.rules_search import UnequalHosts
from visiontuner.experiment.schema import STOPPING_RULES
from visiontuner.journal import Finding

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
    "update_norm": 1e-2,
    "update_mean": 1e-5,
    "update_absmax": 1e-3,
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


def every(statistic: str, value: Any, *layers: str) -> dict[tuple[str, str], Any]:
    return {(layer, statistic): value for layer in layers or ("first", "norm", "head")}


def images(low: float, high: float, centre: float = 0.0, **about: Any) -> TrainingHistory:
    history = tensors(
        input_min=np.full(4, low, np.float32),
        input_max=np.full(4, high, np.float32),
        input_mean=np.full((4, 3), centre, np.float32),
    )
    assert history.recording is not None
    known = {**history.recording.about, **about}
    return replace(history, recording=replace(history.recording, about=known))


def steps(
    parts: dict[str, Any] | None = None, *, number: int = 50, device: str = "cpu",
    startup: float = 9.0, system: SystemRecord | None = None, **rest: Any,
) -> TrainingHistory:  # fmt: skip
    """50 steps of 0.28 s but for `parts`, by name seconds, or one value a step."""
    seconds = np.tile(np.float32([0.01, 0.01, 0.08, 0.16, 0.01, 0.01]), (number, 1))
    for part, value in (parts or {}).items():
        seconds[:, STEP_PARTS.index(part)] = value
    record = StepRecord(
        steps=np.arange(1, number + 1),
        seconds=seconds,
        images=np.full(number, 32),
        startup_seconds=startup,
        device=device,
        workers=2,
    )
    return TrainingHistory(recording=Recording(steps=record, system=system), **rest)


def in_batches_of(images: int, history: TrainingHistory) -> TrainingHistory:
    of_steps = steps().recording
    assert history.recording is not None
    assert of_steps is not None
    assert of_steps.steps is not None
    sized = replace(of_steps.steps, images=np.full(50, images))
    return replace(history, recording=replace(history.recording, steps=sized))


def late(count: int, seconds: float) -> list[float]:
    """300 steps' waiting: so many late ones."""
    return [0.01] * (300 - count) + [seconds] * count


def machine(device: str = "NVIDIA L4", **values: Any) -> TrainingHistory:
    """100 samples of a machine of 16,000 MB whose first GPU is busy; a number is for all."""
    usual = {
        "cpu_utilization_percentage": 50.0,
        "gpu_0_utilization_percentage": 90.0,
        "gpu_0_memory_usage_percentage": 80.0,
        "system_memory_usage_megabytes": 8000.0,
        "system_memory_usage_percentage": 50.0,
        "process_memory_megabytes": 2000.0,
    }
    named = {name: np.full(100, value, np.float32) for name, value in {**usual, **values}.items()}
    system = SystemRecord(
        times=np.arange(100.0), values={n: v * np.ones(100, np.float32) for n, v in named.items()}
    )
    return steps(device=device, system=system)


def rising(start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, 100)


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
    "exploding_tensor: infinity in a gradient of which a sample is recorded": (
        "error",
        tensors({("first", "gradient_absmax"): [0, 0, 0, np.inf]}),
        tensors({("first", "gradient_absmax"): 1e30}),
    ),
    "vanishing_gradient": (
        "error",
        tensors({("first", "gradient_mean"): 9e-8}),
        tensors({("first", "gradient_mean"): 2e-7}),
    ),
    "vanishing_gradient: of a network that has learned": (
        "error",
        tensors({("first", "gradient_mean"): [1e-3, 9e-8, 9e-8, 9e-8]}),
        tensors(every("gradient_mean", [1e-3, 9e-8, 9e-8, 9e-8])),
    ),
    "all_zero: weights": (
        "error",
        tensors({("first", "weight_zeros"): 1}),
        tensors({("first", "weight_zeros"): 0.999}),
    ),
    "all_zero: outputs": (
        "error",
        tensors({("relu", "activation_zeros"): [0, 1, 1, 1]}),
        tensors({("relu", "activation_zeros"): [1, 1, 1, 0.9]}),
    ),
    "all_zero: gradients": (
        "error",
        tensors({("first", "gradient_zeros"): 1}),
        tensors({("first", "gradient_zeros"): np.nan}),
    ),
    "unchanged_tensor: all": (
        "error",
        tensors(every("weight_unchanged", 1)),
        tensors(every("weight_unchanged", 0.9999)),
    ),
    "unchanged_tensor: one": (
        "warning",
        tensors({("first", "weight_unchanged"): 1}),
        tensors({("norm", "weight_unchanged"): 1}),
    ),
    "unchanged_tensor: not only where a cosine ends": (
        "error",
        tensors(every("weight_unchanged", [0, 0, 0, 1, 1, 1, 1]), steps=tuple(range(7))),
        tensors(every("weight_unchanged", [0, 0, 0, 0, 1, 1, 1]), steps=tuple(range(7))),
    ),
    "weight_update_ratio: large": (
        "error",
        tensors({("head", "update_ratio"): [11, 1e-3, 1e-3, 1e-3]}),
        tensors({("head", "update_ratio"): 9}),
    ),
    "weight_update_ratio: large, and not of weights that began with zeros": (
        "error",
        tensors({("head", "update_ratio"): [11, 1, 1, 1]}),
        tensors({("head", "update_ratio"): [11, 1, 1, 1], ("head", "weight_norm"): [0, 9, 9, 9]}),
    ),
    "weight_update_ratio: small": (
        "error",
        tensors(every("update_ratio", 9e-9)),
        tensors(every("update_ratio", 2e-8)),
    ),
    "weight_update_ratio: small in one": (
        "warning",
        tensors({("first", "update_ratio"): 9e-9}),
        tensors({("norm", "update_ratio"): 9e-9}),
    ),
    "poor_weight_initialisation: equal weights": (
        "error",
        tensors({("head", "weight_std"): [0, 0.1, 0.1, 0.1]}),
        tensors({("norm", "weight_std"): [0, 0.1, 0.1, 0.1]}),
    ),
    "poor_weight_initialisation: equal weights, and not the factors of a block": (
        "error",
        tensors({("block", "weight_std"): 0}, layers={**LAYERS, "block": "StdConv2dSame"}),
        tensors({("block", "weight_std"): 0}, layers={**LAYERS, "block": "ConvNeXtBlock"}),
    ),
    "poor_weight_initialisation: outputs shrink": (
        "error",
        tensors({("head", "activation_std"): [9e-5, 1, 1, 1]}),
        tensors({("head", "activation_std"): [2e-4, 1, 1, 1]}),
    ),
    "poor_weight_initialisation: gradients shrink": (
        "error",
        tensors({("first", "gradient_mean"): [9e-15, 1e-4, 1e-4, 1e-4]}),
        tensors({("first", "gradient_mean"): [2e-14, 1e-4, 1e-4, 1e-4]}),
    ),
    "tensor_variance: large": (
        "error",
        tensors({("first", "activation_std"): [1, 2e4, 2e4, 2e4]}),
        tensors({("first", "activation_std"): [2e4, 2e4, 2e4, 9e3]}),
    ),
    "tensor_variance: small, and not a block that adds little": (
        "error",
        tensors({("block", "activation_std"): 9e-7}, layers={**LAYERS, "block": "Conv1d"}),
        tensors({("block", "activation_std"): 9e-7}, layers={**LAYERS, "block": "ConvBlock"}),
    ),
    "tensor_variance: small": (
        "error",
        tensors({("head", "activation_std"): [1, 9e-7, 9e-7, 9e-7]}),
        tensors({("head", "activation_std"): [1, 2e-6, 2e-6, 2e-6]}),
    ),
    "saturated_activation": (
        "error",
        tensors({("gate", "activation_saturated"): 0.51}, layers={**LAYERS, "gate": "Sigmoid"}),
        tensors({("gate", "activation_saturated"): 0.49}, layers={**LAYERS, "gate": "Sigmoid"}),
    ),
    "saturated_activation: but a hard gate": (
        "error",
        tensors({("gate", "activation_saturated"): 1}, layers={**LAYERS, "gate": "Tanh"}),
        tensors({("gate", "activation_saturated"): 1}, layers={**LAYERS, "gate": "Hardsigmoid"}),
    ),
    "saturated_activation: but a hard gate of timm's": (
        "error",
        tensors({("gate", "activation_saturated"): 1}, layers={**LAYERS, "gate": "Sigmoid"}),
        tensors({("gate", "activation_saturated"): 1}, layers={**LAYERS, "gate": "HardSigmoid"}),
    ),
    "dead_relu: most": (
        "error",
        tensors({("relu", "activation_dead"): 0.91}),
        tensors({("relu", "activation_dead"): [0.91, 0.91, 0.91, 0.4]}),
    ),
    "dead_relu: half": (
        "warning",
        tensors({("relu", "activation_dead"): 0.51}),
        tensors({("relu", "activation_dead"): 0.49}),
    ),
    "dead_relu: by chance in a small batch": (
        "warning",
        in_batches_of(16, tensors({("relu", "activation_dead"): 0.6})),
        in_batches_of(15, tensors({("relu", "activation_dead"): 0.6})),
    ),
    "check_input_images: 0 to 255": ("error", images(0, 255, 110), images(-2.12, 2.64)),
    "check_input_images: 0 to 1": ("error", images(0, 1, 0.4), images(-2.12, 1, -1.4)),
    "check_input_images: what the backbone expects": (
        "error",
        images(-1, 1),
        images(-1, 1, mean=[0.5] * 3, std=[0.5] * 3),
    ),
    "low_gpu_use: idle": (
        "error",
        machine(gpu_0_utilization_percentage=9),
        machine(gpu_0_utilization_percentage=9, device="cpu"),
    ),
    "low_gpu_use: low": (
        "warning",
        machine(gpu_0_utilization_percentage=69),
        machine(gpu_0_utilization_percentage=71),
    ),
    "low_gpu_use: pauses": (
        "info",
        machine(gpu_0_utilization_percentage=[9] * 6 + [90] * 94),
        machine(gpu_0_utilization_percentage=[9] * 4 + [90] * 96),
    ),
    "cpu_bottleneck: most of the time": (
        "error",
        machine(cpu_utilization_percentage=91, gpu_0_utilization_percentage=[9] * 51 + [90] * 49),
        machine(cpu_utilization_percentage=89, gpu_0_utilization_percentage=[9] * 51 + [90] * 49),
    ),
    "cpu_bottleneck: sometimes": (
        "warning",
        machine(cpu_utilization_percentage=91, gpu_0_utilization_percentage=[9] * 26 + [90] * 74),
        machine(cpu_utilization_percentage=91, gpu_0_utilization_percentage=[9] * 24 + [90] * 76),
    ),
    "io_bottleneck: half of the time": ("error", steps({"data": 0.28}), steps({"data": 0.05})),
    "io_bottleneck: a third": ("warning", steps({"data": 0.12}), steps({"data": 0.08})),
    "batch_size_too_small: the optimizer": (
        "error",
        steps({"optimizer": 0.28}),
        steps({"optimizer": 0.05}),
    ),
    "batch_size_too_small: for batch normalisation": (
        "error",
        in_batches_of(2, tensors()),
        in_batches_of(2, tensors(layers={"first": "Conv2d", "norm": "LayerNorm", "relu": "ReLU"})),
    ),
    "batch_size_too_small: rather, unless it is frozen": (
        "warning",
        in_batches_of(4, tensors()),
        replace(in_batches_of(4, tensors()), configuration={"freeze_batch_norm": True}),
    ),
    "batch_size_too_small: in pieces": (
        "error",
        replace(in_batches_of(32, tensors()), configuration={"micro_batch_size": 2}),
        replace(in_batches_of(32, tensors()), configuration={"micro_batch_size": 8}),
    ),
    "batch_size_too_small: a GPU with room": (
        "warning",
        machine(gpu_0_utilization_percentage=65, gpu_0_memory_usage_percentage=65),
        machine(gpu_0_utilization_percentage=65, gpu_0_memory_usage_percentage=75),
    ),
    "batch_size_too_small: a GPU that does not tell its memory": (
        "warning",
        machine(gpu_0_utilization_percentage=65, gpu_0_memory_usage_percentage=65),
        machine(gpu_0_utilization_percentage=65, gpu_0_memory_usage_percentage=np.nan),
    ),
    "memory_increase: of a GPU": (
        "error",
        machine(gpu_0_memory_usage_percentage=rising(50, 60)),
        machine(gpu_0_memory_usage_percentage=rising(50, 54)),
    ),
    "memory_increase: of the training": (
        "error",
        machine(process_memory_megabytes=rising(2000, 4000)),
        machine(process_memory_megabytes=[*rising(2000, 4000)[:60], *[3200] * 40]),
    ),
    "initialisation_too_long": ("warning", steps(startup=1201), steps(startup=1199)),
    "initialisation_too_long: decoding included": (
        "warning",
        steps(startup=200, preparation_seconds=1001.0),
        steps(startup=200, preparation_seconds=999.0),
    ),
    "initialisation_too_long: nothing else is recorded of a head": (
        "warning",
        TrainingHistory(preparation_seconds=1201.0),
        TrainingHistory(preparation_seconds=1199.0),
    ),
    "initialisation_too_long: longer than the training": (
        "error",
        steps(startup=1300, times=(2000.0, 3200.0)),
        steps(startup=1100, times=(2000.0, 3000.0)),
    ),
    "step_outliers": (
        "warning",
        steps({"data": late(11, 3.0)}, number=300),
        steps({"data": late(10, 3.0)}, number=300),
    ),
    "step_outliers: more than half of the time": (
        "error",
        steps({"data": late(11, 9.0)}, number=300),
        steps({"data": late(11, 0.5)}, number=300),
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
    assert "at step 100 in the output of head (Linear)" in finding.evidence
    assert finding.step == 2


def test_a_healthy_recording_has_no_finding() -> None:
    for healthy in (tensors(), steps(), machine()):
        assert diagnose_recording(healthy, RECORDED_RULES) == []


@pytest.mark.parametrize("rule", RECORDED_RULES)
@pytest.mark.parametrize(
    "odd",
    [
        TrainingHistory(recording=Recording()),
        tensors(steps=()),
        tensors(layers={}),
        tensors(steps=(7,)),
        steps(number=0),
        steps(number=1),
        steps(dict.fromkeys(STEP_PARTS, 0.0)),
        machine(**{"gpu_0_utilization_percentage": np.nan, "system_memory_usage_percentage": 0.0}),
    ],
    ids=["nothing", "no steps", "no layers", "one", "no times", "one time", "zeros", "no samples"],
)
def test_no_rule_fails_on_an_odd_recording(rule: str, odd: TrainingHistory) -> None:
    assert RULES[rule](odd) is None


def on(host: str, speed: float, **settings: Any) -> TrainingHistory:
    return TrainingHistory(
        metrics={"images_per_second": Curve((1, 2, 3), (speed / 3, speed, speed))},
        configuration={"batch_size": 32, **settings},
        host=host,
    )


def of_search(*trials: TrainingHistory) -> list[Finding]:
    hosts = UnequalHosts()
    return [finding for trial in trials if (finding := hosts.add(trial))]


def test_a_machine_at_less_than_half_the_speed_of_another_is_told_once() -> None:
    found = of_search(*[on("algo-1", 100)] * 3, *[on("algo-2", 49)] * 4)
    assert [(f.rule, f.severity) for f in found] == [("workload_imbalance", "warning")]
    assert "algo-2 trains 49 images/s and algo-1 100" in found[0].evidence


@pytest.mark.parametrize(
    "others",
    [
        [on("algo-2", 51)] * 3,
        [on("algo-2", 49)] * 2,
        [on("algo-1", 49)] * 3,
        [on("algo-2", 49, batch_size=8)] * 3,
    ],
    ids=["faster", "too few", "the same machine", "other batches"],
)
def test_machines_that_cannot_be_told_apart(others: list[TrainingHistory]) -> None:
    assert of_search(*[on("algo-1", 100)] * 3, *others) == []


def test_only_rules_on_recordings_are_asked_of_one() -> None:
    broken = PAIRS["exploding_tensor: gradient"][1]
    assert [f.rule for f in diagnose_recording(broken)] == ["exploding_tensor"]
    assert diagnose_recording(broken, ["overfit"]) == []
    assert set(LASTING_RECORDED) <= set(STOPPING_RULES) & set(RECORDED_RULES)
    no_reason_to_stop = {"batch_size_too_small", "initialisation_too_long", "step_outliers"}
    assert set(RECORDED_RULES) - set(STOPPING_RULES) == no_reason_to_stop
