"""Pictures as they enter the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from visiontuner.tracking.figures.contact_sheet import picture_sheet
from visiontuner.tracking.figures.parts import INK
from visiontuner.training.recording.records import TensorRecord

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
    figure = picture_sheet(
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
