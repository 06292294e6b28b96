"""Diagnostic rules: pure functions from the recorded numbers of a training to findings.

diagnose_history(history)          every rule on one training
diagnose_curves(history, rules)    only rules on curves: cheap enough after every epoch
diagnose_recording(history, rules) only rules on what was recorded of tensors, steps and machine
SimilarRuns, UnequalHosts          on the trainings of a search together

What each rule looks for and where its thresholds come from: `docs/rules.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from visiontuner.diagnostics.history import TrainingHistory
from visiontuner.diagnostics.rules_curves import (
    learning_rate_too_high,
    learning_rate_too_low,
    loss_not_decreasing,
    not_a_number,
    overfit,
    overtraining,
    stalled,
)
from visiontuner.diagnostics.rules_predictions import (
    class_imbalance,
    class_not_predicted,
    label_noise,
    learning_rate_to_blame,
)
from visiontuner.diagnostics.rules_profiler import (
    batch_size_too_small,
    cpu_bottleneck,
    initialisation_too_long,
    io_bottleneck,
    low_gpu_use,
    memory_increase,
    step_outliers,
)
from visiontuner.diagnostics.rules_tensors import (
    all_zero,
    check_input_images,
    dead_relu,
    exploding_gradient,
    exploding_tensor,
    poor_weight_initialisation,
    saturated_activation,
    tensor_variance,
    unchanged_tensor,
    vanishing_gradient,
    weight_update_ratio,
)
from visiontuner.journal import Finding

Rule = Callable[[TrainingHistory], Finding | None]

RECORDED_RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        exploding_tensor,
        vanishing_gradient,
        all_zero,
        unchanged_tensor,
        weight_update_ratio,
        poor_weight_initialisation,
        tensor_variance,
        saturated_activation,
        dead_relu,
        check_input_images,
        low_gpu_use,
        cpu_bottleneck,
        io_bottleneck,
        batch_size_too_small,
        memory_increase,
        initialisation_too_long,
        step_outliers,
    )
}
"""Rules on what was recorded of tensors, steps and the machine, by their name."""

RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        not_a_number,
        exploding_gradient,
        learning_rate_too_high,
        learning_rate_too_low,
        loss_not_decreasing,
        overfit,
        overtraining,
        label_noise,
        class_not_predicted,
        learning_rate_to_blame,
        class_imbalance,
        stalled,
        *RECORDED_RULES.values(),
    )
}
"""Every rule on one training, by its name."""

# What the last epoch said is final: a later epoch cannot take these back.
LASTING_RULES = ("not_a_number", "exploding_gradient", "learning_rate_too_high")

# Of the recorded ones: a later step cannot take these back either.
LASTING_RECORDED = ("exploding_tensor", "poor_weight_initialisation", "check_input_images")

_ORDER = {"error": 0, "warning": 1, "info": 2}


def diagnose_history(history: TrainingHistory) -> list[Finding]:
    """Every rule on one training; errors first."""
    return most_severe_first(_apply(history, RULES))


def diagnose_curves(
    history: TrainingHistory, rules: Collection[str] = LASTING_RULES
) -> list[Finding]:
    """Some rules on one training that may still run; the names are keys of `RULES`."""
    return most_severe_first(_apply(history, rules))


def diagnose_recording(
    history: TrainingHistory, rules: Collection[str] = LASTING_RECORDED
) -> list[Finding]:
    """Some rules on `history.recording` of a training that may still run; keys of `RULES`.

    Names of other rules are passed over, so that `rules.stop_on` can be given as it is.
    """
    return most_severe_first(_apply(history, [name for name in rules if name in RECORDED_RULES]))


def not_refuted(findings: Collection[Finding], history: TrainingHistory) -> list[Finding]:
    """What was found when a trial ended, without what better trials have refuted since."""
    about_data = ("class_not_predicted", "label_noise") if history.far_from_best else ()
    return [finding for finding in findings if finding.rule not in about_data]


def most_severe_first(findings: Collection[Finding]) -> list[Finding]:
    """Errors, then warnings, then infos; otherwise in the given order."""
    return sorted(findings, key=lambda finding: _ORDER[finding.severity])


def _apply(history: TrainingHistory, rules: Collection[str]) -> list[Finding]:
    found = [RULES[name](history) for name in rules]
    return [finding for finding in found if finding is not None]
