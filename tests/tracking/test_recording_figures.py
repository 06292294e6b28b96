import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from visiontuner.diagnostics.history import Recording, StepRecord, SystemRecord, TensorRecord
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.recording import layer_map, recording_figures


def tensors(layers: int = 3, steps: int = 4, **values: Any) -> TensorRecord:
    shape = steps, layers
    usual = {"gradient_norm": 0.1, "update_ratio": 1e-3, "activation_std": 1.0}
    return TensorRecord(
        steps=np.arange(1, steps + 1) * 50,
        layers=tuple(f"backbone.layer{n}" for n in range(layers)),
        kinds=("Conv2d",) * layers,
        values={n: np.full(shape, v, np.float32) for n, v in {**usual, **values}.items()},
        input_mean=np.zeros((steps, 3), np.float32),
        input_std=np.ones((steps, 3), np.float32),
        input_min=np.full(steps, -2.1, np.float32),
        input_max=np.full(steps, 2.6, np.float32),
        inputs=np.zeros((8, 3, 8, 8), np.float16),
    )


def step_record(steps: int = 100) -> StepRecord:
    return StepRecord(
        steps=np.arange(1, steps + 1),
        seconds=np.full((steps, 6), 0.01, np.float32),
        images=np.full(steps, 32),
        startup_seconds=3.0,
        device="cpu",
        workers=2,
    )


def system(samples: int = 50, **values: float) -> SystemRecord:
    usual = {"cpu_utilization_percentage": 80.0, "process_memory_megabytes": 900.0}
    named = {**usual, **values}
    return SystemRecord(
        times=np.arange(float(samples)),
        values={name: np.full(samples, value, np.float32) for name, value in named.items()},
    )


def text_of(figure: Figure) -> str:
    lines = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        lines += [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())]
        legend = axes.get_legend()
        lines += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(lines)


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(to_png(figure))).convert("RGB"))


def test_a_whole_recording_gives_every_figure() -> None:
    whole = Recording(
        tensors=tensors(activation_dead=0.2),
        steps=step_record(),
        system=system(gpu_0_utilization_percentage=70.0),
    )
    drawn = recording_figures(whole)
    assert set(drawn) == {
        "gradient_norms", "update_ratios", "output_spread", "dead_units", "network_inputs",
        "step_times", "system_use",
    }  # fmt: skip
    for figure in drawn.values():
        assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 10
    assert "GPU 0" in text_of(drawn["system_use"])
    assert "Waiting for data 16.7%" in text_of(drawn["step_times"])


@pytest.mark.parametrize(
    "little",
    [
        Recording(),
        Recording(tensors=tensors(steps=0)),
        Recording(tensors=tensors(layers=0)),
        Recording(steps=step_record(0)),
        Recording(steps=step_record(1)),
        Recording(system=system(1)),
        Recording(system=system(2)),
        Recording(tensors=tensors(gradient_norm=np.nan, activation_std=np.inf)),
        Recording(tensors=tensors(gradient_norm=0.0, steps=1)),
    ],
)
def test_what_there_is_can_be_drawn(little: Recording) -> None:
    for figure in recording_figures(little).values():
        to_png(figure)


def test_every_layer_of_a_large_network_has_rows_of_its_own() -> None:
    """126 layers at 6 pixels or more, and a name at every third at least."""
    figure = layer_map(tensors(layers=126), "gradient_norm", "Gradients")
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_window_extent().height / figure.dpi * 90 / 126 >= 6
    assert len(axes.get_yticklabels()) >= 42


@pytest.mark.parametrize("high", [12.641422, 0.1, 3.3e7, 1e-9])
def test_the_largest_and_the_smallest_value_are_within_the_scale(high: float) -> None:
    record = tensors(layers=2, steps=2)
    record.values["gradient_norm"][:] = [[high, high / 3], [high / 2, high / 7]]
    figure = layer_map(record, "gradient_norm", "Gradients")
    assert figure is not None
    assert (208, 2, 27) not in {tuple(colour) for colour in pixels(figure).reshape(-1, 3)}
    image = figure.axes[0].images[0]
    assert image.norm.vmin < image.get_array().min()


def test_zeros_infinities_and_gaps_look_different_and_are_explained() -> None:
    values = np.array([[1.0, 0.0, 1.0, np.inf]] * 2 + [[1.0, 0.0, np.nan, np.inf]] * 2)
    figure = layer_map(tensors(layers=4, gradient_norm=values), "gradient_norm", "Gradients")
    assert figure is not None
    said = text_of(figure)
    assert all(what in said for what in ("black: 0", "red: not finite", "grey: not recorded"))
    seen = {tuple(colour) for colour in pixels(figure).reshape(-1, 3)}
    assert {(0, 0, 0), (208, 2, 27), (221, 224, 228)} <= seen


def test_what_enters_the_network_is_shown_as_pixels_again() -> None:
    """Input 0 is the mean's grey where the mean is known."""
    figure = recording_figures(
        Recording(tensors=tensors(), about={"mean": [0.5] * 3, "std": [0.25] * 3})
    )["network_inputs"]
    assert (pixels(figure) == 128).all(axis=2).mean() > 0.3
    assert "mean 0.00, 0.00, 0.00" in text_of(figure)
