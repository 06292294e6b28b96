"""Figures of what was recorded of one training: tensors by layer and step, time, machine, input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from visiontuner.diagnostics.history import (
    RECORDING_FILE,
    STEP_PARTS,
    TRACE_FILE,
    Recording,
    StepRecord,
    SystemRecord,
    TensorRecord,
    find_recording,
)
from visiontuner.tracking.figures.evaluation import image_sheet
from visiontuner.tracking.figures.parts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    add_legend,
    as_percent,
    count,
    label_axes,
    panels,
    plot_line,
    to_png,
)
from visiontuner.tracking.run_plans import Point

# Images as they enter the network.


_MOST = 8


def network_inputs(record: TensorRecord, about: Mapping[str, Any]) -> Figure | None:
    """Some of the first recorded batch, cropped and changed as the network saw them.

    Args:
        about: `mean` and `std` by channel turn input into pixels again; without them the range of
            the values does.
    """
    inputs = record.inputs[:_MOST].astype(np.float32)
    if inputs.ndim != 4 or not inputs.size:
        return None
    pixels = _pixels(inputs, about)
    captions = [
        (f"mean {_number(float(one.mean()))}, std {_number(float(one.std()))}", "")
        for one in np.nan_to_num(inputs)
    ]
    figure = image_sheet(
        [Image.fromarray(one) for one in pixels], captions, title_lines=2, columns=4
    )
    _title(figure, record)
    return figure


def _title(figure: Figure, record: TensorRecord) -> None:
    mean, std = (
        ", ".join(_number(float(value)) for value in np.nanmean(values, axis=0))
        for values in (record.input_mean, record.input_std)
    )
    low, high = float(np.nanmin(record.input_min)), float(np.nanmax(record.input_max))
    height = figure.get_figheight()
    for line, (text, weight) in enumerate((
        ("What enters the network", "bold"),
        (f"By channel over all recorded steps: mean {mean}, standard deviation {std}; "
         f"from {_number(low)} to {_number(high)}", "normal"),
    )):  # fmt: skip
        figure.text(
            0.015,
            1 - (0.2 + 0.19 * line) / height,
            text,
            fontsize=10.5 - 2.5 * line,
            color=INK,
            weight=weight,
        )


def _pixels(inputs: NDArray[np.float32], about: Mapping[str, Any]) -> NDArray[np.uint8]:
    """(N, C, H, W) -> uint8 (N, H, W, 3)."""
    mean, std = about.get("mean"), about.get("std")
    if mean and std and len(mean) == inputs.shape[1]:
        shape = (1, -1, 1, 1)
        inputs = inputs * np.reshape(std, shape) + np.reshape(mean, shape)
    else:
        low, high = float(np.nanmin(inputs)), float(np.nanmax(inputs))
        inputs = (inputs - low) / max(high - low, 1e-9)
    channels = inputs if inputs.shape[1] == 3 else np.repeat(inputs[:, :1], 3, axis=1)
    clipped = np.clip(np.nan_to_num(channels), 0, 1) * 255
    return np.ascontiguousarray(clipped.round().astype(np.uint8).transpose(0, 2, 3, 1))


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 100 else f"{value:.3g}"


# What was recorded of a trial -> what MLflow and the page show of it.


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

    return {n: to_png(f) for n, f in recording_figures(recording).items()}


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


Values = NDArray[np.floating[Any]]

_NOTHING, _ZERO, _NOT_FINITE = "#DDE0E4", "#000000", "#D0021B"
_ROWS_LABELLED = 60
_DECADES = 10
_BARS = 60
_PARTS = {
    "data": ("#D55E00", "Waiting for data"),
    "to_device": ("#E69F00", "To the device"),
    "forward": ("#56B4E9", "Forward"),
    "backward": ("#0072B2", "Backward"),
    "optimizer": ("#009E73", "Optimizer"),
    "reporting": ("#CC79A7", "Reporting"),
}


def recording_figures(recording: Recording) -> dict[str, Figure]:
    """Every figure of a training that its recording allows, by file name."""
    drawn: dict[str, Figure | None] = {}
    if recording.tensors is not None and len(recording.tensors.steps):
        tensors = recording.tensors
        drawn["gradient_norms"] = layer_map(
            tensors, "gradient_norm", "Gradient norm of each layer's weight"
        )
        drawn["update_ratios"] = layer_map(
            tensors, "update_ratio", "Change of each layer's weight in a step, by its norm"
        )
        drawn["output_spread"] = layer_map(
            tensors, "activation_std", "Standard deviation of each layer's output"
        )
        drawn["dead_units"] = layer_map(
            tensors, "activation_dead", "Share of units that are 0 for a whole batch", share=True
        )
        drawn["network_inputs"] = network_inputs(tensors, recording.about)
    if recording.steps is not None and len(recording.steps.steps):
        drawn["step_times"] = step_times(recording.steps)
    if recording.system is not None and len(recording.system.times) > 1:
        drawn["system_use"] = system_use(recording.system)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def layer_map(
    record: TensorRecord, statistic: str, title: str, *, share: bool = False
) -> Figure | None:
    """A statistic over layers, from input to output, and steps; None if no layer has it.

    Args:
        share: it is in [0, 1], and coloured in proportion; else its logarithm is.
    """
    values = record.of(statistic).T  # (L, S)
    rows = np.flatnonzero((~np.isnan(values)).any(axis=1))
    if not len(rows):
        return None
    values = values[rows]
    names = _short_names([record.layers[row] for row in rows])
    # Rows are 6 to 14 pixels high at 90 an inch, so that every layer can be told.
    height = 1.3 + len(rows) * float(np.clip(6 / len(rows), 0.07, 0.16))
    figure, (axes,) = panels(1, title, left=0.3, right=0.9, height=height)
    norm: Normalize = Normalize(0, 1) if share else _log_norm(values)
    colours = mpl.colormaps["viridis"].with_extremes(bad=_NOTHING, under=_ZERO, over=_NOT_FINITE)
    # A logarithm knows no 0: it gets the colour below the scale.
    drawn = values if share else np.where(values == 0, 1e-38, values)
    image = axes.imshow(
        np.ma.masked_invalid(np.where(np.isinf(values), 1e38, drawn)),
        norm=norm,
        cmap=colours,
        aspect="auto",
        interpolation="nearest",
    )
    axes.grid(visible=False)
    every = -(-len(rows) // _ROWS_LABELLED)
    axes.set_yticks(range(0, len(rows), every), names[::every], fontsize=6.5)
    _step_ticks(axes, record)
    label_axes(axes, "Optimizer step", "")
    bar = figure.colorbar(image, cax=figure.add_axes(_beside(axes)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2, colors=INK)
    if share:
        as_percent(bar.ax)
    _explain(figure, values, height, share=share)
    return figure


def step_times(record: StepRecord) -> Figure:
    """What steps spend their time on: through the training, and all together."""
    seconds = np.nan_to_num(record.seconds) * 1000
    total = max(float(seconds.sum()), 1e-9)
    figure, (left, right) = panels(
        2, f"Time of a step   {_whole(seconds.sum(axis=1))} on {record.device}"
    )
    groups = np.array_split(np.arange(len(seconds)), min(_BARS, len(seconds)))
    edges = [record.steps[group[0]] for group in groups] + [record.steps[-1] + 1]
    base = np.zeros(len(groups))
    for place, part in enumerate(STEP_PARTS):
        height = np.array([seconds[group, place].mean() for group in groups])
        left.stairs(base + height, edges, baseline=base, fill=True, color=_PARTS[part][0])
        base = base + height
    left.set_ylim(0, 1.15 * float(np.percentile(base, 98)) or 1)
    left.set_xlim(edges[0], edges[-1])
    left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    label_axes(left, "Optimizer step", "Milliseconds a step")
    shares = [float(seconds[:, place].sum()) / total for place in range(len(STEP_PARTS))]
    places = range(len(STEP_PARTS))[::-1]
    right.barh(places, shares, color=[_PARTS[part][0] for part in STEP_PARTS], height=0.7)
    right.set_yticks(places, ["" for _ in STEP_PARTS])
    for place, part, part_share in zip(places, STEP_PARTS, shares, strict=True):
        inside = part_share > 0.6 * max(shares)
        right.text(
            part_share - 0.01 if inside else part_share + 0.01,
            place,
            f"{_PARTS[part][1]} {part_share:.1%}",
            ha="right" if inside else "left",
            va="center",
            fontsize=8.5,
            color="white" if inside else INK,
        )
    as_percent(right, "x")
    label_axes(right, "Share of the time of all steps", "")
    return figure


def system_use(record: SystemRecord) -> Figure:
    """Use of processors and GPUs, and of memory, while the training ran."""
    minutes = (record.times - record.times[0]) / 60
    unit, times = ("Minutes", minutes) if minutes[-1] > 3 else ("Seconds", minutes * 60)
    figure, (left, right) = panels(2, "Use of the machine")
    colours = [ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
    gpus = sorted(
        name.split("_")[1]
        for name in record.values
        if name.startswith("gpu_") and name.endswith("_utilization_percentage")
    )
    lines = [(left, "cpu_utilization_percentage", 1, BLUE, "CPU")]
    for gpu, colour in zip(gpus, colours, strict=False):
        name = f"GPU {gpu}"
        lines.append((left, f"gpu_{gpu}_utilization_percentage", 1, colour, name))
        lines.append((right, f"gpu_{gpu}_memory_usage_megabytes", 1000, colour, name))
    lines.append((right, "system_memory_usage_megabytes", 1000, GREY, "Machine"))
    lines.append((right, "process_memory_megabytes", 1000, BLUE, "Training"))
    for axes, name, unit_size, colour, label in lines:
        x, y = _means(times, record.of(name) / unit_size)
        plot_line(axes, x, y, colour=colour, label=label)
    left.set_ylim(0, 103)
    right.set_ylim(bottom=0)
    label_axes(left, unit, "Use in percent")
    label_axes(right, unit, "Memory in GB")
    for axes in (left, right):
        add_legend(axes, outside=True, columns=3)
    return figure


def _means(times: Values, values: Values) -> tuple[list[float], list[float]]:
    """Of samples after another, so that a long training is a line and no cloud."""
    groups = np.array_split(np.arange(len(times)), min(2 * _BARS, len(times)))
    return [float(times[g].mean()) for g in groups], [float(values[g].mean()) for g in groups]


def _log_norm(values: Values) -> LogNorm:
    """From the smallest to the largest value above zero, ten decades at most.

    A little more at both ends: rounded to float32, or drawn larger, an end could lie outside.
    """
    positive = values[np.isfinite(values) & (values > 0)]
    high = float(positive.max()) if len(positive) else 1.0
    low = max(float(positive.min()), high * 10.0**-_DECADES) if len(positive) else 0.1
    return LogNorm(0.99 * low, 1.01 * high if high > low else low * 10)


def _short_names(names: list[str]) -> list[str]:
    """Without what all but the head begin with, and cut in front: the end tells layers apart."""
    short = [name.removeprefix("backbone.").removeprefix("module.") for name in names]
    return [name if len(name) <= 34 else f"…{name[-33:]}" for name in short]


def _step_ticks(axes: Axes, record: TensorRecord) -> None:
    """Columns are recorded steps, however far apart."""
    steps = record.steps
    every = -(-len(steps) // 12)
    axes.set_xticks(range(0, len(steps), every), [f"{step:,}" for step in steps[::every]])


def _beside(axes: Axes) -> tuple[float, float, float, float]:
    box = axes.get_position()
    return box.x1 + 0.015, box.y0, 0.015, box.height


def _explain(figure: Figure, values: Values, height: float, *, share: bool) -> None:
    """What the colours beside the scale mean, where they occur."""
    said = []
    if np.isnan(values).any():
        said.append(("grey: not recorded", "#7A808A"))
    if not share and (values == 0).any():
        said.append(("black: 0", _ZERO))
    if np.isinf(values).any():
        said.append(("red: not finite", _NOT_FINITE))
    for place, (text, colour) in enumerate(said):
        figure.text(0.02 + 0.16 * place, 0.08 / height, text, fontsize=7.5, color=colour)


def _whole(seconds: Values) -> str:
    return f"median {float(np.median(seconds)):,.0f} ms, {count(len(seconds), 'step')}"
