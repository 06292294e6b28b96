"""What was recorded of a trial -> what MLflow and the page show of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from visiontuner.tracking.plan import Point
from visiontuner.training.recording.records import (
    RECORDING_FILE,
    STEP_PARTS,
    TRACE_FILE,
    Recording,
    find_recording,
)

EXPLAINS: Mapping[str, str] = {
    "exploding_gradient": "gradient_norms",
    "exploding_tensor": "gradient_norms",
    "vanishing_gradient": "gradient_norms",
    "all_zero": "gradient_norms",
    "unchanged_tensor": "update_ratios",
    "weight_update_ratio": "update_ratios",
    "poor_weight_initialisation": "output_spread",
    "tensor_variance": "output_spread",
    "saturated_activation": "output_spread",
    "dead_relu": "dead_units",
    "check_input_images": "network_inputs",
    "low_gpu_use": "system_use",
    "cpu_bottleneck": "system_use",
    "memory_increase": "system_use",
    "workload_imbalance": "system_use",
    "io_bottleneck": "step_times",
    "batch_size_too_small": "step_times",
    "initialisation_too_long": "step_times",
    "step_outliers": "step_times",
}
"""By rule: which figure of a recording shows what it saw."""

# Of each of ten names: MLflow takes 800 points a call, and a chart shows no more.
_MOST_POINTS = 200


def points_of(recording: Recording, *, time: int, epoch: int) -> list[Point]:
    """The machine's use under MLflow's own names, and what the steps took.

    Args:
        time: of the latter, in milliseconds since the epoch.
        epoch: their step, the trial's last epoch.
    """
    summary = [Point(name, value, time, epoch) for name, value in _summary(recording)]
    return [*_system_points(recording), *summary]


def files_of(trial_folder: Path, recording: Recording) -> dict[str, bytes]:
    """Artifacts by path: figures, the recording itself, and the trace if one was made."""
    drawn = {f"figures/{name}.png": png for name, png in draw(recording).items()}
    kept = [trial_folder / name for name in (RECORDING_FILE, TRACE_FILE)]
    return drawn | {path.name: path.read_bytes() for path in kept if path.is_file()}


def draw(recording: Recording) -> dict[str, bytes]:
    """Every figure of a recording, PNG by name."""
    from visiontuner.tracking import figures

    return {n: figures.to_png(f) for n, f in figures.recording_figures(recording).items()}


class Explained:
    """The figure that explains a finding, where the trial was recorded; drawn when it is asked for.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drawn: dict[str, Mapping[str, bytes]] = {}

    def __call__(self, trial_id: str | None, rule: str) -> bytes | None:
        """PNG; None where nothing was recorded that shows it."""
        if trial_id is None or rule not in EXPLAINS:
            return None
        if trial_id not in self._drawn:
            recording = find_recording(self._folder / "trials" / trial_id)
            self._drawn[trial_id] = draw(recording) if recording else {}
        return self._drawn[trial_id].get(EXPLAINS[rule])


def _system_points(recording: Recording) -> Iterator[Point]:
    """As MLflow's own monitor would have logged them; a step is a second from the first on."""
    system = recording.system
    if system is None or not len(system.times):
        return
    every = -(-len(system.times) // _MOST_POINTS)
    for row in range(0, len(system.times), every):
        moment = float(system.times[row])
        for name, values in system.values.items():
            if np.isfinite(values[row]):
                yield Point(
                    f"system/{name}",
                    round(float(values[row]), 1),
                    round(moment * 1000),
                    round(moment - float(system.times[0])),
                )


def _summary(recording: Recording) -> Iterator[tuple[str, float]]:
    steps = recording.steps
    if steps is not None and len(steps.steps):
        yield "startup_seconds", float(steps.startup_seconds)
        total = steps.seconds.sum(axis=1)
        yield "step_seconds", float(np.median(total))
        if total.sum() > 0:
            waited = steps.seconds[:, STEP_PARTS.index("data")].sum()
            yield "data_wait_share", float(waited / total.sum())
    if recording.system is not None:
        memory = recording.system.of("process_memory_megabytes")
        if np.isfinite(memory).any():
            yield "process_memory_peak_megabytes", float(np.nanmax(memory))
