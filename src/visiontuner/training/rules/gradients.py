"""Rules on gradients."""

from __future__ import annotations

from statistics import median

from visiontuner.journal import Finding
from visiontuner.training.rules import thresholds as limits
from visiontuner.training.rules.history import TrainingHistory, times_over


def exploding_gradient(history: TrainingHistory) -> Finding | None:
    """The gradient norm is many times that of the first epoch and of the usual one before it."""
    norm = history.curve("gradient_norm")
    worst, at, usual = 0.0, 0, 0.0
    for position in range(1, len(norm.values)):
        # The first epoch's as well: near the end a usual norm is so small that noise is "large".
        before = max(norm.values[0], median(norm.values[:position]))
        times = norm.values[position] / before if before > 0 else 0.0
        if times > worst:
            worst, at, usual = times, position, before
    if worst < limits.GRADIENT_WARNING:
        return None
    return Finding(
        rule="exploding_gradient",
        severity="error" if worst >= limits.GRADIENT_ERROR else "warning",
        evidence=f"gradient norm {norm.values[at]:.3g}, {times_over(worst)} times the "
        f"{usual:.3g} before",
        advice="Use a smaller learning rate or training.warmup_fraction: 0.1; look for pictures "
        "with broken pixels.",
        step=norm.steps[at],
    )
