"""Rules on where the time of training steps went, and on the machine's use meanwhile.

What is found here costs time or money, an error more than half of it; batches that are too small
cost accuracy as well.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontuner.diagnostics import thresholds as limits
from visiontuner.diagnostics.history import (
    STEP_PARTS,
    Floats,
    StepRecord,
    SystemRecord,
    TrainingHistory,
    of_kind,
    tensors_of,
    trained,
)
from visiontuner.journal import Finding, Severity

_GPU = re.compile(r"gpu_(\d+)_utilization_percentage")


def low_gpu_use(history: TrainingHistory) -> Finding | None:
    """A GPU has little to do nearly all the time, or again and again nothing.

    Source: Debugger's LowGPUUtilization, threshold_p95 70, threshold_p5 10.
    """
    system = _system_of(history)
    use = _gpus(system) if system else {}
    if not use or not _steps_on_gpu(history):
        return None
    gpu = max(use, key=lambda number: float(np.nanmean(use[number])))  # the one that trains
    low, high = (float(np.nanpercentile(use[gpu], share)) for share in (5, 95))
    if high >= limits.GPU_P95 and low >= limits.GPU_P5:
        return None
    severity: Severity = "info"  # it pauses, but is used
    if high < limits.GPU_P95:
        severity = "error" if high < limits.GPU_IDLE else "warning"
    return Finding(
        rule="low_gpu_use",
        severity=severity,
        evidence=f"GPU {gpu} was used at {low:.0f} % to {high:.0f} % (5th and 95th percentile of "
        f"{len(use[gpu])} samples)",
        advice="Use a larger training.batch_size or more training.workers, training.precision: "
        "bf16, or let trials share a GPU (search.gpus_per_trial).",
    )


def cpu_bottleneck(history: TrainingHistory) -> Finding | None:
    """The processors are busy while the GPU has nothing to do.

    Source: Debugger's CPUBottleneck, threshold 50, cpu_threshold 90, gpu_threshold 10.
    """
    system = _system_of(history)
    use = _gpus(system) if system else {}
    if system is None or not use or not _steps_on_gpu(history):
        return None
    cpu, gpu = system.of("cpu_utilization_percentage"), np.fmax.reduce(list(use.values()))
    share = float(((cpu > limits.CPU_BUSY) & (gpu < limits.GPU_IDLE)).mean())
    if share <= limits.BOTTLENECK_WARNING:
        return None
    return Finding(
        rule="cpu_bottleneck",
        severity="error" if share > limits.BOTTLENECK_ERROR else "warning",
        evidence=f"for {share:.0%} of the time the CPU was used above {limits.CPU_BUSY:.0f} % and "
        f"the GPU below {limits.GPU_IDLE:.0f} %",
        advice="Prepare less: a smaller model.image_size or training.augmentation: light; or use "
        "a machine with more cores.",
    )


def io_bottleneck(history: TrainingHistory) -> Finding | None:
    """Steps wait for images.

    Source: after Debugger's IOBottleneck, threshold 50: half of the time. It has the kernel's
    waiting for disks, while the steps say themselves how long they waited.
    """
    steps = _steps_of(history)
    share = _part(steps, "data") if steps else 0.0
    if steps is None or share <= limits.WAITING_WARNING:
        return None
    seconds = steps.seconds[:, STEP_PARTS.index("data")]
    return Finding(
        rule="io_bottleneck",
        severity="error" if share > limits.BOTTLENECK_ERROR else "warning",
        evidence=f"{share:.0%} of the time of {len(steps.steps)} steps went into waiting for "
        f"images, {1000 * float(np.median(seconds)):.0f} ms a step; processes that prepare them: "
        f"{steps.workers}",
        advice="Use more training.workers (as many as cores), a simpler training.augmentation or a "
        "smaller model.image_size; see that the cache is on a fast local disk.",
    )


def batch_size_too_small(history: TrainingHistory) -> Finding | None:
    """Batch normalisation learns from a handful of images, or a larger batch would be faster.

    Source: Debugger's BatchSize for GPUs, 95th percentiles of CPU, GPU and GPU memory all below
    70 %. The optimizer's share holds for any device: its time does not depend on the batch. What
    small batches do to batch normalisation: Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """
    steps = history.recording.steps if history.recording else None
    if steps is None or not len(steps.steps):
        return None
    images = float(np.median(steps.images))
    at_once = min(images, history.configuration.get("micro_batch_size") or images)
    severity, evidence = _starved_norms(history, at_once) or _unshared_cost(history) or ("", "")
    if severity not in ("error", "warning"):
        return None
    return Finding(
        rule="batch_size_too_small",
        severity="error" if severity == "error" else "warning",
        evidence=f"{evidence}, with {images:.0f} images a step",
        advice="Use a training.batch_size (and training.micro_batch_size) two to four times as "
        "large, with a learning rate larger in proportion; else training.freeze_batch_norm: true.",
    )


def _starved_norms(history: TrainingHistory, at_once: float) -> tuple[str, str] | None:
    record = tensors_of(history)
    if record is None or history.configuration.get("freeze_batch_norm"):
        return None
    norms = int((of_kind(record, "BatchNorm") & trained(record)).sum())
    if not norms or at_once > limits.NORM_IMAGES_WARNING:
        return None
    severity = "error" if at_once <= limits.NORM_IMAGES_ERROR else "warning"
    return severity, f"{norms} layers of batch normalisation learn from {at_once:.0f} at a time"


def _unshared_cost(history: TrainingHistory) -> tuple[str, str] | None:
    """What a larger batch would share between more images."""
    steps = _steps_of(history)
    if steps is None:
        return None
    share = _part(steps, "optimizer")
    if share > limits.OPTIMIZER_WARNING:
        severity = "error" if share > limits.BOTTLENECK_ERROR else "warning"
        return severity, f"{share:.0%} of a step's time went into the optimizer"
    use = _percentiles(history)
    if not use or max(use.values()) >= limits.BATCH_P95:
        return None
    said = ", ".join(f"{name} {value:.0f} %" for name, value in use.items())
    return "warning", f"95th percentiles of use: {said}"


def memory_increase(history: TrainingHistory) -> Finding | None:
    """Memory grows and grows: the GPU's, else that of the training and its workers.

    Source: Debugger's GPUMemoryIncrease, increase 5 points of a hundred, window 10 samples.
    """
    system = _system_of(history)
    if system is None:
        return None
    for what, used in _memory(system):
        used = used[np.isfinite(used)]
        windows = _windows(used)
        # What is loaded once grows once: only growth that goes on is a leak.
        grown = windows[-1] - windows[0] if len(windows) else 0.0
        if grown < limits.MEMORY_GROWTH or min(b - a for a, b in pairwise(windows)) <= 0:
            continue
        return Finding(
            rule="memory_increase",
            severity="error",
            evidence=f"{what} in use rose without a pause from {windows[0]:.0f} % to "
            f"{windows[-1]:.0f} %",
            advice="Something keeps tensors of every step; without a callback of your own, report "
            "it. Until then use fewer training.epochs and go on with --resume.",
        )
    return None


def initialisation_too_long(history: TrainingHistory) -> Finding | None:
    """The first step came late, the preparation of images before the training included.

    Source: Debugger's MaxInitializationTime, threshold 20 minutes.
    """
    steps = history.recording.steps if history.recording else None
    prepared = history.preparation_seconds
    seconds = prepared + (steps.startup_seconds if steps else 0.0)
    if seconds <= 60 * limits.STARTUP_MINUTES:
        return None
    trained_for = sum(history.gaps())
    return Finding(
        rule="initialisation_too_long",
        severity="error" if trained_for and seconds > trained_for else "warning",
        evidence=f"the first step came after {seconds / 60:.0f} minutes"
        + (f", {prepared / 60:.0f} of them for images and features" if prepared else "")
        + (f"; the epochs took {trained_for / 60:.0f}" if trained_for else ""),
        advice="Bring the images to a local disk (`visiontuner prepare --data DATA`), keep the "
        "cache (VISIONTUNER_CACHE) between trainings, or use a smaller model.image_size.",
    )


def step_outliers(history: TrainingHistory) -> Finding | None:
    """Some steps take far longer than the others, and together a good part of the time.

    Source: Debugger's StepOutlier, stddev 3, n_outliers 10; that they have to matter is our own.
    """
    steps = _steps_of(history)
    if steps is None:
        return None
    seconds = steps.seconds.sum(axis=1)
    usual = float(np.median(seconds))
    late = seconds > seconds.mean() + limits.OUTLIER_DEVIATIONS * seconds.std()
    lost = float((seconds[late] - usual).sum() / seconds.sum())
    if late.sum() <= limits.OUTLIERS or lost < limits.OUTLIER_SHARE:
        return None
    part = STEP_PARTS[int(np.argmax((steps.seconds[late] - np.median(steps.seconds, 0)).sum(0)))]
    return Finding(
        rule="step_outliers",
        severity="error" if lost > limits.BOTTLENECK_ERROR else "warning",
        evidence=f"{late.sum()} of {len(seconds)} steps took over "
        f"{seconds[late].min() / max(usual, 1e-9):.1f} times the usual {usual:.3g} s, together "
        f"{lost:.0%} of the time, most of it in {part}",
        advice="See what else runs on this machine; with data, use more training.workers or a "
        "faster disk.",
    )


def _steps_of(history: TrainingHistory) -> StepRecord | None:
    """Without the first step, which starts processes and compiles; None of too few steps."""
    steps = history.recording.steps if history.recording else None
    if steps is None or len(steps.steps) <= limits.FEWEST_STEPS:
        return None
    every = steps.steps[-1] / len(steps.steps)  # of a long training not all steps are kept
    if every * float(steps.seconds.sum()) < limits.FEWEST_SECONDS:
        return None
    return StepRecord(
        steps=steps.steps[1:],
        seconds=np.nan_to_num(steps.seconds[1:]),
        images=steps.images[1:],
        startup_seconds=steps.startup_seconds,
        device=steps.device,
        workers=steps.workers,
    )


def _part(steps: StepRecord, name: str) -> float:
    """The share of all steps' time that one part took."""
    total = float(steps.seconds.sum())
    return float(steps.seconds[:, STEP_PARTS.index(name)].sum()) / total if total > 0 else 0.0


def _steps_on_gpu(history: TrainingHistory) -> bool:
    steps = history.recording.steps if history.recording else None
    return steps is not None and steps.device != "cpu"


def _system_of(history: TrainingHistory) -> SystemRecord | None:
    system = history.recording.system if history.recording else None
    return system if system is not None and len(system.times) >= limits.FEWEST_SAMPLES else None


def _gpus(system: SystemRecord) -> dict[int, Floats]:
    """Use in percent by the GPU's number."""
    found = ((name, _GPU.fullmatch(name)) for name in system.values)
    use = {int(match[1]): system.of(name) for name, match in found if match}
    return {number: values for number, values in use.items() if np.isfinite(values).any()}


def _percentiles(history: TrainingHistory) -> dict[str, float]:
    """95th percentiles of CPU, GPU and GPU memory in percent, where a GPU tells all of them."""
    system = _system_of(history)
    gpus = _gpus(system) if system else {}
    if system is None or not gpus or not _steps_on_gpu(history):
        return {}
    gpu = max(gpus, key=lambda number: float(np.nanmean(gpus[number])))
    names = {
        "CPU": "cpu_utilization_percentage",
        "GPU": f"gpu_{gpu}_utilization_percentage",
        "GPU memory": f"gpu_{gpu}_memory_usage_percentage",
    }
    use = {what: system.of(name) for what, name in names.items()}
    if not all(np.isfinite(values).any() for values in use.values()):
        return {}
    return {what: float(np.nanpercentile(values, 95)) for what, values in use.items()}


def _memory(system: SystemRecord) -> list[tuple[str, NDArray[Any]]]:
    """What may leak, in percent of what there is: every GPU's, then the training's own."""
    found: list[tuple[str, NDArray[Any]]] = [
        (f"memory of GPU {gpu}", system.of(f"gpu_{gpu}_memory_usage_percentage"))
        for gpu in sorted(_gpus(system))
    ]
    share = system.of("system_memory_usage_percentage")
    there = 100 * system.of("system_memory_usage_megabytes") / np.where(share > 0, share, np.nan)
    return [*found, ("memory of the training", 100 * system.of("process_memory_megabytes") / there)]


def _windows(used: NDArray[Any]) -> list[float]:
    """Means of ten (or more) samples after another, the first left out: things are loaded then."""
    count = len(used) // limits.MEMORY_WINDOW
    if count < limits.MEMORY_WINDOWS:
        return []
    return [float(part.mean()) for part in np.array_split(used, min(count, 10))][1:]
